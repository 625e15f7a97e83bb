"""What a run reports: a record per iteration, `metrics.json`, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from axolotl.utils.logging import get_logger
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.printable import printable
from axolotl_spin.monitor.benchmarks import is_number, terminal_columns
from axolotl_spin.monitor.metrics import HELD_OUT, METRICS, start_figures
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


def read_best(directory: RunDirectory) -> dict[str, Any]:
    """Reads `best.json`; nothing where there is none, or a damaged one, which is named."""
    found = read_metrics([directory.best])
    return found[0] if found else {}


def iteration_table(metrics: list[dict[str, Any]], best: dict[str, Any] | None = None) -> Table:
    """Lays out the iterations' `metrics.json`, one row each; where it is known, after a row of the start model's.

    Columns of held-out play and of benchmarks are left out of a run without them.

    Args:
        metrics: Of each iteration.
        best: `best.json`; a star marks the best iteration.
    """
    start = start_figures(metrics[0]) if metrics else {}
    rows = [("start", start)] if start else []
    leader = (best or {}).get("best")
    for figures in metrics:
        iteration = figures.get("spin/iteration")
        star = "* " if leader is not None and iteration == leader else ""
        rows.append((f"{star}{'?' if iteration is None else iteration}", figures))
    played = any(name.startswith(HELD_OUT) for _, figures in rows for name in figures)
    columns = [metric for metric in _COLUMNS if played or not metric.name.startswith(HELD_OUT)]
    looks: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "collapse_padding": True, "pad_edge": False}
    table = Table(title="Self-play iterations", header_style="bold", **looks)
    table.add_column("\niter", justify="right")
    for metric in columns:
        table.add_column(metric.heading, justify="right", no_wrap=True)
    benchmarks = terminal_columns(figures for _, figures in rows)
    for benchmark in benchmarks:
        table.add_column(printable(benchmark.heading), justify="right", no_wrap=True)
    for column in table.columns:
        column.vertical = "bottom"
    for label, figures in rows:
        cells = [m.form.format(figures[m.name]) if is_number(figures.get(m.name)) else "-" for m in columns]
        table.add_row(printable(label), *cells, *(benchmark.cell(figures) for benchmark in benchmarks))
    return table


def best_lines(best: dict[str, Any]) -> list[str]:
    """Returns what `best.json` says: which iteration is the best and what is noise."""
    lines = [str(line) for line in best.get("says") or []]
    return [f"* {lines[0]}", *lines[1:]] if lines and best.get("best") is not None else lines


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

    Nothing in a text is taken for markup, nor acted on by the terminal.

    Args:
        parts: Tables, whose texts are printable, and lines.
        file: Where to. Default: standard output.
    """
    console = Console(file=file, soft_wrap=True, markup=False, emoji=False)
    console.width = max(console.width, 160)
    for part in parts:
        console.print(printable(part) if isinstance(part, str) else part, highlight=False)


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        step: Optimizer steps by then.
        complete: Whether it is complete; why, where `spin.patience` ended it before its last step.
        final: Whose model the final one is, in words; empty: the last iteration's.
    """

    step: int
    complete: bool | str = True
    final: str = ""


def print_table(directory: RunDirectory, plan: Plan, command: str, adapter: str | None, saved: bool, end: End) -> None:
    """Prints the table of finished iterations, where everything is, and the next command to type.

    Args:
        directory: The run's.
        plan: Its iterations.
        command: How the user names the config.
        adapter: The host's `adapter`, or None for full fine-tuning.
        saved: Whether each iteration's model or adapter was kept.
        end: How it ended; the host may have ended it early.
    """
    metrics = read_metrics(directory.metrics(entry.iteration) for entry in plan.iterations)
    best = read_best(directory)
    output_dir, what = directory.root.parent, adapter or "model"
    lines = best_lines(best)
    if isinstance(end.complete, str):
        lines.append(f"complete after {end.step} of {plan.total_steps} steps: {end.complete}")
    lines.append(f"pairs and metrics: {directory.root}/iteration-*/{{pairs.parquet,metrics.json}}")
    if saved:
        lines.append(f"each iteration's {what}: {directory.root}/iteration-*/model")
    whose = f" ({end.final})" if end.final else ""
    lines.append(f"final {what}: {output_dir}{whose}" if end.complete else f"{what} of step {end.step}: {output_dir}")
    if directory.report.exists():
        lines.append(f"report, for a browser: {directory.report}")
    where = f"--lora-model-dir={output_dir}" if adapter else f"--base-model={output_dir}"
    lines.append(f"try it: axolotl inference {command} {where}")
    if not end.complete:
        lines.append(stopped_early(directory, plan, end.step))
        lines.append(f"go on: axolotl train {command}")
    print_wide(iteration_table(metrics, best), *lines)
