"""What a run reports: a record per iteration, `metrics.json`, and the table at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from rich import box
from rich.console import Console
from rich.table import Table

from axolotl_spin.artifacts import DamagedFileError, read_json
from axolotl_spin.plan import IterationPlan, Plan
from axolotl_spin.run import SpinRun

LOG = get_logger(__name__)


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
            self.evaluated_at = step

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`: figures under the names under which they are logged.

        `loss_first` and `loss_last` are the mean losses per pair of the iteration's first and last step, without
        `spin.sft_weight`'s part; `rewards/*` and `logps/*` are those of the last log.
        """
        return {name: value for name, value in sorted(self.figures.items()) if value is not None}

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
            parts.append(f"held-out NLL {figures['eval_loss']:.4f}")
        return " ".join(parts)


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
