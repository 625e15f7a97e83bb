"""Held-out play: which prompts, what is measured, and that training does not notice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import host
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from rows import jsonl, load
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from warm import Warm

from axolotl_spin.data.answers import distinct_2
from axolotl_spin.data.heldout import heldout_prompts, refuse_missing_data
from axolotl_spin.data.spread import auc
from axolotl_spin.disk.atomic import MARK
from axolotl_spin.game.head_to_head import head_to_head, play_before
from axolotl_spin.game.heldout_play import SCHEMA, measure, play_seed
from axolotl_spin.generation.chunks import iteration_seed
from axolotl_spin.settings.spin import SpinConfig

# -- which prompts ----------------------------------------------------------------------------------------------------


def rows(count: int, without_prompt: tuple[int, ...] = ()) -> Dataset:
    """Row i has the prompt [100 + i] and the answer [i, 6]; some are all answer."""
    ids = [[100 + i, i, 6] for i in range(count)]
    labels = [[100 + i if i in without_prompt else -100, i, 6] for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def chosen(dataset: Any, **settings: Any) -> list[int]:
    found = heldout_prompts(dataset, SpinConfig(**settings), 3)
    for row in found:
        assert row["prompt_ids"] == [100 + row["row"]] and row["chosen_ids"] == [row["row"], 6]
    return found["row"][:]


def test_the_first_of_a_fixed_order() -> None:
    """Neither the data's order nor another each time; fewer are the beginning of more; 64 without a number."""
    some = chosen(rows(200), eval_prompts=10)
    assert len(set(some)) == 10 and some != sorted(some)
    assert chosen(rows(200), eval_prompts=40)[:10] == some
    assert len(chosen(rows(200))) == 64
    assert sorted(chosen(rows(5))) == list(range(5))


def test_rows_without_a_prompt_are_left_out() -> None:
    found = chosen(rows(30, without_prompt=tuple(range(20))), eval_prompts=30)
    assert sorted(found) == list(range(20, 30))


def test_every_turn_where_training_has_every_turn() -> None:
    two = Dataset.from_dict({"input_ids": [[100, 7, 101, 8]], "labels": [[-100, 7, -100, 8]]})
    assert heldout_prompts(two, SpinConfig(turns="all"), 4)["prompt_ids"][:] == [[100], [100, 7, 101]]
    assert heldout_prompts(two, SpinConfig(), 4)["prompt_ids"][:] == [[100, 7, 101]]
    assert heldout_prompts(two, SpinConfig(turns="all", eval_prompts=1), 4)["prompt_ids"][:] == [[100]]


def test_nothing_to_play_on() -> None:
    assert heldout_prompts(None, SpinConfig(), 4) is None
    assert heldout_prompts(rows(9), SpinConfig(eval_prompts=0), 4) is None
    hopeless = rows(3, without_prompt=(0, 1, 2))
    assert heldout_prompts(hopeless, SpinConfig(), 4) is None
    with pytest.raises(ValueError, match=r"spin.eval_prompts: 2`, but none of the 3 held-out rows has a prompt"):
        heldout_prompts(hopeless, SpinConfig(eval_prompts=2), 4)


def test_prompts_without_room_for_the_humans_answer_are_left_out(tmp_path: Path) -> None:
    """The host cuts held-out rows by a length of their own; 9 and 10 words do not fit into 13 tokens, up to 8 do."""
    said = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 " * n}] for n in range(1, 11)]
    data = jsonl(tmp_path / "held.jsonl", [{"messages": row} for row in said])
    held = {"test_datasets": [{**data, "split": "train", "type": "chat_template"}], "eval_sequence_len": 64}
    run, meta, _ = load(tmp_path, sequence_len=13, **held)
    assert len(meta.eval_dataset) == 10
    assert sorted(len(ids) for ids in run.heldout["chosen_ids"][:]) == list(range(2, 10))
    with pytest.raises(ValueError, match=r"none of the 10 held-out rows has a prompt .* within `sequence_len: 5`"):
        heldout_prompts(meta.eval_dataset, SpinConfig(eval_prompts=2), 5)


@pytest.mark.parametrize("cfg", [{"val_set_size": 0.1}, {"val_set_size": 3}, {"test_datasets": [{"path": "x"}]}])
def test_held_out_data_is_asked_for_by_name(cfg: dict[str, Any]) -> None:
    refuse_missing_data(SpinConfig(eval_prompts=2), cfg)
    refuse_missing_data(SpinConfig(), {})
    with pytest.raises(ValueError, match=r"spin.eval_prompts: 2` needs held-out data, but `val_set_size` is 0"):
        refuse_missing_data(SpinConfig(eval_prompts=2), dict.fromkeys(cfg, 0))


# -- what is measured -------------------------------------------------------------------------------------------------


def test_auc_by_hand() -> None:
    """Human 1, 3 against own 2, 3: of four comparisons 3 > 2 is won and 3 = 3 is half won."""
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == 1.5 / 4
    assert auc(np.array([5.0, 6.0]), np.array([1.0])) == 1.0
    assert auc(np.array([1.0]), np.array([5.0, 6.0])) == 0.0
    same = np.array([0.5, 0.5, 2.0])
    assert auc(same, same) == 0.5


def test_auc_counts_every_comparison() -> None:
    generator = np.random.default_rng(0)
    human, own = generator.integers(0, 9, 40) / 4, generator.integers(0, 9, 25) / 4
    won = [(h > o) + (h == o) / 2 for h in human for o in own]
    assert auc(human, own) == pytest.approx(np.mean(won), abs=1e-12)


def test_distinct_2_by_hand() -> None:
    assert distinct_2([[1, 2, 1, 2], [1, 2]]) == 2 / 4  # 12 21 12, 12
    assert distinct_2([[1], []]) is None


def test_plays_are_drawn_with_numbers_of_their_own() -> None:
    trained_against = {iteration_seed(seed, iteration) for seed in (7, 8) for iteration in range(100)}
    plays = {play_seed(seed, number) for seed in (7, 8) for number in range(101)}
    assert len(plays) == 202 and not plays & trained_against


def played(own: list[list[int]], logps: list[tuple[float, float]], human: tuple[int, ...] = (5, 5, 5, 6)) -> pa.Table:
    made = [
        {"prompt": "", "human": "", "own": "", "prompt_ids": [1], "human_ids": human, "own_ids": ids,
         "human_logp": pair[0], "own_logp": pair[1], "finish_reason": "stop", "row": 0}
        for ids, pair in zip(own, logps, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=SCHEMA)


def test_measure_by_hand() -> None:
    """Human answers have 4 tokens: -1 and -2 nats per token. Own ones have 2 and 3: -0.5 and -2. 6 ends an answer."""
    figures = measure(played([[7, 6], [7, 8, 9]], [(-4.0, -1.0), (-8.0, -6.0)]), stop_token_ids=(6,))
    assert figures == pytest.approx(
        {
            "spin/heldout_length": 2.5,
            "spin/heldout_human_length": 4.0,
            "spin/heldout_margin": -0.25,  # -1 + 0.5 and -2 + 2
            "spin/heldout_auc": (0 + 1 + 0 + 0.5) / 4,
            # human answers exceed 1/2 and 1/4 of the own ones, own ones are exceeded by 0 and 3/4 of the human ones:
            # prompts move it by 1/2 + 0 and 1/4 + 3/4, each less twice 3/8
            "spin/heldout_auc_stderr": (2 * 0.25**2 / 2) ** 0.5,
            "spin/heldout_distinct_2": 1.0,  # of 78 and 89; 76 is an end
        }
    )


def test_what_cannot_be_told_is_left_out() -> None:
    figures = measure(played([[7, 6]], [(-4.0, math.nan)]), stop_token_ids=(6,))
    assert set(figures) == {"spin/heldout_length", "spin/heldout_human_length"}


# -- head to head -----------------------------------------------------------------------------------------------------


def compared(own: list[list[int]], human_logps: list[float]) -> pa.Table:
    return played(own, [(logp, -1.0) for logp in human_logps])


def test_head_to_head_by_hand() -> None:
    """Of 4 prompts two are likelier and one a tie; lengths are off by 2, 0, 1, 0 tokens where it was 1, 3, 1, 2."""
    new = compared([[1, 6], [1, 1, 1, 6], [1, 1, 6], [1, 1, 1, 1]], [-1.0, -2.0, -3.0, -4.0])
    old = compared([[1, 1, 6], [6], [1, 1, 1, 1, 6], [1, 6]], [-2.0, -2.0, -2.0, -5.0])
    assert head_to_head(new, old) == {"spin/heldout_wins": 2.5 / 4, "spin/heldout_length_wins": 2.5 / 4}
    assert head_to_head(old, new) == {"spin/heldout_wins": 1.5 / 4, "spin/heldout_length_wins": 1.5 / 4}
    assert head_to_head(compared([[6]], [math.nan]), compared([[6]], [-1.0])) == {"spin/heldout_length_wins": 0.5}


def test_only_the_play_before_on_the_same_prompts_counts(tmp_path: Path) -> None:
    new, path = compared([[6]], [-1.0]), tmp_path / "heldout.parquet"
    assert play_before(path, "mark", new) is None
    pq.write_table(new.replace_schema_metadata({MARK: b"mark"}), path)
    assert play_before(path, "mark", new) is not None and play_before(path, "another", new) is None
    assert play_before(path, "mark", new.set_column(3, "prompt_ids", pa.array([[2]], pa.list_(pa.int32())))) is None
    path.write_bytes(b"cut")
    assert play_before(path, "mark", new) is None


# -- in a run ---------------------------------------------------------------------------------------------------------

HELD_OUT = 6


@pytest.fixture(scope="module")
def train(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that trains a tiny model with a number of held-out prompts."""
    folder = tmp_path_factory.mktemp("heldout")

    def run(name: str, **spin: Any) -> host.Run:
        generation = {"max_new_tokens": 10, "batch_size": 4, **spin.pop("generation", {})}
        block = {"iterations": 2, "generation": generation, **spin}
        changes = {"output_dir": str(folder / name), "val_set_size": HELD_OUT, "spin": block}
        return host.train({**host.config(folder), **changes}, by=warm)

    return run


@pytest.mark.host
def test_training_does_not_notice(train: Any) -> None:
    """With held-out play and without: the same answers, losses and weights, bit for bit."""
    without, played = train("without", eval_prompts=0), train("with")
    for iteration in range(2):
        assert played.pairs(iteration).equals(without.pairs(iteration))
    assert played.losses() == without.losses()
    weights, others = (load_file(run.out / "model.safetensors") for run in (played, without))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    # the last checkpoint is behind two plays
    states = [torch.load(run.out / "checkpoint-24" / "rng_state.pth", weights_only=False) for run in (played, without)]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"]) and states[0]["python"] == states[1]["python"]
    assert all(np.array_equal(a, b) for a, b in zip(states[0]["numpy"], states[1]["numpy"], strict=True))
    for iteration in range(2):
        assert not (without.out / "spin" / f"iteration-{iteration}" / "heldout.parquet").exists()
        assert not [name for name in without.metrics(iteration) if "heldout" in name]


@pytest.mark.host
def test_the_policy_answers_as_it_is_at_the_iterations_end(train: Any) -> None:
    """Greedy answers and log-probs are those of the saved model, computed here one sequence at a time."""
    run = train("greedy", generation={"temperature": 0})
    for iteration in range(2):
        model = AutoModelForCausalLM.from_pretrained(
            run.out / "spin" / f"iteration-{iteration}" / "model", dtype=torch.float32
        ).eval()
        rows = run.heldout(iteration).to_pylist()
        assert len(rows) == HELD_OUT and run.heldout(iteration).schema.names == SCHEMA.names
        margins = []
        for row in rows:
            prompt = torch.tensor([row["prompt_ids"]])
            settings = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 6}
            answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            assert answer[0, prompt.shape[1] :].tolist() == row["own_ids"]
            assert (row["finish_reason"] == "stop") == (row["own_ids"][-1] == 6)
            logps = [logp_of(model, row["prompt_ids"], row[f"{kind}_ids"]) for kind in ("human", "own")]
            assert [row["human_logp"], row["own_logp"]] == pytest.approx(logps, abs=1e-4)
            margins.append(logps[0] / len(row["human_ids"]) - logps[1] / len(row["own_ids"]))
        metrics = run.metrics(iteration)
        assert metrics["spin/heldout_margin"] == pytest.approx(np.mean(margins), abs=1e-4)
        assert metrics["spin/heldout_length"] == np.mean([len(row["own_ids"]) for row in rows])
        assert metrics["spin/heldout_human_length"] == np.mean([len(row["human_ids"]) for row in rows])


@torch.no_grad()
def logp_of(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """The chain rule over one unpadded sequence."""
    logps = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


@pytest.mark.host
def test_figures_are_logged_after_each_iteration_and_for_the_start_model(train: Any) -> None:
    run = train("logged")
    played = [row for row in run.logs() if "spin/heldout_auc" in row]
    assert [row["step"] for row in played] == [0, 8]  # the last checkpoint is older than the last play
    start, after = run.metrics(0), run.metrics(0)
    plays = [
        pq.read_table(run.out / "spin" / name / "heldout.parquet") for name in ("start", "iteration-0", "iteration-1")
    ]
    for iteration in range(2):
        wins = head_to_head(plays[iteration + 1], plays[iteration])
        assert set(wins) == {"spin/heldout_wins", "spin/heldout_length_wins"}
        assert wins == {name: run.metrics(iteration)[name] for name in wins}
    assert "spin/heldout_start_wins" not in start and played[1]["spin/heldout_wins"] == start["spin/heldout_wins"]
    for name in ("margin", "auc", "length", "human_length", "distinct_2"):
        assert played[0][f"spin/heldout_{name}"] == start[f"spin/heldout_start_{name}"]
        assert played[1][f"spin/heldout_{name}"] == after[f"spin/heldout_{name}"]
        assert f"spin/heldout_{name}" in run.metrics(1) and f"spin/heldout_start_{name}" not in run.metrics(1)
    # other answers each time: their seeds depend on the play, and the model is another
    assert run.heldout(0)["prompt_ids"] == run.heldout(1)["prompt_ids"]
    assert run.heldout(0)["own_ids"] != run.heldout(1)["own_ids"]
    assert "start: held-out play on 6 prompts" in run.output
    assert "iteration 1: held-out play on 6 prompts" in run.output
