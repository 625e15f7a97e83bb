"""What a run shows in the terminal while it trains: a line for each log, clear of the host's progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.metrics import METRICS
from axolotl_spin.monitor.tables import iteration_table, print_wide, read_best, read_metrics
from axolotl_spin.run.plan import IterationPlan, Plan

# of a table between iterations; the run's last has all of them
_ROWS = 10

Shown = tuple[tuple[str, str, str], ...]

# metric, its name on the line, its format; in this order
_TRAINING: Shown = (
    *((metric.name, *metric.line) for metric in METRICS if metric.line),
    ("learning_rate", "lr", "{:.1e}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens/train_per_sec_per_gpu", "tokens/s", "{:.0f}"),
    ("memory/max_active (GiB)", "GiB", "{:.1f}"),
)
_EVALUATION: Shown = (
    ("eval_loss", "held-out NLL", "{:.4f}"),
    ("eval_loss_stderr", "±", "{:.4f}"),
    ("eval_ppl", "perplexity", "{:.4g}"),
    ("eval_runtime", "seconds", "{:.1f}"),
)


class TerminalLines(ProgressCallback):
    """The host's progress bar, with a readable line where it would show a dictionary of fifteen metrics.

    Trackers and the trainer's history get every metric under its own name all the same. While the bar is there, lines of
    the log do not run into it.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._clear_bar: list[tuple[logging.Handler, logging.Filter]] = []
        if self.training_bar is not None:
            for handler in _terminal_handlers():
                clear = _ClearBar(self.training_bar)
                handler.addFilter(clear)
                self._clear_bar.append((handler, clear))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handler, clear in self._clear_bar:
            handler.removeFilter(clear)
        super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = log_line(logs, state.global_step, state.max_steps)
        if line is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif line and self.training_bar is not None and state.is_world_process_zero:
            self.training_bar.write(line)


def log_line(logs: dict[str, Any], step: int, steps: int) -> str | None:
    """Returns a row that the trainer logs as one line.

    Args:
        logs: The row.
        step: The run's global step.
        steps: Of the whole run.

    Returns:
        The line; empty where other lines of the run tell the same (an iteration's phases, held-out play); None for a row
        of the host's own.
    """
    if "loss" in logs and "rewards/margins" in logs:
        shown = _TRAINING
    elif "eval_loss" in logs:
        shown = _EVALUATION
    else:
        return "" if any(name.startswith("spin/") for name in logs) else None
    figures = [f"{name} {form.format(logs[key])}" for key, name, form in shown if key in logs]
    # a machine without an accelerator has no figure of its memory
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", *(text for text in figures if text != "GiB 0.0")])


def _terminal_handlers() -> Iterable[logging.StreamHandler]:
    """Returns what writes the log to a terminal: the host sets handlers for itself and for all others."""
    handlers = [handler for name in (None, "axolotl") for handler in logging.getLogger(name).handlers]
    return [
        handler for handler in handlers if isinstance(handler, logging.StreamHandler) and _is_terminal(handler.stream)
    ]


def _is_terminal(stream: Any) -> bool:
    """Whether lines go to a terminal; a handler may hold no stream, or one that was closed."""
    return stream is not None and not getattr(stream, "closed", False) and stream.isatty()


class _ClearBar(logging.Filter):
    """Takes the bar off its line before a record is written there; its next update draws it below."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self._bar = bar

    def filter(self, record: logging.LogRecord) -> bool:
        self._bar.clear()
        return True


def show_lines(trainer: Any) -> None:
    """Puts `TerminalLines` in the place of the host's progress bar; where that is off (`disable_tqdm`), nothing changes.

    Args:
        trainer: The host's.
    """
    shown = trainer.pop_callback(ProgressCallback)
    if shown is not None:
        trainer.add_callback(TerminalLines(max_str_len=shown.max_str_len))


def show_table(directory: RunDirectory, plan: Plan, entry: IterationPlan) -> None:
    """Prints the table of iterations so far, of many the first and the last; progress bars are out of the way meanwhile.

    Call it on one rank.

    After the last iteration nothing is printed: the whole table comes at the run's end, behind all that the host says.

    Args:
        directory: The run's.
        plan: Its iterations.
        entry: The iteration that has just ended.
    """
    if entry.iteration + 1 == len(plan.iterations):
        return
    first = max(1, entry.iteration + 2 - _ROWS)  # beside iteration 0, which knows the start model
    metrics = read_metrics(directory.metrics(iteration) for iteration in (0, *range(first, entry.iteration + 1)))
    with tqdm.external_write_mode():
        print_wide(iteration_table(metrics, read_best(directory)))
