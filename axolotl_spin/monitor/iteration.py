"""What is known of the running iteration: figures and timings, kept in `metrics.json` and in every checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.tables import read_metrics
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.run.plan import IterationPlan
from axolotl_spin.training.metrics import PairMetrics


class IterationRecord:
    """Collects an iteration's figures while it runs.

    Args:
        plan: The iteration.
        figures: What is known when training starts, under public metric names.
        evaluated_at: Global step of the last evaluation, where there was one.
    """

    def __init__(self, plan: IterationPlan, figures: dict[str, float | None], evaluated_at: int | None = None):
        self.plan = plan
        self.figures = figures
        self.evaluated_at = evaluated_at

    def note(self, logs: dict[str, Any], step: int) -> None:
        """Takes what the trainer logs: the latest metrics of the pairs and the latest `eval_loss`.

        Args:
            logs: A row as logged.
            step: The run's global step.
        """
        if "rewards/margins" in logs:
            self.figures.update({k: v for k, v in logs.items() if k.startswith(("rewards/", "logps/"))})
        if "eval_loss" in logs:
            self.figures["eval_loss"] = logs["eval_loss"]
            self.figures["eval_loss_stderr"] = logs.get("eval_loss_stderr")
            self.evaluated_at = step

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`: figures under the names under which they are logged.

        `loss_first` and `loss_last` are the mean losses per pair of the iteration's first and last step, without
        `spin.sft_weight`'s part; `rewards/*` and `logps/*` are those of the last log. What is not finite is left out, as
        JSON has no NaN.
        """
        known = {name: value for name, value in sorted(self.figures.items()) if value is not None}
        return {name: value for name, value in known.items() if not isinstance(value, float) or math.isfinite(value)}

    def line(self) -> str:
        """Returns one line for the terminal, for the end of the iteration."""
        figures = self.figures
        parts = [f"iteration {self.plan.iteration}: trained {self.plan.steps} steps"]
        parts.append(f"in {figures['spin/training_seconds']:.1f} s")
        if "rewards/margins" in figures:
            first = figures.get("loss_first")
            parts.append(f"(loss {'?' if first is None else f'{first:.4f}'} -> {figures['loss_last']:.4f},")
            parts.append(f"accuracy {figures['rewards/accuracies']:.2f}, margin {figures['rewards/margins']:.4f})")
        if "eval_loss" in figures:
            stderr = figures.get("eval_loss_stderr")
            parts.append(f"held-out NLL {figures['eval_loss']:.4f}{'' if stderr is None else f' ± {stderr:.4f}'}")
        return " ".join(parts)


class Progress:
    """Collects an iteration's figures over all ranks; every rank makes the same calls.

    Args:
        directory: The run's.
        ranks: All of them.
    """

    def __init__(self, directory: RunDirectory, ranks: Ranks):
        self._directory = directory
        self._ranks = ranks
        self._record: IterationRecord | None = None
        self.metrics = PairMetrics(first_step=0)
        self._started = 0.0
        self._pending: dict[str, float] = {}

    @property
    def record(self) -> IterationRecord:
        """The running iteration's; after its end, until the next one begins, still its own."""
        assert self._record is not None
        return self._record

    @property
    def begun(self) -> bool:
        """Whether an iteration has begun, so that there is a `record`."""
        return self._record is not None

    def begin(self, entry: IterationPlan, figures: dict[str, Any]) -> None:
        """Starts an iteration's record, before its first step.

        Args:
            entry: The iteration.
            figures: Of its generation and scoring. Those of an earlier start that made the pairs are taken from
                `metrics.json`; what that start trained does not count.
        """
        known = read_metrics([self._directory.metrics(entry.iteration)])
        kept = {name: value for name, value in (known[0] if known else {}).items() if name.startswith("spin/")}
        # of what that start trained, or measured again by this one
        later = ("spin/training_seconds", "spin/updated_weights", "spin/heldout_", "spin/start_", "spin/eval")
        kept = {name: value for name, value in kept.items() if not name.startswith(later)}
        self._ranks.wait()
        self.metrics = PairMetrics(entry.first_step)
        self._record = IterationRecord(entry, {**kept, **figures})
        self._started = time.perf_counter()

    def end(self) -> dict[str, float]:
        """Closes an iteration after its last step; returns what is to be logged."""
        figures = self.record.figures
        seconds = figures["spin/training_seconds"] = time.perf_counter() - self._started
        figures.setdefault("loss_first", self.metrics.first_loss(self._ranks.sum))
        figures["loss_last"] = self.metrics.last_loss(self._ranks.sum)
        # with pair metrics where the host's logging interval left some out
        return {"spin/training_seconds": seconds, **self.metrics.take(self._ranks.sum)}

    def note(self, logs: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Keeps the figures of a row that is about to be logged.

        Args:
            logs: The row.
            step: The run's global step.

        Returns:
            The row; a training log's with the pair metrics, averaged over all pairs of all ranks since the last one.
        """
        record, row = self.record, dict(logs)
        if "loss" in row:
            row |= {**self.metrics.take(self._ranks.sum), **self._pending, "spin/iteration": record.plan.iteration}
            self._pending = {}
            if "loss_first" not in record.figures:
                record.figures["loss_first"] = self.metrics.first_loss(self._ranks.sum)
                self.write()
        record.note(row, step)
        return row

    def add(self, name: str, value: float) -> None:
        """Adds a figure of the running iteration; it is logged once, with the next row of training."""
        self.record.figures[name] = self._pending[name] = value

    def write(self) -> None:
        """Writes the iteration's `metrics.json` as far as it is known."""
        if self._ranks.main:
            write_json(self._directory.metrics(self.record.plan.iteration), self.record.to_json())

    def state(self) -> dict[str, Any]:
        """Returns everything as plain JSON, for a checkpoint."""
        return {
            "iteration": self.record.plan.iteration,
            "figures": self.record.to_json(),
            "pending": self._pending,
            "evaluated_at": self.record.evaluated_at,
            "metrics": self.metrics.state(self._ranks.sum),
            "training_seconds": time.perf_counter() - self._started,
        }

    def restore(self, state: dict[str, Any], entry: IterationPlan) -> None:
        """Goes on from a `state`.

        Args:
            state: As a checkpoint kept it.
            entry: The iteration it belongs to.
        """
        self._record = IterationRecord(entry, state["figures"], state["evaluated_at"])
        self._pending = dict(state.get("pending", {}))
        self.metrics = PairMetrics(entry.first_step)
        self.metrics.restore(state["metrics"], self._ranks.device, self._ranks.main)
        self._started = time.perf_counter() - state["training_seconds"]
