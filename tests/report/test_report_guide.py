"""Each rule of a report's guide, by values on both sides of its threshold; and what the rules are given."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import finished
import pyarrow.parquet as pq
import pytest

from axolotl_spin.report.answers import read_answers
from axolotl_spin.report.figures import Figures, collect
from axolotl_spin.report.guide import RULES, judge
from axolotl_spin.report.reading import read_run
from axolotl_spin.settings.generation import GenerationConfig
from axolotl_spin.settings.spin import SpinConfig

pytestmark = pytest.mark.once

LN2 = math.log(2.0)
# an iteration in which nothing stands out: human answers of ten tokens gain 0.05 nats per token, own ones lose as much
FINE = {
    "loss_first": LN2, "loss_last": 0.45, "rewards/accuracies": 0.8, "rewards/margins": 0.1, "rewards/chosen": 0.05,
    "spin/beta": 0.1, "spin/chosen_length": 10.0, "spin/rejected_length": 12.0, "spin/truncated": 0.05, "spin/empty": 0.0,
    "spin/identical": 0.0, "eval_loss": 2.0, "spin/training_seconds": 9.0,
}  # fmt: skip


def iteration(
    number: int = 0, losses: list[float] | None = None, distinct: float = 0.5, done: bool = True, **changes: Any
) -> Figures:
    names = {name.replace("_per_", "/"): value for name, value in changes.items()}
    rows = [{"loss": loss} for loss in losses or []]
    return Figures(number, LN2, {**FINE, **names}, rows, done, (distinct, 0.6))


def test_rewards_per_token_are_not_divided_again() -> None:
    """A margin of 0.1 at beta 0.1: 0.1 nats per token of ten tokens, or 1 where it is per token."""
    assert iteration().per_token("rewards/margins") == pytest.approx(0.1)
    found = Figures(0, LN2, FINE, [], True, normalized=True)
    assert found.per_token("rewards/margins") == pytest.approx(1.0)


def test_figures_are_read_by_the_runs_objective(tmp_path: Path) -> None:
    given = {"spin.initial_pairs (pairs as token ids)": "abc"}
    finished.make(tmp_path, **{"spin.loss": "space", "spin.length_normalized": True, "spin.sft_weight": 0.2, **given})
    found = collect(read_run(tmp_path), [])
    assert [(figures.first_loss, figures.normalized, figures.loss_type) for figures in found] == [
        (2 * LN2, True, "space")
    ] * 2
    assert [(figures.sft_weight, figures.given) for figures in found] == [(0.2, True), (0.2, False)]


def titles(*found: Figures) -> list[str]:
    return [advice.title for advice in judge(found)]


def test_a_run_without_findings() -> None:
    assert titles(iteration(), iteration(1), iteration(2)) == []
    assert titles() == []


SHORT, LONG = "Answers grow too short", "Answers grow too long"


@pytest.mark.parametrize(
    ("title", "applies", "does_not"),
    [
        ("The first loss is off", {"loss_first": LN2 + 0.06}, {"loss_first": LN2 - 0.04}),
        ("Empty answers", {"spin_per_empty": 0.05}, {"spin_per_empty": 0.049}),
        (LONG, {"spin_per_rejected_length": 15.1}, {"spin_per_rejected_length": 14.9}),
        (SHORT, {"spin_per_rejected_length": 6.6}, {"spin_per_rejected_length": 6.7}),
        ("Many answers are cut", {"spin_per_truncated": 0.2}, {"spin_per_truncated": 0.19}),
        # -0.021 and -0.019 nats per token: times beta 0.1 and ten tokens
        ("Human answers become less likely", {"rewards_per_chosen": -0.021}, {"rewards_per_chosen": -0.019}),
        ("The policy moves far within an iteration", {"rewards_per_margins": 1.01}, {"rewards_per_margins": 0.99}),
        (
            "`spin.beta` may be too high",  # 0.04 nats per token
            {"loss_last": 0.06, "spin_per_beta": 10.0, "rewards_per_margins": 4.0},
            {"loss_last": 0.08, "spin_per_beta": 10.0, "rewards_per_margins": 4.0},
        ),
        (
            "The policy hardly moves",
            {"loss_last": 0.685, "rewards_per_accuracies": 0.55},
            {"loss_last": 0.685, "rewards_per_accuracies": 0.61},
        ),
        ("Many answers equal the human's", {"spin_per_identical": 0.2}, {"spin_per_identical": 0.19}),
        ("Held-out answers become less likely", {"eval_loss": 2.05}, {"eval_loss": 2.03}),
        ("Answers become alike", {"distinct": 0.29}, {"distinct": 0.31}),
        (
            "Own answers can hardly be told from the human's",
            {"spin_per_heldout_auc": 0.46},
            {"spin_per_heldout_auc": 0.44},
        ),
        (
            "The data is used up early",
            {"losses": [0.7, 0.5, 0.1, 0.03] + [0.02] * 3},
            {"losses": [0.7] * 5 + [0.02] * 2},
        ),
    ],
)
def test_a_rule_on_both_sides_of_its_threshold(title: str, applies: dict, does_not: dict) -> None:
    """Everything else is as in an iteration without findings; the second iteration is the one that is changed."""
    found = judge([iteration(), iteration(1, **applies)])
    assert [(advice.title, advice.iterations) for advice in found] == [(title, [1])]
    assert titles(iteration(), iteration(1, **does_not)) == []


def test_a_beta_that_is_too_high_needs_a_policy_that_stands_still() -> None:
    moved = {"loss_last": 0.06, "spin_per_beta": 10.0, "rewards_per_margins": 5.1}
    assert titles(iteration(**moved)) == []


def test_lengths_that_come_nearer_the_humans_do_not_drift() -> None:
    """Three times the human's in iteration 0, as where answers are cut, and nearer in each later one."""
    lengths = (30.0, 20.0, 16.0)
    assert titles(*(iteration(i, spin_per_rejected_length=length) for i, length in enumerate(lengths))) == []
    assert titles(iteration(0, spin_per_rejected_length=30.0), iteration(1, spin_per_rejected_length=31.0)) == [LONG]
    # from too long to too short, which is another drift even where it is no further off
    assert titles(iteration(0, spin_per_rejected_length=30.0), iteration(1, spin_per_rejected_length=5.0)) == [SHORT]


def test_a_held_out_loss_is_compared_with_the_start_models_and_with_earlier_ones_alone() -> None:
    """2.9, the lowest, comes after the iteration that is said to be worse."""
    found = [iteration(number, eval_loss=loss) for number, loss in enumerate((3.0, 3.2, 2.9))]
    [advice] = judge(found)
    assert advice.iterations == [1] and "is 3.2000 after iteration 1 and was 3.0000 before" in advice.text
    worse = iteration(0, eval_loss=2.05, spin_per_start_eval_loss=2.0)
    assert [(advice.title, advice.iterations) for advice in judge([worse])] == [
        ("Held-out answers become less likely", [0])
    ]


def test_advice_leaves_out_what_is_set_and_says_what_is_so() -> None:
    falls = {"rewards_per_chosen": -0.03}
    [advice] = judge([iteration(**falls)])
    assert "own answers fall faster" in advice.text
    assert advice.text.endswith("set `spin.sft_weight` to 0.1, or `spin.loss` to space.")
    space = iteration(rewards_per_margins=-0.01, **falls)
    space.loss_type = "space"
    [advice] = judge([space])
    assert "fall faster" not in advice.text and advice.text.endswith("or set `spin.sft_weight` to 0.1.")
    held_up = iteration(losses=[0.01] * 9, **falls)  # which tells nothing where the NLL is in it
    held_up.sft_weight = 0.1
    [advice] = judge([held_up])
    assert advice.text.endswith("or raise `spin.sft_weight`.")


def test_answers_that_were_given_are_no_measure_of_variety() -> None:
    start = iteration(0, distinct=0.9)
    start.given = True
    assert titles(start, iteration(1, distinct=0.3)) == []


def test_a_spike_is_not_the_end_of_the_data() -> None:
    assert titles(iteration(losses=[0.7, 0.02, 0.02, 0.02, 0.02, 0.3])) == []


def test_an_iteration_that_goes_on_is_not_judged_by_its_end() -> None:
    still = {"loss_last": 0.69, "rewards_per_accuracies": 0.5}
    assert titles(iteration(**still, done=False)) == []
    assert titles(iteration(**still)) == ["The policy hardly moves"]


def test_figures_that_are_not_there_are_no_finding() -> None:
    empty = Figures(0, LN2, {}, [], False)
    nothing = Figures(1, LN2, {"loss_last": None, "spin/empty": float("nan"), "eval_loss": "?"}, [], False)
    assert titles(empty, nothing) == []


def test_every_rule_names_a_key_that_exists() -> None:
    """Each advice names what to change, and every key it names is one of the host's or of the `spin:` block."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    bad = iteration(
        1, losses=[0.01] * 9, distinct=0.1, loss_first=1.0, loss_last=0.001, spin_per_beta=100.0, rewards_per_margins=1.0,
        rewards_per_chosen=-50.0, spin_per_empty=0.5, spin_per_truncated=0.9, spin_per_identical=0.5, eval_loss=9.0,
        spin_per_rejected_length=99.0, spin_per_heldout_auc=0.5,
    )  # fmt: skip
    far = iteration(1, rewards_per_margins=9.0)
    still = iteration(1, loss_last=LN2, rewards_per_accuracies=0.5)
    found = [*judge([iteration(), bad]), *judge([iteration(), far]), *judge([iteration(), still])]
    assert len({advice.title for advice in found}) == len(RULES)
    for advice in found:
        keys = set(re.findall(r"`([^`]+)`", advice.text))
        assert keys, advice.title
        for key in keys:
            block, _, name = key.rpartition(".")
            schema = {"": AxolotlInputConfig, "spin": SpinConfig, "spin.generation": GenerationConfig}[block]
            assert name in schema.model_fields, key


def test_what_the_rules_are_given(tmp_path: Path) -> None:
    """From a folder on disk: the distinct pairs of tokens are those of the answers, counted here once more."""
    finished.make(tmp_path, prompts=30, iterations=2)
    run = read_run(tmp_path)
    answers = read_answers(run)
    figures = collect(run, answers)
    assert [f.iteration for f in figures] == [0, 1] and all(f.done for f in figures)
    assert [len(f.rows) for f in figures] == [entry.steps for entry in run.iterations]
    rows = pq.read_table(run.directory.pairs(1)).to_pylist()
    for name, got in zip(("rejected_ids", "chosen_ids"), figures[1].distinct_2, strict=True):
        new = [row[name] for row in rows if row["generated_in"] == 1]
        pairs = [pair for ids in new for pair in pairwise(ids)]
        assert got == pytest.approx(len(set(pairs)) / len(pairs))
    assert figures[1].per_token("rewards/margins") == pytest.approx(
        1.1 / 0.1 / figures[1].metrics["spin/chosen_length"]
    )
