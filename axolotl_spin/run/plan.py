"""The plan: rows, steps, learning rates and betas of every iteration, fixed before step 1.

Row counts depend on the prompts and human answers alone, never on what was generated, so steps and
schedules are exact from the start and a resume can tell where it is from the global step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class IterationPlan:
    """One self-play iteration.

    Attributes:
        iteration: Counted from 0.
        rows: Pairs trained on, new and kept.
        new_rows: Pairs generated in this iteration, one per prompt that it answers; in iteration 0 those of
            `spin.initial_pairs`, if set.
        kept_rows: Pairs of earlier iterations that are trained on again.
        epochs: Passes over the rows; the last may be cut by the host's `max_steps`.
        steps_per_epoch: Optimizer steps in one whole pass.
        steps: Optimizer steps in this iteration.
        first_step: Optimizer steps of the run before this iteration.
        warmup_steps: Steps of learning-rate warmup at this iteration's start.
        learning_rate: Peak learning rate.
        beta: The paper's lambda.
        schedule: Steps over which the learning rate's schedule is laid out, where they are more than `steps`.
    """

    iteration: int
    rows: int
    new_rows: int
    kept_rows: int
    epochs: int
    steps_per_epoch: int
    steps: int
    first_step: int
    warmup_steps: int
    learning_rate: float
    beta: float
    schedule: int | None = None

    @property
    def schedule_steps(self) -> int:
        """Steps over which the learning rate's schedule is laid out; the first `steps` of them are taken."""
        return self.steps if self.schedule is None else self.schedule

    def to_json(self) -> dict[str, Any]:
        """Returns the iteration as plain JSON values, without `schedule` where runs made before it was there had none."""
        return {name: value for name, value in asdict(self).items() if name != "schedule" or value is not None}


def read_iterations(plan: dict[str, Any]) -> list[IterationPlan]:
    """Returns the iterations of a `plan.json`.

    Args:
        plan: Its content.

    Raises:
        ValueError: They are none, or not numbers in order: files and folders are named by them.
    """
    found = []
    for index, entry in enumerate(plan.get("iterations") or []):
        try:
            iteration = IterationPlan(**entry)
        except TypeError as error:
            raise ValueError(f"iteration {index}: {error}") from error
        for field in fields(iteration):
            value = getattr(iteration, field.name)
            kinds: tuple[type, ...] = (int, float) if field.type == "float" else (int,)
            empty = value is None and field.name == "schedule"
            if not empty and (type(value) not in kinds or not 0 <= value < 2**53):
                raise ValueError(f"iteration {index}: `{field.name}` is {value!r}")
        if iteration.iteration != index:
            raise ValueError(f"iteration {index} is called {iteration.iteration}")
        found.append(iteration)
    if not found:
        raise ValueError("it has no `iterations`")
    return found


@dataclass(frozen=True)
class Position:
    """Where a global step lies: the step within an epoch, the run's epoch, and the iteration."""

    iteration: int
    epoch: int
    step_in_epoch: int


@dataclass(frozen=True)
class Plan:
    """All iterations of a run.

    Attributes:
        iterations: In order.
        global_batch: Pairs in one optimizer step over all ranks.
        num_epochs: The host's `num_epochs`: epochs in each iteration.
    """

    iterations: tuple[IterationPlan, ...]
    global_batch: int
    num_epochs: int

    @property
    def total_steps(self) -> int:
        return sum(entry.steps for entry in self.iterations)

    @property
    def total_epochs(self) -> int:
        return sum(entry.epochs for entry in self.iterations)

    def of_epoch(self, epoch: int) -> IterationPlan:
        """Returns the iteration that the run's epoch (from 0) belongs to."""
        return self.iterations[min(epoch // self.num_epochs, len(self.iterations) - 1)]

    def first_epoch(self, entry: IterationPlan) -> int:
        """Returns the run's epoch (from 0) with which an iteration starts."""
        return entry.iteration * self.num_epochs

    def locate(self, global_step: int) -> Position:
        """Returns where `global_step` finished optimizer steps lead to: the next step's place in the run."""
        for entry in self.iterations:
            done = global_step - entry.first_step
            if done < entry.steps:
                epoch, step = divmod(done, entry.steps_per_epoch)
                return Position(entry.iteration, self.first_epoch(entry) + epoch, step)
        return Position(len(self.iterations), self.total_epochs, 0)

    def training_values(self, batches: int) -> tuple[int, int, int, int, int, int, int]:
        """Returns the whole run as `transformers.Trainer.set_initial_training_values` does.

        Args:
            batches: One rank's micro-batches in an epoch of the first iteration.
        """
        first = self.iterations[0]
        samples = sum(entry.rows * entry.epochs for entry in self.iterations)
        epochs, steps = self.total_epochs, self.total_steps
        return epochs, first.steps_per_epoch, first.rows, samples, self.global_batch, batches, steps

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values, as written to `plan.json`."""
        return {
            "global_batch": self.global_batch,
            "num_epochs": self.num_epochs,
            "total_steps": self.total_steps,
            "iterations": [entry.to_json() for entry in self.iterations],
        }


def warmup_steps(steps: int, *, warmup_steps: int | None, warmup_ratio: float | None) -> int:
    """Returns an iteration's warmup in steps, by the host's rule applied to the iteration instead of the run.

    Args:
        steps: Optimizer steps over which the iteration's schedule is laid out.
        warmup_steps: The host's `warmup_steps`, which wins.
        warmup_ratio: The host's `warmup_ratio`; without either, the host warms up 3% of the steps, at most 100.
    """
    if warmup_steps is not None:
        warmup = int(warmup_steps)
    elif warmup_ratio is not None:
        warmup = int(warmup_ratio * steps)
    else:
        warmup = min(int(0.03 * steps), 100)
    return min(2 if warmup == 1 else warmup, steps)  # the host never warms up for a single step


def make_plan(
    prompts: int,
    *,
    global_batch: int,
    num_epochs: int,
    history: int,
    betas: Sequence[float],
    learning_rates: Sequence[float],
    max_steps: int | None = None,
    warmup: dict[str, Any] | None = None,
    given: int | None = None,
    schedule_epochs: int | None = None,
) -> Plan:
    """Lays out the run.

    Args:
        prompts: Pairs generated in each iteration, one for each prompt that it answers.
        global_batch: Pairs in one optimizer step over all ranks.
        num_epochs: Epochs in each iteration.
        history: How many earlier iterations' pairs are kept.
        betas: One per iteration.
        learning_rates: One per iteration.
        max_steps: The host's cap on the whole run's optimizer steps; iterations beyond it are dropped.
        warmup: `warmup_steps` and `warmup_ratio` of the host's config.
        given: Pairs that iteration 0 is given (`spin.initial_pairs`) instead of answering the prompts.
        schedule_epochs: Epochs over which each iteration's schedule is laid out. Where `max_steps` cuts an iteration short,
            its schedule is cut in the same proportion. None: `num_epochs`.

    Raises:
        ValueError: There is nothing to train on, or the schedule is shorter than what is trained.
    """
    if prompts < 1:
        raise ValueError("no prompt is left to answer: check `datasets:`, `sequence_len` and `val_set_size`")
    schedule_epochs = schedule_epochs or num_epochs
    if schedule_epochs < num_epochs:
        raise ValueError(
            f"`spin.schedule_epochs: {schedule_epochs}` is less than `num_epochs: {num_epochs}`, so the learning rate "
            f"would have no value in the last epochs of an iteration: use {num_epochs} or more, or leave it out"
        )
    entries: list[IterationPlan] = []
    first_step = 0
    for iteration, (beta, learning_rate) in enumerate(zip(betas, learning_rates, strict=True)):
        new_rows = given if given is not None and iteration == 0 else prompts
        kept_rows = sum(earlier.new_rows for earlier in entries[max(0, iteration - history) :])
        rows = new_rows + kept_rows
        steps_per_epoch = math.ceil(rows / global_batch)
        steps = steps_per_epoch * num_epochs
        if max_steps and max_steps > 0:  # -1 is no cap, as for the host
            steps = min(steps, max_steps - first_step)
        if steps <= 0:
            break
        schedule = math.ceil(steps * schedule_epochs / num_epochs)
        entries.append(
            IterationPlan(
                iteration=iteration,
                rows=rows,
                new_rows=new_rows,
                kept_rows=kept_rows,
                epochs=math.ceil(steps / steps_per_epoch),
                steps_per_epoch=steps_per_epoch,
                steps=steps,
                first_step=first_step,
                warmup_steps=warmup_steps(schedule, **(warmup or {"warmup_steps": None, "warmup_ratio": None})),
                learning_rate=learning_rate,
                beta=beta,
                schedule=schedule if schedule > steps else None,
            )
        )
        first_step += steps
    return Plan(tuple(entries), global_batch, num_epochs)
