"""What a run reports: a record per iteration, `metrics.json`, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from axolotl.utils.logging import get_logger
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.benchmarks import of_the_start, terminal_columns
from axolotl_spin.monitor.metrics import HELD_OUT, METRICS, START
from axolotl_spin.run.plan import Plan
from axolotl_spin.run.resume import stopped_early

LOG = get_logger(__name__)


# with all of them a table stays within 120 columns
_COLUMNS = [metric for metric in METRICS if metric.heading and not metric.page_only]


def read_metrics(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Reads those `metrics.json` that are there; a damaged one is named and left out."""
    found = []
    for path in paths:
        try:
            found.append(read_json(path))
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            LOG.warning(f"{error}: its figures are left out")
    return found


def iteration_table(metrics: list[dict[str, Any]]) -> Table:
    """Lays out the iterations' `metrics.json`, one row each; with held-out play or benchmarks, after a row of the start
    model's.

    Columns of held-out play and of benchmarks are left out of a run without them.
    """
    start = _start_row(metrics)
    rows = [("start", start)] if start else []
    rows += [(str(figures.get("spin/iteration", "?")), figures) for figures in metrics]
    played = any(name.startswith(HELD_OUT) for _, figures in rows for name in figures)
    columns = [metric for metric in _COLUMNS if played or not metric.name.startswith(HELD_OUT)]
    table = Table(
        title="Self-play iterations", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True
    )
    table.add_column("\niter", justify="right")
    for metric in columns:
        table.add_column(metric.heading, justify="right", no_wrap=True)
    benchmarks = terminal_columns(figures for _, figures in rows)
    for benchmark in benchmarks:
        table.add_column(benchmark.heading, justify="right", no_wrap=True)
    for column in table.columns:
        column.vertical = "bottom"
    for label, figures in rows:
        cells = [m.form.format(figures[m.name]) if figures.get(m.name) is not None else "-" for m in columns]
        table.add_row(label, *cells, *(benchmark.cell(figures) for benchmark in benchmarks))
    return table


def _start_row(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the start model's held-out play and benchmarks under the names that they have after an iteration."""
    first = metrics[0] if metrics else {}
    played = {name.replace(START, HELD_OUT): value for name, value in first.items() if name.startswith(START)}
    return {**played, **of_the_start(first)}


def plan_table(plan: Plan) -> Table:
    """Lays out what a run will do, one row per iteration."""
    table = Table(title=f"Plan: {plan.total_steps} steps of {plan.global_batch} pairs", header_style="bold")
    for heading in ("iteration", "pairs", "new", "kept", "epochs", "steps", "warmup", "learning rate", "beta"):
        table.add_column(heading, justify="right")
    for entry in plan.iterations:
        counts = (
            entry.iteration,
            entry.rows,
            entry.new_rows,
            entry.kept_rows,
            entry.epochs,
            entry.steps,
            entry.warmup_steps,
        )
        table.add_row(*map(str, counts), f"{entry.learning_rate:g}", f"{entry.beta:g}")
    return table


def print_wide(*parts: Any, file: TextIO | None = None) -> None:
    """Prints without breaking paths and tables that a narrow or absent terminal would break.

    Args:
        parts: Tables and lines.
        file: Where to. Default: standard output.
    """
    console = Console(file=file, soft_wrap=True)
    console.width = max(console.width, 160)
    for part in parts:
        console.print(part, highlight=False)


def print_table(directory: RunDirectory, plan: Plan, command: str, adapter: str | None, saved: bool, step: int) -> None:
    """Prints the table of finished iterations, where everything is, and the next command to type.

    Args:
        directory: The run's.
        plan: Its iterations.
        command: How the user names the config.
        adapter: The host's `adapter`, or None for full fine-tuning.
        saved: Whether each iteration's model or adapter was kept.
        step: Optimizer steps of the run by now; fewer than the plan's where the host ended it early.
    """
    metrics = read_metrics(directory.metrics(entry.iteration) for entry in plan.iterations)
    output_dir, what = directory.root.parent, adapter or "model"
    lines = [f"pairs and metrics: {directory.root}/iteration-*/{{pairs.parquet,metrics.json}}"]
    if saved:
        lines.append(f"each iteration's {what}: {directory.root}/iteration-*/model")
    stopped = step < plan.total_steps
    lines.append(f"{what} of step {step}: {output_dir}" if stopped else f"final {what}: {output_dir}")
    if directory.report.exists():
        lines.append(f"report, for a browser: {directory.report}")
    where = f"--lora-model-dir={output_dir}" if adapter else f"--base-model={output_dir}"
    lines.append(f"try it: axolotl inference {command} {where}")
    if stopped:
        lines.append(stopped_early(directory, plan, step))
        lines.append(f"go on: axolotl train {command}")
    print_wide(iteration_table(metrics), *lines)
