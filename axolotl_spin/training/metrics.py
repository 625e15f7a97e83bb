"""Averages over pairs between two logs, kept on the device, and the losses of an iteration's first and last step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from axolotl_spin.training.loss import SpinLoss

# names of the metrics, as TRL's preference trainers call them
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class PairMetrics:
    """Sums over one rank's pairs; nothing is read back from the device before someone asks.

    Args:
        first_step: The iteration's first global step.
    """

    def __init__(self, first_step: int):
        self._first_step = first_step
        self._sums: Tensor | None = None  # (metrics + 1,), the last is the number of pairs
        # (global step, sum of its losses and number of its pairs)
        self._first: tuple[int, Tensor] | None = None
        self._last: tuple[int, Tensor] | None = None

    def add(self, step: int, result: SpinLoss, chosen_logps: Tensor, rejected_logps: Tensor, weight: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            step: The global step that it belongs to.
            result: Losses and rewards, (pairs,).
            chosen_logps: (pairs,) sums in nats.
            rejected_logps: (pairs,) sums in nats.
            weight: (pairs,) 0 for a pair that only fills the batch.
        """
        values = (
            result.chosen_rewards,
            result.rejected_rewards,
            result.chosen_rewards - result.rejected_rewards,
            (result.chosen_rewards > result.rejected_rewards).to(weight.dtype),
            chosen_logps.detach(),
            rejected_logps.detach(),
            torch.ones_like(weight),
        )
        sums = torch.stack([(value * weight).sum() for value in values])
        self._sums = sums if self._sums is None else self._sums + sums
        losses = torch.stack([(result.losses.detach() * weight).sum(), weight.sum()])
        if self._last is not None and self._last[0] == step:
            losses = losses + self._last[1]
        self._last = (step, losses)
        if step == self._first_step:
            self._first = self._last

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the averages over all pairs of all ranks since the last call; empty where there were none.

        Args:
            reduce: Sums a tensor over the ranks; every rank must call.
        """
        if self._sums is None:
            return {}
        *totals, pairs = reduce(self._sums).tolist()
        self._sums = None
        return {name: total / pairs for name, total in zip(PAIR_METRICS, totals, strict=True)}

    def first_loss(self, reduce: Callable[[Tensor], Tensor]) -> float | None:
        """Returns the mean loss per pair of the iteration's first step; None where a resume came after it."""
        return _mean(self._first, reduce)

    def last_loss(self, reduce: Callable[[Tensor], Tensor]) -> float | None:
        """Returns the mean loss per pair of the latest step."""
        return _mean(self._last, reduce)

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Returns everything as plain JSON, summed over the ranks, for `restore`.

        Args:
            reduce: Sums a tensor over the ranks; every rank must call.
        """

        def summed(losses: tuple[int, Tensor] | None) -> list | None:
            return None if losses is None else [losses[0], reduce(losses[1]).tolist()]

        sums = None if self._sums is None else reduce(self._sums).tolist()
        return {"sums": sums, "first": summed(self._first), "last": summed(self._last)}

    def restore(self, state: dict[str, Any], device: torch.device, main: bool) -> None:
        """Goes on from a `state`.

        Args:
            state: As saved.
            device: Where the losses are computed.
            main: Whether this is the rank that takes the sums; the others start from zero.
        """

        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device) * float(main)

        self._sums = None if state["sums"] is None else tensor(state["sums"])
        first, last = state["first"], state["last"]
        self._first = None if first is None else (first[0], tensor(first[1]))
        self._last = None if last is None else (last[0], tensor(last[1]))


def _mean(losses: tuple[int, Tensor] | None, reduce: Callable[[Tensor], Tensor]) -> float | None:
    if losses is None:
        return None
    total, pairs = reduce(losses[1]).tolist()
    return total / pairs
