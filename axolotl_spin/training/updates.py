"""Which of the trained weights an optimizer step changes: in half precision, small steps round to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# weights that are looked at on a rank, whatever the model's size; of each tensor this many at least
_SAMPLED, _OF_EACH = 2**18, 64
# where optimizers keep what rounding takes from a weight: optimi's Kahan sums, torchdistx's, flashoptim's extra bits
_REMAINDERS = ("kahan_comp", "compensation", "error_bits")


class UpdateSample:
    """A fixed sample of the weights that an optimizer adds its steps to, as they are before a step.

    Where fp32 copies of half-precision weights are kept (DeepSpeed), those are the copies: what a step adds to them is not
    lost, though the half-precision weight may not show it yet. Of sharded weights this rank's shards are sampled.

    Args:
        optimizer: As the trainer holds it, wrapped or not.
    """

    def __init__(self, optimizer: Any):
        self._optimizer, copies = _unwrapped(optimizer)
        held = copies or [weight for group in self._optimizer.param_groups for weight in group["params"]]
        held = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in held]  # FSDP2's DTensor
        self._weights = [weight.detach().view(-1) for weight in held if weight.numel()]
        total = sum(weight.numel() for weight in self._weights)
        generator = torch.Generator().manual_seed(0)
        self._places = []
        for weight in self._weights:
            count = max(_OF_EACH, _SAMPLED * weight.numel() // total)
            places = torch.randint(weight.numel(), (min(count, weight.numel()),), generator=generator)
            self._places.append(places.to(weight.device))
        self._before = self._values()

    def _values(self) -> list[Tensor]:
        return [weight[places] for weight, places in zip(self._weights, self._places, strict=True)]

    def counts(self) -> Tensor:
        """Counts this rank's weights after a step, those that it changed by the sample.

        Returns:
            (2, 2): of the weights in half precision and of the others, those changed and all.
        """
        counts = torch.zeros(2, 2)
        for weight, now, then in zip(self._weights, self._values(), self._before, strict=True):
            changed = (now != then).float().mean().cpu()
            counts[int(weight.dtype.itemsize >= 4)] += weight.numel() * torch.stack([changed, torch.ones(())])
        return counts

    @property
    def keeps_remainders(self) -> bool:
        """Whether what rounding takes from a step is not lost: the optimizer, after its first step, keeps it or rounds by
        chance."""
        kept = any(state.get(name) is not None for state in self._optimizer.state.values() for name in _REMAINDERS)
        return kept or getattr(self._optimizer, "bf16_stochastic_round", False)


def _unwrapped(optimizer: Any) -> tuple[Any, list[Tensor]]:
    """Returns the optimizer inside accelerate's and DeepSpeed's wrappers, and ZeRO-3's copies, which it holds only while
    it steps."""
    copies: list[Tensor] = []
    while True:
        copies += getattr(optimizer, "fp32_partitioned_groups_flat", None) or []
        if not hasattr(optimizer, "optimizer"):
            return optimizer, copies
        optimizer = optimizer.optimizer
