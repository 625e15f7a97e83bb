"""The charts of a report that show benchmarks: each task over iterations, the start model first, with standard errors."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from axolotl_spin.monitor.benchmarks import STDERR, EvalColumn, eval_columns, of_the_start
from axolotl_spin.report.charts import Chart, short, styled
from axolotl_spin.report.reading import RunData, number

START = "start"
_ROLES = ("@own", "@human", "@third", "@phase0", "@phase1", "@phase3")


def benchmarks(runs: Sequence[RunData]) -> list[Chart]:
    """Draws a chart for each task.

    Args:
        runs: One, or several to compare.
    """
    figures = [_figures(run) for run in runs]
    tasks: dict[str, list[EvalColumn]] = {}
    for column in eval_columns(found for of_run in figures for found in of_run.values()):
        tasks.setdefault(column.task, []).append(column)
    return [_chart(index, task, tasks[task], runs, figures) for index, task in enumerate(tasks)]


def _figures(run: RunData) -> dict[str, dict[str, Any]]:
    """Returns what a run's models were measured at, under the name of each on the axis."""
    start = of_the_start(run.metrics.get(0, {}))
    return {START: start, **{str(iteration): found for iteration, found in sorted(run.metrics.items())}}


def _chart(
    index: int, task: str, columns: Sequence[EvalColumn], runs: Sequence[RunData], figures: Sequence[dict[str, Any]]
) -> Chart:
    data = []
    for place, of_run in enumerate(figures):
        for order, column in enumerate(columns):
            points = [(name, found) for name, found in of_run.items() if number(found, column.name) is not None]
            if not points:
                continue
            label, colour, dash = styled(
                runs, place, len(columns), order, html.escape(column.metric), _ROLES[order % len(_ROLES)]
            )
            errors = [number(found, f"{column.name}{STDERR}") for _, found in points]
            trace: dict[str, Any] = {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [name for name, _ in points],
                "y": [short(found[column.name]) for _, found in points],
                "name": label,
                "line": {"color": colour, "dash": dash},
            }
            if any(error is not None for error in errors):
                bars = [None if error is None else short(error) for error in errors]
                trace["error_y"] = {"type": "data", "array": bars, "color": colour, "thickness": 1, "width": 4}
            data.append(trace)
    names = [START, *(str(number) for number in range(max(len(run.iterations) for run in runs)))]
    layout: dict[str, Any] = {
        "xaxis": {
            "title": {"text": "iteration"},
            "type": "category",
            "categoryorder": "array",
            "categoryarray": names,
            "range": [-0.5, len(names) - 0.5],
        },
        "yaxis": {},
        "showlegend": len(data) > 1,
    }
    note = "The start model, and what each iteration resulted in; bars are one standard error to either side."
    return Chart(f"benchmark-{index}", f"Benchmark: {task}", note, data, layout)
