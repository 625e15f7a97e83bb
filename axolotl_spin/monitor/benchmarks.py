"""How figures of benchmarks are called, and how they stand in tables: a value with its standard error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

# `spin/eval/<task>/<metric>`, and with `STDERR` its standard error; the start model's stand in iteration 0's `metrics.json`
# under names of their own
EVAL = "spin/eval/"
EVAL_START = "spin/eval_start/"
STDERR = "_stderr"
# columns of a table in a terminal; where there are more metrics, each task has its first
_COLUMNS = 4


@dataclass(frozen=True)
class EvalColumn:
    """A metric of a benchmark.

    Attributes:
        name: As it is logged.
        task: Of lm-eval.
        metric: As lm-eval calls it, with its filter where that is not `none`.
    """

    name: str
    task: str
    metric: str

    @property
    def heading(self) -> str:
        """Of a narrow column."""
        return "\n".join([self.task, *self.metric.split(",")])

    def cell(self, figures: Mapping[str, Any]) -> str:
        """Returns the metric's value with its standard error, as text; `-` where there is none."""
        value, error = figures.get(self.name), figures.get(f"{self.name}{STDERR}")
        return written(value, error if is_number(error) else None) if is_number(value) else "-"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a figure that was read is one; anything may stand in a file."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def eval_columns(rows: Iterable[Mapping[str, Any]], most: int | None = None) -> list[EvalColumn]:
    """Returns the metrics of benchmarks in some rows, in the order of their names.

    Args:
        rows: Figures under public names.
        most: Where there are more, the first of each task.
    """
    names = sorted({name for row in rows for name in row if name.startswith(EVAL) and not name.endswith(STDERR)})
    columns = []
    for name in names:
        task, _, metric = name.removeprefix(EVAL).rpartition("/")
        columns.append(EvalColumn(name, task, metric))
    if most is None or len(columns) <= most:
        return columns
    return list({column.task: column for column in reversed(columns)}.values())[::-1]


def terminal_columns(rows: Iterable[Mapping[str, Any]]) -> list[EvalColumn]:
    """Returns those that a table in a terminal has room for."""
    return eval_columns(rows, _COLUMNS)


def of_the_start(first: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the start model's figures under the names that they have after an iteration.

    Args:
        first: Iteration 0's `metrics.json`.
    """
    return {name.replace(EVAL_START, EVAL): value for name, value in first.items() if name.startswith(EVAL_START)}


def written(value: float, error: float | None) -> str:
    """Returns a value with its standard error, such as `0.512±0.031`; of large ones four digits."""
    parts = [value] if error is None else [value, error]
    return "±".join(f"{part:.3f}" if abs(value) < 1000 else f"{part:.4g}" for part in parts)
