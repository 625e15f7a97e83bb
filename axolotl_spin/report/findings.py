"""Finds among a run's iterations those that a rule of the guide is about, and holds the rules' thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from axolotl_spin.report.figures import Figures

LENGTH_DRIFT = 1.5  # own answers longer or shorter by this factor than the human's, and further off than at the start
CUT = 0.2  # share of answers cut at their limit
EMPTY = 0.05  # share of answers that say nothing
IDENTICAL = 0.2  # share of answers that equal the human's
COLLAPSE = 0.6  # distinct word pairs of own answers over those of iteration 0
CHOSEN_FALL = 0.02  # nats per token that the human answers lose within an iteration
SATURATED_LOSS = 0.1  # share of the first loss at which little gradient is left ...
SATURATED_MOVE = 0.05  # ... and nats per token by which the policy has moved until then, where beta is too high
FAR = 1.0  # nats per token by which a policy is far from its opponent
STILL_LOSS, STILL_ACCURACY = 0.98, 0.6  # share of the first loss, and accuracy, of a policy that hardly moved
EXHAUSTED_LOSS = 0.05  # share of the first loss from which on every pair is told apart
EXHAUSTED_REST = 1 / 3  # share of an iteration's logs that come after that
HELDOUT_RISE = 0.02  # relative rise of the held-out NLL over the best of the iterations before
SAME = 0.05  # distance from 0.5 at which the AUC says that human and own answers are alike
FIRST_LOSS = 0.05  # nats by which a first loss is off

Iterations = Sequence[Figures]
Value = Callable[[Figures], float | None]


def metric(name: str) -> Value:
    """Returns what reads a figure of `metrics.json`."""
    return lambda found: found.get(name)


def move(name: str) -> Value:
    """Returns what reads a reward as nats per token; see `Figures.per_token`."""
    return lambda found: found.per_token(name)


def each(value: Value, compare: Callable[[float, float], bool], limit: float) -> Callable[[Iterations], list[Figures]]:
    """Returns what finds the iterations in which a value is known and stands so to a limit."""
    return lambda figures: [f for f in figures if (now := value(f)) is not None and compare(now, limit)]


def most(value: Value, hits: Iterations) -> float:
    """Returns the largest value of some iterations."""
    return max(value(found) or 0.0 for found in hits)


def wrong_start(figures: Iterations) -> list[Figures]:
    """The first loss is not that of two equal models."""
    return [f for f in figures if (loss := f.get("loss_first")) is not None and abs(loss - f.first_loss) > FIRST_LOSS]


def collapsed(figures: Iterations) -> list[Figures]:
    """Own answers have lost much of their variety since iteration 0."""
    start = figures[0].distinct_2[0] if figures and figures[0].iteration == 0 and not figures[0].given else None
    return [f for f in figures[1:] if start and f.distinct_2[0] is not None and f.distinct_2[0] < COLLAPSE * start]


def lengths_ratio(found: Figures) -> float | None:
    """Returns the length of own answers over the human's."""
    own, human = found.get("spin/rejected_length"), found.get("spin/chosen_length")
    return None if not own or not human else own / human


def drifted(figures: Iterations) -> list[Figures]:
    """Own answers leave the human's length, further than at the start or to its other side."""
    start = lengths_ratio(figures[0]) if figures else None

    def drifts(now: float | None) -> bool:
        if start is None or now is None:
            return False
        off, before = abs(math.log(now)), abs(math.log(start))
        return off > math.log(LENGTH_DRIFT) and (off > before or (now > 1) != (start > 1))

    return [found for found in figures[1:] if drifts(lengths_ratio(found))]


def saturated(figures: Iterations) -> list[Figures]:
    """The loss is used up although the policy has hardly moved."""
    hits = []
    for found in figures:
        loss, moved = found.get("loss_last"), found.per_token("rewards/margins")
        if loss is None or moved is None:
            continue
        if loss < SATURATED_LOSS * found.first_loss and moved < SATURATED_MOVE:
            hits.append(found)
    return hits


def still(figures: Iterations) -> list[Figures]:
    """An iteration ends almost where it started."""
    hits = []
    for found in figures:
        loss, accuracy = found.get("loss_last"), found.get("rewards/accuracies")
        if not found.done or loss is None or accuracy is None:
            continue
        if loss > STILL_LOSS * found.first_loss and accuracy < STILL_ACCURACY:
            hits.append(found)
    return hits


def used_up(found: Figures) -> float | None:
    """Returns the share of an iteration's logs after which no loss is above the threshold; None of too few logs.

    With `spin.sft_weight` a logged loss has the human answers' NLL in it, which is never used up.
    """
    if found.sft_weight:
        return None
    losses = [row["loss"] for row in found.rows]
    above = [index for index, loss in enumerate(losses) if loss >= EXHAUSTED_LOSS * found.first_loss]
    return 1 - (above[-1] + 1 if above else 0) / len(losses) if len(losses) >= 6 else None


def best_before(figures: Iterations, place: int) -> float | None:
    """Returns the lowest held-out NLL before an iteration's training: of the iterations before it and the start model."""
    start = figures[0].get("spin/start_eval_loss")
    known = [start, *(found.get("eval_loss") for found in figures[:place])]
    return min((now for now in known if now is not None), default=None)


def risen(figures: Iterations) -> list[Figures]:
    """Held-out human answers are less likely than they were."""

    def rises(now: float | None, best: float | None) -> bool:
        return now is not None and best is not None and now > best * (1 + HELDOUT_RISE)

    return [found for place, found in enumerate(figures) if rises(found.get("eval_loss"), best_before(figures, place))]


def alike(figures: Iterations) -> list[Figures]:
    """The last iteration's held-out answers can hardly be told from the human's."""
    return [f for f in figures[-1:] if (auc := f.get("spin/heldout_auc")) is not None and abs(auc - 0.5) <= SAME]
