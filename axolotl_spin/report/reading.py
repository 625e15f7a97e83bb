"""Reads what a run left on disk, whether it is complete, running or was killed."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import sys
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.disk.directory import ForeignFolderError, RunDirectory, check_own
from axolotl_spin.disk.printable import printable
from axolotl_spin.monitor.log import read_log
from axolotl_spin.run.identity import Identity
from axolotl_spin.run.plan import IterationPlan, read_iterations


class NoRunError(ValueError):
    """A folder holds no SPIN run, a file of it cannot be read, or something in it was not made by a run."""


@dataclass
class RunData:
    """A run as found on disk.

    Attributes:
        name: How the page calls it.
        directory: Its paths.
        plan: `plan.json`.
        iterations: The plan's iterations.
        about: `about.json`; empty where there is none.
        rows: `log.jsonl`, in the order in which they were logged.
        metrics: Each iteration's `metrics.json`, where there is one.
        best: `best.json`; empty where there is none.
        state: `complete`, `running`, `stopped`, or `unknown` where this system cannot tell.
        notes: What could not be read, in sentences.
    """

    name: str
    directory: RunDirectory
    plan: dict[str, Any]
    iterations: list[IterationPlan]
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    metrics: dict[int, dict[str, Any]]
    state: str
    notes: list[str]
    best: dict[str, Any]

    @property
    def step(self) -> int:
        """The last step that was logged, or at which the host ended training early."""
        steps = [*(row.get("step") for row in self.rows), (self.about.get("stopped") or {}).get("step")]
        return max((step for step in steps if isinstance(step, int)), default=0)

    @property
    def total_steps(self) -> int:
        return sum(entry.steps for entry in self.iterations)

    @property
    def standing(self) -> str:
        """Where the run stands, in words."""
        if self.state == "complete":
            ended = self.about.get("ended")
            if ended:
                return f"complete: {ended.get('step')} of {self.total_steps} steps, since {ended.get('why')}"
            return f"complete: {self.total_steps} steps"
        words = {"running": "running", "stopped": "stopped"}.get(self.state, "not complete")
        return f"{words}: step {self.step} of {self.total_steps}"

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings that hold for the whole run; see `Identity`."""
        return self.plan.get("fixed") or {}

    @property
    def loss_type(self) -> str:
        return self.fixed.get("spin.loss", "sigmoid")

    @property
    def same_prompts(self) -> bool:
        """Whether every iteration answers the same prompts, in the same order."""
        return not (self.fixed.get("spin.prompts_per_iteration") or self.starts_from_pairs)

    @property
    def starts_from_pairs(self) -> bool:
        """Whether iteration 0 trains on pairs that were given (`spin.initial_pairs`)."""
        return bool(self.fixed.get("spin.initial_pairs (pairs as token ids)"))

    @property
    def sft_weight(self) -> float:
        return self.fixed.get("spin.sft_weight") or 0.0

    def mark(self, iteration: int) -> str:
        """Returns the SHA-256 that identifies an iteration's opponent; its pairs carry it."""
        planned = self.plan.get("planned") or {}
        return Identity(self.fixed, planned, self.plan["iterations"]).before(iteration)

    def opponent(self, iteration: int) -> str:
        """Returns which model answered in an iteration."""
        if iteration == 0:
            adapter = self.fixed.get("lora_model_dir")
            model = str(self.fixed.get("base_model", "the base model"))
            return f"{model} with the adapter {adapter}" if adapter else model
        folder = self.directory.model(iteration - 1)
        kept = f", kept in {folder.relative_to(self.directory.root.parent)}" if folder.is_dir() else ""
        return f"the policy after iteration {iteration - 1}{kept}"

    @cached_property
    def training(self) -> dict[int, list[dict[str, Any]]]:
        """The logged rows of each iteration's optimizer steps that have metrics of pairs, in order."""
        found: dict[int, list[dict[str, Any]]] = {entry.iteration: [] for entry in self.iterations}
        ends = [entry.first_step + entry.steps for entry in self.iterations]
        for row in self.rows:
            step = row.get("step")
            if not isinstance(step, int) or not 0 < step <= ends[-1]:
                continue
            if number(row, "loss") is not None and number(row, "rewards/margins") is not None:
                found[self.iterations[bisect_left(ends, step)].iteration].append(row)
        return found


def number(row: dict[str, Any], name: str) -> float | None:
    """Returns a finite figure of a row, or None."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None


def read_run(output_dir: Path, complete: bool | None = None) -> RunData:
    """Reads all but the pairs of a run.

    Args:
        output_dir: The host's.
        complete: Of a run that this very process has ended, and whose lock it still holds: whether it counts as complete.
            Read from disk where it is None.

    Raises:
        NoRunError: There is no readable plan, or the folder has links in it.
    """
    directory, notes = RunDirectory(output_dir), []
    try:
        check_own(directory)
        plan = read_json(directory.plan)
        iterations = read_iterations(plan)
    except (ForeignFolderError, DamagedFileError) as error:
        raise NoRunError(str(error)) from error
    except FileNotFoundError as error:
        raise NoRunError(f"{output_dir} holds no SPIN run: there is no {directory.plan}") from error
    except (TypeError, ValueError) as error:
        raise NoRunError(printable(f"{directory.plan} is damaged: {error}")) from error

    def optional(path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except FileNotFoundError:
            return {}
        except DamagedFileError as error:
            notes.append(f"{error}: left out")
            return {}

    metrics = {entry.iteration: optional(directory.metrics(entry.iteration)) for entry in iterations}
    rows = read_log(directory.log)
    if not rows:
        rows, source = _rows_of_a_checkpoint(output_dir)
        if rows:
            notes.append(f"There is no {directory.log.name}; the curves are those of {source}.")
    ended = complete is not None
    if not ended:  # with fewer steps than planned where `spin.patience` ended it
        complete = bool(plan.get("completed_steps"))
    return RunData(
        name=str(output_dir),
        directory=directory,
        plan=plan,
        iterations=iterations,
        about=optional(directory.about),
        rows=rows,
        metrics={iteration: figures for iteration, figures in metrics.items() if figures},
        state="complete" if complete else "stopped" if ended else _state(directory.lock),
        notes=notes,
        best=optional(directory.best),
    )


def _rows_of_a_checkpoint(output_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns what the last checkpoint holds of the Trainer's rows, for a run made before there was a `log.jsonl`."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return [row for row in rows if isinstance(row, dict)], folder.name
    return [], ""


def _state(lock: Path) -> str:
    """Returns whether a process holds the run's lock, without taking it."""
    if not sys.platform.startswith("linux"):
        return "unknown"
    try:
        with lock.open("rb") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
            kind = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except FileNotFoundError:
        return "stopped"
    except OSError:  # somebody else's file, or a filesystem without locks, on which a run goes on
        return "unknown"
    return "stopped" if kind == fcntl.F_UNLCK else "running"
