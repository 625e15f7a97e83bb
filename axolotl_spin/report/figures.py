"""The figures of each iteration that a report judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_spin.report.answers import IterationAnswers
from axolotl_spin.report.reading import RunData, number
from axolotl_spin.settings.spin import LOSS_AT_START


@dataclass
class Figures:
    """What the rules look at, for one iteration.

    Attributes:
        iteration: The iteration.
        first_loss: What the loss is where policy and opponent are one.
        metrics: `metrics.json`.
        rows: Logged rows of its training, in order.
        done: Whether its training is over.
        distinct_2: Of own and of human answers; see `Answers`.
        normalized: Whether rewards are divided by the answers' tokens (`spin.length_normalized`).
        loss_type: `spin.loss`.
        sft_weight: `spin.sft_weight`.
        given: Whether its answers were given by `spin.initial_pairs`.
    """

    iteration: int
    first_loss: float
    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    done: bool
    distinct_2: tuple[float | None, float | None] = (None, None)
    normalized: bool = False
    loss_type: str = "sigmoid"
    sft_weight: float = 0.0
    given: bool = False

    def get(self, name: str) -> float | None:
        return number(self.metrics, name)

    def per_token(self, name: str) -> float | None:
        """Returns a reward of the last log as nats per token of the human answer: how far a log-prob has moved."""
        reward, beta = self.get(name), self.get("spin/beta")
        length = 1.0 if self.normalized else self.get("spin/chosen_length")
        return None if reward is None or not beta or not length else reward / beta / length


def collect(run: RunData, answers: Sequence[IterationAnswers]) -> list[Figures]:
    """Collects the figures of a run's iterations that have begun, in order."""
    distinct = {found.iteration: found.distinct_2 for found in answers}
    first = LOSS_AT_START.get(run.loss_type, LOSS_AT_START["sigmoid"])
    return [
        Figures(
            iteration=entry.iteration,
            first_loss=first,
            metrics=run.metrics[entry.iteration],
            rows=run.training[entry.iteration],
            done="spin/training_seconds" in run.metrics[entry.iteration],
            distinct_2=distinct.get(entry.iteration, (None, None)),
            normalized=bool(run.fixed.get("spin.length_normalized")),
            loss_type=run.loss_type,
            sft_weight=run.sft_weight,
            given=entry.iteration == 0 and run.starts_from_pairs,
        )
        for entry in run.iterations
        if entry.iteration in run.metrics
    ]
