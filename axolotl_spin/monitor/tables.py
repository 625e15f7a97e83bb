"""What a run reports: a record per iteration, `metrics.json`, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.run.plan import Plan
from axolotl_spin.run.prepare import SpinRun

LOG = get_logger(__name__)


# heading in two lines, metric, format; with all of them a table stays within 120 columns
_COLUMNS = (
    ("loss\nfirst", "loss_first", "{:.4f}"),
    ("loss\nlast", "loss_last", "{:.4f}"),
    ("accu-\nracy", "rewards/accuracies", "{:.2f}"),
    ("\nmargin", "rewards/margins", "{:.3f}"),
    ("human\ntokens", "spin/chosen_length", "{:.1f}"),
    ("own\ntokens", "spin/rejected_length", "{:.1f}"),
    ("\ncut", "spin/truncated", "{:.0%}"),
    ("held-out\nNLL", "eval_loss", "{:.4f}"),
    ("held-out\nmargin", "spin/heldout_margin", "{:+.3f}"),
    ("held-out\nAUC", "spin/heldout_auc", "{:.3f}"),
    ("generate\ns", "spin/generation_seconds", "{:.1f}"),
    ("score\ns", "spin/scoring_seconds", "{:.1f}"),
    ("train\ns", "spin/training_seconds", "{:.1f}"),
)
_HELD_OUT = "spin/heldout_"


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
    """Lays out the iterations' `metrics.json`, one row each; with held-out play, after a row of the start model's.

    Columns of held-out play are left out of a run without it.
    """
    start = _start_row(metrics)
    rows = [("start", start)] if start else []
    rows += [(str(figures.get("spin/iteration", "?")), figures) for figures in metrics]
    played = any(name.startswith(_HELD_OUT) for _, figures in rows for name in figures)
    columns = [column for column in _COLUMNS if played or not column[1].startswith(_HELD_OUT)]
    table = Table(
        title="Self-play iterations", header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True
    )
    table.add_column("\niter", justify="right")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, figures in rows:
        cells = [form.format(figures[name]) if figures.get(name) is not None else "-" for _, name, form in columns]
        table.add_row(label, *cells)
    return table


def _start_row(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the start model's held-out play under the names that it has after an iteration."""
    prefix = f"{_HELD_OUT}start_"
    first = metrics[0] if metrics else {}
    return {name.replace(prefix, _HELD_OUT): value for name, value in first.items() if name.startswith(prefix)}


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


def print_wide(*parts: Any) -> None:
    """Prints to the terminal without breaking paths and tables that a narrow or absent terminal would break."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 160)
    for part in parts:
        console.print(part, highlight=False)


def print_table(run: SpinRun) -> None:
    """Prints the table of finished iterations, where everything is, and the next command to type."""
    paths = [run.directory.metrics(entry.iteration) for entry in run.plan.iterations]
    metrics = read_metrics(paths)
    output_dir = run.directory.root.parent
    lines = [f"pairs and metrics: {run.directory.root}/iteration-*/{{pairs.parquet,metrics.json}}"]
    if run.settings.save_iterations:
        lines.append(f"each iteration's {run.adapter or 'model'}: {run.directory.root}/iteration-*/model")
    lines.append(f"final {run.adapter or 'model'}: {output_dir}")
    if run.directory.report.exists():
        lines.append(f"report, for a browser: {run.directory.report}")
    where = f"--lora-model-dir={output_dir}" if run.adapter else f"--base-model={output_dir}"
    lines.append(f"try it: axolotl inference {run.command} {where}")
    print_wide(iteration_table(metrics), *lines)
