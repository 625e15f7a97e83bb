"""The learning rate of every step, and the optimizer's fresh start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from transformers import get_scheduler

from axolotl_spin.game.schedule import IterationSchedule, learning_rate_table, restart_optimizer
from axolotl_spin.run.plan import make_plan

PLAN = make_plan(
    8, global_batch=2, num_epochs=1, history=0, betas=[1, 1], learning_rates=[1.0, 0.1],
    warmup={"warmup_steps": 2, "warmup_ratio": None},
)  # fmt: skip


def host_scheduler(entry, optimizer):
    steps = entry.schedule_steps
    return get_scheduler("linear", optimizer, num_warmup_steps=entry.warmup_steps, num_training_steps=steps)


def test_each_iteration_warms_up_and_decays_from_its_own_peak() -> None:
    """Linear, 4 steps, 2 of warmup: 0, 1/2, 1, 1/2 of the peak; twice."""
    assert learning_rate_table(PLAN, host_scheduler) == pytest.approx([0, 0.5, 1, 0.5, 0, 0.05, 0.1, 0.05])


def test_an_iteration_takes_the_first_steps_of_a_longer_schedule() -> None:
    """Linear, 12 steps, 2 of warmup, of which 4 are taken: 0, 1/2, 1, 9/10 of the peak; twice."""
    plan = make_plan(
        8, global_batch=2, num_epochs=1, history=0, betas=[1, 1], learning_rates=[1.0, 0.1], schedule_epochs=3,
        warmup={"warmup_steps": 2, "warmup_ratio": None},
    )  # fmt: skip
    assert learning_rate_table(plan, host_scheduler) == pytest.approx([0, 0.5, 1, 0.9, 0, 0.05, 0.1, 0.09])


def test_one_cycle_of_warmup_alone() -> None:
    """Where the warmup is as long as an iteration, nothing is left of the cycle behind its last step."""
    rates = learning_rate_table(
        PLAN,
        lambda entry, optimizer: OneCycleLR(optimizer, entry.learning_rate, total_steps=entry.steps, pct_start=1.0),
    )
    assert rates[3] == pytest.approx(1.0) and rates[7] == pytest.approx(0.1) and rates[:4] == sorted(rates[:4])


def test_groups_keep_their_ratio_and_state_is_the_step_alone() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 4.0}], lr=2.0)
    schedule = IterationSchedule(optimizer, [1.0, 0.5, 0.25], base_rate=2.0)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert seen == [[1.0, 2.0], [0.5, 1.0], [0.25, 0.5], [0.25, 0.5]]
    assert not {"_rates", "_base_rate", "base_lrs"} & schedule.state_dict().keys()
    resumed = IterationSchedule(optimizer, [1.0, 0.5, 0.25], base_rate=2.0)
    resumed.load_state_dict({**schedule.state_dict(), "last_epoch": 0})
    resumed.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_schedule_refers_to_the_rates_of_its_own_start(older: bool) -> None:
    """The host's `learning_rate` may change where iterations are appended; earlier versions kept the groups' old rates."""

    def made(base_rate: float) -> tuple[torch.optim.Optimizer, IterationSchedule]:
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 4.0 * base_rate}]
        optimizer = torch.optim.SGD(groups, lr=base_rate)
        return optimizer, IterationSchedule(optimizer, [1.0, 0.5, 0.25], base_rate)

    first, schedule = made(2.0)
    second, resumed = made(0.5)
    second.load_state_dict(first.state_dict())  # whose groups have the first start's rates, as the Trainer loads them
    resumed.load_state_dict({**schedule.state_dict(), **({"base_lrs": schedule.base_lrs} if older else {})})
    resumed.at(1)
    assert [group["lr"] for group in second.param_groups] == [0.5, 2.0]
    resumed.step()
    assert [group["lr"] for group in second.param_groups] == [0.25, 1.0]


def test_after_steps_that_the_trainer_skipped_an_iteration_takes_its_own_rates() -> None:
    """In fp16 gradients overflow at the start: the Trainer counts such a step, and the schedule is not stepped."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [weight]}], lr=2.0)
    schedule = IterationSchedule(optimizer, [1.0, 0.5, 0.25, 0.125], base_rate=2.0)
    optimizer.step()
    schedule.step()  # of two steps
    schedule.at(2)
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 0.25
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> torch.Tensor:
    for index in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(index + 1))).square().sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restarted_optimizer_steps_like_a_new_one(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, 3)
    fresh_model = copy.deepcopy(model)
    kept_model = copy.deepcopy(model)
    fresh = steps(fresh_model, OPTIMIZERS[name](fresh_model.parameters()), 3)
    kept_optimizer = OPTIMIZERS[name](kept_model.parameters())
    kept_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = steps(kept_model, kept_optimizer, 3)
    restart_optimizer(optimizer)
    restarted = steps(model, optimizer, 3)
    assert torch.equal(restarted, fresh)
    assert not torch.equal(kept, fresh)  # else the comparison shows nothing


def test_restart_reaches_through_wrappers() -> None:
    from accelerate import Accelerator

    model = torch.nn.Linear(3, 2)
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    steps(model, wrapped, 1)
    assert wrapped.optimizer.state
    restart_optimizer(wrapped)
    assert not wrapped.optimizer.state
