"""`evals.json`: what a model's benchmarks gave. It loads neither torch nor lm-eval, since the report reads it too."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from axolotl_spin.disk.atomic import DamagedFileError, read_json, write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.benchmarks import EVAL, EVAL_START, STDERR, written

# a child of the host's logger, without importing it
LOG = logging.getLogger(__name__)


def collect(
    found: dict[str, Any], *, run: str | None, limit: int | None, chat_template: bool, weights: str | None = None
) -> dict[str, Any]:
    """Returns the content of `evals.json`.

    Args:
        found: What `lm_eval.evaluate` returned.
        run: Identity of the run as far as the model depends on it; None where it has none.
        limit: Samples of each task; None for all.
        chat_template: Whether they were put into the chat template.
        weights: Digest of the model's, where it was asked in memory.

    Returns:
        These, and under `tasks` for each task or group: its version, how many samples it has, and for each metric value,
        standard error (None where lm-eval has none) and whether higher is better. A metric has lm-eval's name; where
        another filter than `none` gave it, its key there, as in `exact_match,strict-match`.
    """
    tasks = {}
    for task, figures in found["results"].items():
        metrics, better = {}, found["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith(STDERR) or not _is_number(value):
                continue
            if not math.isfinite(value):
                LOG.warning(f"{task}: {key} is {value}, and is left out")
                continue
            error = figures.get(f"{metric}{STDERR},{kind}")
            metrics[metric if kind == "none" else key] = {
                "value": float(value),
                "stderr": float(error) if _is_number(error) and math.isfinite(error) else None,
                "higher_is_better": better.get(metric) is not False,
            }
        if metrics:
            samples = sum(
                found["n-samples"][part]["effective"] for part in _parts(found, task) if part in found["n-samples"]
            )
            tasks[task] = {"version": found["versions"].get(task), "samples": samples, "metrics": metrics}
    return {"run": run, "weights": weights, "limit": limit, "chat_template": chat_template, "tasks": tasks}


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bool)) and hasattr(value, "__float__")


def _parts(found: dict[str, Any], task: str) -> list[str]:
    """Returns the tasks that a group consists of; a task by itself."""
    members = found.get("group_subtasks", {}).get(task, [])
    return [part for member in members for part in _parts(found, member)] if members else [task]


def read_evals(path: Path) -> dict[str, Any] | None:
    """Returns the content of an `evals.json`; None where there is none, or where it is damaged, which is logged."""
    try:
        value = read_json(path)
        if not isinstance(value.get("tasks"), dict):
            raise DamagedFileError(f"{path} is damaged (there are no `tasks`)")
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        LOG.warning(f"{error}: its figures are left out")
        return None
    return value


def same_model(known: dict[str, Any] | None, like: dict[str, Any]) -> bool:
    """Whether known results are of the same model, asked in the same way as others are.

    Args:
        known: Content of an `evals.json`, or None.
        like: The others, as far as they are known: `run`, `limit`, `chat_template`, and `weights` where they matter.
    """
    return known is not None and all(known.get(key) == value for key, value in like.items())


def holds(known: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether results hold all of these tasks, in these versions.

    Args:
        known: Content of an `evals.json`.
        wanted: The version of each task, by name.
    """
    return all(task in known["tasks"] and known["tasks"][task].get("version") == wanted[task] for task in wanted)


def write_evals(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Writes an `evals.json` as a whole file; results of other tasks of the same model, asked alike, stay.

    Args:
        path: Where.
        value: As `collect` gives it.

    Returns:
        What the file holds now.
    """
    known, like = read_evals(path), {key: value[key] for key in ("run", "limit", "chat_template")}
    if known is not None and same_model(known, like):
        digests = {weights for weights in (known.get("weights"), value["weights"]) if weights}
        if len(digests) <= 1:  # what was asked on disk has none
            value = {**value, "weights": next(iter(digests), None), "tasks": {**known["tasks"], **value["tasks"]}}
    write_json(path, value)
    return value


def figures(value: dict[str, Any], prefix: str = EVAL) -> dict[str, float]:
    """Returns results as metrics under their public names, each with its standard error where it has one.

    Args:
        value: Content of an `evals.json`.
        prefix: `EVAL`, or `EVAL_START` for the start model's in iteration 0's `metrics.json`.
    """
    found = {}
    for task, entry in value["tasks"].items():
        for metric, figure in entry["metrics"].items():
            name = f"{prefix}{task}/{metric}"
            found[name] = figure["value"]
            if figure["stderr"] is not None:
                found[f"{name}{STDERR}"] = figure["stderr"]
    return found


def note_in_metrics(directory: RunDirectory, iteration: int | None, value: dict[str, Any]) -> None:
    """Puts results that were made after a run into its `metrics.json`, from which table and page are made.

    Args:
        directory: The run's.
        iteration: The model's; None for the start model, whose figures stand with iteration 0's.
        value: Content of its `evals.json`.
    """
    path, prefix = directory.metrics(iteration or 0), EVAL if iteration is not None else EVAL_START
    try:
        known = read_json(path)
    except (FileNotFoundError, DamagedFileError):
        return
    kept = {name: figure for name, figure in known.items() if not name.startswith(prefix)}
    write_json(path, dict(sorted({**kept, **figures(value, prefix)}.items())))


def summary(value: dict[str, Any]) -> str:
    """Returns results on one line, for people."""
    parts = []
    for task, entry in value["tasks"].items():
        shown = [
            f"{metric} {written(figure['value'], figure['stderr'])}" for metric, figure in entry["metrics"].items()
        ]
        parts.append(f"{task} {', '.join(shown)}")
    return "; ".join(parts)
