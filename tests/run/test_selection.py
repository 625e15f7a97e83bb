"""Which iteration is the best: the rule by hand, and standard errors beside other ways to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from axolotl_spin.data.spread import (
    Spread,
    auc,
    auc_spread,
    distance_from_half,
    nll_per_token,
    stderr_of_difference,
)
from axolotl_spin.run.selection import Figure, Standing, judge

NAN = float("nan")


def figures(*values: float | None, stderr: float | None = 0.01) -> list[Figure]:
    return [Figure(value, stderr) for value in values]


def judged(*values: float | None, start: float | None = None, stderr: float | None = 0.01, **how: Any) -> Standing:
    return judge("eval_loss", figures(*values, stderr=stderr), Figure(start, stderr), **{"lower": True, **how})


# -- the rule ---------------------------------------------------------------------------------------------------------
# with a standard error of 0.01 each, that of a difference is 0.0141, and two of those are 0.0283


@pytest.mark.parametrize(
    ("values", "best", "verdicts"),
    [
        ((3.0, 2.9, 2.8), 2, ["first", "better", "better"]),
        ((3.0, 2.98, 2.96), 2, ["first", "noise", "better"]),  # steps within noise add up: the leader is what counts
        ((3.0, 2.98, 2.975), 0, ["first", "noise", "noise"]),
        ((3.0, 3.1, 2.9), 2, ["first", "worse", "better"]),
        ((3.0, 2.97171), 1, ["first", "better"]),  # by 0.02829 ...
        ((3.0, 2.97173), 0, ["first", "noise"]),  # ... and by 0.02827
        ((NAN, 3.0, None, 2.9), 3, ["missing", "first", "missing", "better"]),
        ((None, NAN), None, ["missing", "missing"]),
    ],
)
def test_who_leads(values: tuple[float, ...], best: int | None, verdicts: list[str]) -> None:
    standing = judged(*values)
    assert (standing.best, [one.verdict for one in standing.judged]) == (best, verdicts)


def test_more_is_better_where_a_task_says_so() -> None:
    assert judged(0.3, 0.4, lower=False).best == 1 and judged(0.3, 0.4, lower=True).best == 0


def test_without_standard_errors_any_difference_counts_and_none_is_claimed() -> None:
    standing = judged(3.0, 2.9999, start=3.1, stderr=None)
    assert standing.best == 1 and "0.1001 (no standard error is known)" in standing.lines()[0]


def test_what_is_said_of_noise_and_of_the_start_model() -> None:
    better, ahead = judged(2.9, 2.89, start=3.0).lines()
    assert better.startswith(
        "best by `eval_loss` (lower is better): iteration 0, 2.9000 ± 0.0100; better than the start"
    )
    assert better.endswith("model by 0.1000 ± 0.0141")
    assert ahead == "iteration 1 is ahead by 0.0100 ± 0.0141, which is noise: the earlier one leads"
    noise, worse = judged(2.99, start=3.0).lines()[1], judged(3.2, 3.1, start=3.0).lines()[1]
    assert (
        noise
        == "no iteration is better than the start model: iteration 0 is ahead of it by 0.0100 ± 0.0141, which is noise"
    )
    assert worse == "no iteration is better than the start model: iteration 1 is worse by 0.1000 ± 0.0141"
    assert judged(None).lines()[0].startswith("no iteration has a figure of `eval_loss`")
    assert judged(3.0, None).lines()[-1] == "iteration 1 has no figure, which counts as no better"


@pytest.mark.parametrize(
    ("values", "start", "ends_after"),
    [
        ((3.0, 2.9, 2.89, 2.88, 2.5), None, 3),  # noise is no better
        ((3.0, 2.9, 3.5, 2.8, 2.9, 2.9), None, 5),  # one that is worse, then a better one: it counts anew
        ((3.1, 3.2, 2.0), 3.0, 1),  # never better than the start model
        ((3.1, 3.05, 2.0), 3.0, 1),  # better than iteration 0, but not than the start model
        ((None, NAN, 2.0), None, 1),
        ((3.0, 2.9, 2.8), None, None),
    ],
)
def test_patience_of_two(values: tuple[float, ...], start: float | None, ends_after: int | None) -> None:
    ended = [count - 1 for count in range(1, len(values) + 1) if judged(*values[:count], start=start, patience=2).ended]
    assert (ended[0] if ended else None) == ends_after
    assert not judged(*values, start=start).ended


def test_as_json() -> None:
    found = judged(3.0, NAN, start=3.1, patience=1).to_json()
    assert (found["best"], found["start"], found["lower_is_better"]) == (0, {"value": 3.1, "stderr": 0.01}, True)
    first, second = found["iterations"]
    assert (first["verdict"], first["against"], first["paired"]) == ("better", "start", False)
    assert first["gain"] == pytest.approx(0.1) and first["gain_stderr"] == pytest.approx(0.01 * math.sqrt(2))
    assert second["value"] is None and second["verdict"] == "missing"
    assert (
        found["ended"]
        == "the last iteration was no better by `eval_loss` than what was there before (`spin.patience: 1`)"
    )


# -- standard errors --------------------------------------------------------------------------------------------------


def test_nll_by_hand() -> None:
    """Rows of 1 and 3 tokens with 2 and 2 nats: 1 a token; residuals 1 and -1; sqrt(2/1 * 2) / 4."""
    found = nll_per_token(np.array([2.0, 2.0]), np.array([1, 3]), np.array([5, 6]))
    assert found.value == 1.0 and found.stderr == pytest.approx(math.sqrt(2 * 2) / 4)


ROWS = 300


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Two models on the same rows, which are hard or easy to both; the second one is a little better."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 40, ROWS)
    hard = draw.normal(3, 0.8, ROWS)
    one, other = (tokens * (hard - gain + draw.normal(0, 0.2, ROWS)) for gain in (0.0, 0.05))
    return {"tokens": tokens, "one": one, "other": other, "keys": draw.permutation(ROWS)}


def bootstrapped(figure: Any, count: int, times: int = 2000) -> float:
    """The spread of a figure over rows drawn again with replacement, which uses none of our formulas."""
    draw = np.random.default_rng(1)
    return float(np.std([figure(draw.integers(0, count, count)) for _ in range(times)]))


def test_nll_beside_a_bootstrap(rows: dict[str, np.ndarray]) -> None:
    found = nll_per_token(rows["one"], rows["tokens"], rows["keys"])
    expected = bootstrapped(lambda at: rows["one"][at].sum() / rows["tokens"][at].sum(), ROWS)
    assert found.stderr == pytest.approx(expected, rel=0.08)


def test_a_difference_is_taken_row_by_row(rows: dict[str, np.ndarray]) -> None:
    """What rows have in common is gone: a fifth of the standard error that two sets of rows would have."""
    one, other = (nll_per_token(rows[name], rows["tokens"], rows["keys"]) for name in ("one", "other"))
    expected = bootstrapped(lambda at: (rows["one"][at] - rows["other"][at]).sum() / rows["tokens"][at].sum(), ROWS)
    assert stderr_of_difference(one, other) == pytest.approx(expected, rel=0.08)
    assert one.stderr and other.stderr and expected < math.hypot(one.stderr, other.stderr) / 3
    start, new = Figure(one.value, one.stderr, one), Figure(other.value, other.stderr, other)
    paired = judge("eval_loss", [new], start, lower=True)
    apart = judge("eval_loss", [Figure(other.value, other.stderr)], start, lower=True)
    assert [paired.judged[0].verdict, apart.judged[0].verdict] == ["better", "noise"]


def test_rows_are_known_in_any_order(rows: dict[str, np.ndarray]) -> None:
    one, other = (nll_per_token(rows[name], rows["tokens"], rows["keys"]) for name in ("one", "other"))
    order = np.random.default_rng(2).permutation(ROWS)
    shuffled = nll_per_token(rows["other"][order], rows["tokens"][order], rows["keys"][order])
    assert stderr_of_difference(one, shuffled) == pytest.approx(stderr_of_difference(one, other))
    fewer = nll_per_token(rows["other"][1:], rows["tokens"][1:], rows["keys"][1:])
    assert stderr_of_difference(one, fewer) is None


def delong(human: np.ndarray, own: np.ndarray) -> float:
    """DeLong's standard error as it is printed, for two samples that have nothing to do with each other."""
    wins = (human[:, None] > own).astype(float) + (human[:, None] == own) / 2
    parts = wins.mean(1), wins.mean(0)
    return math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))


@pytest.fixture(scope="module")
def plays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    hard = draw.normal(0, 1, ROWS)
    human = np.round(hard + draw.normal(0, 0.7, ROWS), 1)  # with ties
    return {
        "human": human,
        "own": np.round(hard + 0.4 + draw.normal(0, 0.7, ROWS), 1),
        "apart": draw.normal(0.4, 1.2, ROWS),
    }


def test_auc_beside_delong(plays: dict[str, np.ndarray]) -> None:
    found = auc_spread(plays["human"], plays["apart"])
    assert found.value == auc(plays["human"], plays["apart"])
    assert found.stderr == pytest.approx(delong(plays["human"], plays["apart"]), rel=0.08)


def test_auc_of_answers_to_the_same_prompts(plays: dict[str, np.ndarray]) -> None:
    """Answers to a prompt are alike, which narrows the spread: DeLong's formula for apart samples is too wide."""
    human, own = plays["human"], plays["own"]
    found = auc_spread(human, own)
    assert found.stderr == pytest.approx(bootstrapped(lambda at: auc(human[at], own[at]), ROWS, 600), rel=0.1)
    assert found.stderr is not None and found.stderr < 0.8 * delong(human, own)


def test_auc_leaves_out_what_was_not_answered(plays: dict[str, np.ndarray]) -> None:
    human, own = plays["human"].copy(), plays["own"].copy()
    answered = np.arange(ROWS) % 5 != 0
    found = auc_spread(human, own, answered)
    own[~answered] = NAN
    assert found.value == auc(human[answered], own[answered]) == auc_spread(human, own, answered).value
    assert found.influence.mean() == pytest.approx(0) and not found.influence[~answered].any()
    assert found.stderr == pytest.approx(auc_spread(human[answered], own[answered]).stderr, rel=0.01)


def test_distance_from_half() -> None:
    keys = np.arange(2)
    below = distance_from_half(Spread(0.3, np.array([0.1, -0.1]), keys))
    assert below.value == pytest.approx(0.2) and below.influence.tolist() == [-0.1, 0.1]
    assert distance_from_half(Spread(0.7, np.array([0.1, -0.1]), keys)).influence.tolist() == [0.1, -0.1]


def test_an_auc_that_no_row_moves_has_no_standard_error() -> None:
    assert auc_spread(np.array([1.0, 2.0]), np.array([5.0, 6.0])).stderr is None
    assert nll_per_token(np.array([1.0]), np.array([1]), np.array([1])).stderr is None
