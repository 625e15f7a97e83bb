"""What starts afresh at each iteration: the learning-rate schedule and the optimizer's state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from axolotl_spin.run.plan import IterationPlan, Plan

# builds the host's scheduler over an optimizer for one iteration
HostScheduler = Callable[[IterationPlan, torch.optim.Optimizer], LRScheduler]


def learning_rate_table(plan: Plan, host_scheduler: HostScheduler) -> list[float]:
    """Returns the learning rate of every step of the run, by the host's own scheduler restarted at each iteration.

    Args:
        plan: Steps and peak learning rate of each iteration.
        host_scheduler: Called once per iteration with an optimizer of one parameter at that iteration's peak rate.

    Returns:
        `plan.total_steps` learning rates.
    """
    rates: list[float] = []
    for entry in plan.iterations:
        # the momentum is there for schedulers that insist on cycling one
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=entry.learning_rate, momentum=0.9)
        scheduler = host_scheduler(entry, optimizer)
        for step in range(entry.steps):
            if step:  # none behind the last: `one_cycle` that is warmup alone would divide by the rest, which is 0
                optimizer.step()
                scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


class IterationSchedule(LRScheduler):
    """Plays a table of learning rates; its whole state is the step it is at.

    A parameter group that the host gives a rate of its own (`embedding_lr`, `lr_groups`, `loraplus_lr_ratio`) keeps
    its ratio to the base rate.

    Args:
        optimizer: The run's optimizer.
        rates: One learning rate per step; the last one stays after the end.
        base_rate: The host's `learning_rate`, to which the groups' initial rates refer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rates: list[float], base_rate: float):
        self._rates = rates
        self._base_rate = base_rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        rate = self._rates[min(self.last_epoch, len(self._rates) - 1)]
        return [initial * rate / self._base_rate for initial in self.base_lrs]

    def at(self, step: int) -> None:
        """Gives the optimizer a step's rates: where its state was loaded from a run whose plan ended here, or steps were
        skipped for gradients that overflow in fp16, which the Trainer counts and does not have the schedule count.

        Args:
            step: Of the run, from 0.
        """
        self.last_epoch = step
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Returns the state without the table and what its rates refer to, which each start gives anew."""
        return {key: value for key, value in super().state_dict().items() if key not in _OF_A_START}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a checkpoint was; its rates were those of a `learning_rate` that this start need not have."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key not in _OF_A_START})


# of a schedule: the table, and the rates to which it refers, the host's and the groups' (torch's name)
_OF_A_START = ("_rates", "_base_rate", "base_lrs")


class OptimizerStart:
    """What an optimizer holds before its first step: mostly nothing, but Muon marks its parameters there, Adagrad has its
    sums, Dion and others keep counters in their groups.

    Args:
        optimizer: Just made, not wrapped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._states = [
            (weight, {name: _kept(value) for name, value in state.items()}) for weight, state in optimizer.state.items()
        ]
        self._groups = [
            {name: _kept(value) for name, value in group.items() if name not in _NOT_STATE}
            for group in optimizer.param_groups
        ]

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer this start again.

        Args:
            optimizer: The one of the start, or one with its groups; it may have loaded a checkpoint since.
        """
        _drop_state(optimizer)
        weights = {weight for group in optimizer.param_groups for weight in group["params"]}
        for weight, state in self._states:
            if weight in weights:
                optimizer.state[weight] = {name: _again(value) for name, value in state.items()}
        self.restore_groups(optimizer)

    def restore_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer's groups what they held at this start, rates aside; see `restore`."""
        for group, first in zip(optimizer.param_groups, self._groups, strict=True):
            for name in [name for name in group if name not in first and name not in _NOT_STATE]:
                del group[name]
            group.update((name, _again(value)) for name, value in first.items())


def _drop_state(optimizer: torch.optim.Optimizer) -> None:
    """Has an optimizer make its state anew; a paged one (bitsandbytes) begins again in the pages that it has.

    Those are never freed: dropped, they would be as much again with each iteration. Its state begins as zeros, the codes of
    quantised values aside.
    """
    if not getattr(optimizer, "is_paged", False):
        optimizer.state.clear()
        return
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not name.startswith("qmap"):
                value.zero_()
        state["step"] = 0


# of a parameter group: what it steps, and what the schedule sets
_NOT_STATE = ("params", "lr", "initial_lr")


class _Filled(NamedTuple):
    """A tensor of one value throughout, kept as that alone: Adagrad's sums are as large as the model."""

    like: torch.Tensor
    value: torch.Tensor


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() > 1 and bool((value == value.flatten()[0]).all()):
        return _Filled(torch.empty_like(value, device="meta"), value.flatten()[0].clone())
    return copy.deepcopy(value)


def _again(value: Any) -> Any:
    if isinstance(value, _Filled):
        return torch.empty_like(value.like, device=value.value.device).copy_(value.value)
    return copy.deepcopy(value)


def tell_groups_apart(optimizer: Any, start: OptimizerStart) -> None:
    """Gives each group of an optimizer what is its own, after DeepSpeed has read it for another number of ranks.

    At stage 3 (DeepSpeed 0.18 and 0.19) all groups then have the first one's settings (`weight_decay`, say), and share one
    counter, which each of them would advance in a step.

    Args:
        optimizer: As the trainer holds it; see `restart_optimizer`.
        start: What its groups held when it was made.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    start.restore_groups(optimizer)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def restart_optimizer(optimizer: Any, start: OptimizerStart | None = None) -> None:
    """Puts an optimizer into the state it had before its first step; the weights stay.

    Most optimizers make their state when a parameter has none, so theirs is dropped: that is right for quantised and
    preconditioner states too, whose start is not zero. What was there before the first step is put back. DeepSpeed makes
    the state of its partitions when the engine starts and keeps references to it, so that is zeroed in place.

    Args:
        optimizer: As the trainer holds it: the optimizer, or accelerate's or DeepSpeed's wrapper around it.
        start: Of the optimizer; None where nothing was there.
    """
    sharded_by_deepspeed = False
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
        sharded_by_deepspeed |= type(optimizer).__module__.startswith("deepspeed.runtime")
    if not sharded_by_deepspeed:
        if start is not None:
            start.restore(optimizer)
        else:
            _drop_state(optimizer)
    else:
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value.zero_()
                elif isinstance(value, (int, float)) and not isinstance(value, bool):
                    state[key] = type(value)(0)
    for group in optimizer.param_groups:
        if isinstance(group.get("step"), torch.Tensor):
            group["step"].zero_()
        elif group.get("step") is not None:
            group["step"] = 0
