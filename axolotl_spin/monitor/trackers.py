"""A few held-out prompts with both answers, as a table for the trackers that the host reports to.

Scalars go through the host's logging; tables have no way there, so each tracker gets its own through its public interface.
The host's callbacks have begun its run by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from axolotl.utils.logging import get_logger
from transformers.integrations import TensorBoardCallback

LOG = get_logger(__name__)

NAME = "spin/heldout_samples"
# prompts in the table: the first of the held-out ones, so the same after each iteration
_ROWS = 8

Rows = list[dict[str, Any]]


def send_samples(trainer: Any, table: pa.Table, name: str) -> None:
    """Sends samples of a play to every tracker of the trainer that takes tables, from rank 0.

    Those are of its `report_to`, and SwanLab, which the host brings by a callback of its own. One that fails is warned of:
    training does not depend on it.

    Args:
        trainer: The host's trainer.
        table: Of held-out play (`play.SCHEMA`).
        name: Whose answers they are.
    """
    if not trainer.accelerator.is_main_process:
        return
    trackers = [tracker for tracker in trainer.args.report_to if tracker in _SENDERS]
    if "swanlab" not in trackers and _has_swanlab(trainer):
        trackers.append("swanlab")
    if not trackers:
        return
    for tracker in trackers:
        try:
            _SENDERS[tracker](trainer, sample_rows(table, name))
        except Exception as error:  # whatever a tracker raises: a server that is away, a full disk, a version's change
            LOG.warning(f"the held-out samples of {name} did not reach {tracker}: {type(error).__name__}: {error}")


def sample_rows(table: pa.Table, name: str) -> Rows:
    """Returns the first prompts with both answers, their tokens, and the margin in nats per token.

    Args:
        table: Of held-out play.
        name: Whose answers they are; in each row, since a tracker may show several plays together.
    """
    return [
        {
            "model": name,
            "prompt": row["prompt"],
            "human": row["human"],
            "own": row["own"],
            "human_tokens": len(row["human_ids"]),
            "own_tokens": len(row["own_ids"]),
            "margin": _per_token(row, "human") - _per_token(row, "own"),
        }
        for row in table.slice(0, _ROWS).to_pylist()
    ]


def _per_token(row: dict[str, Any], whose: str) -> float:
    """Returns an answer's log-prob in nats per token; an own answer may have none, where the human's has no end."""
    return row[f"{whose}_logp"] / max(1, len(row[f"{whose}_ids"]))


def markdown(rows: Rows) -> str:
    """Returns rows as a Markdown table, in which nothing of a text is taken for markup.

    Args:
        rows: One or more, all with the same keys.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}"
        text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        # each of these would mean something to Markdown
        text = "".join(f"&#{ord(sign)};" if sign in "|\\`*_[]$~" else sign for sign in text)
        return text.replace("\r\n", "\n").replace("\n", "<br>")

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _to_wandb(trainer: Any, rows: Rows) -> None:
    import wandb

    if wandb.run is None:
        raise RuntimeError("there is no run")
    data = [list(row.values()) for row in rows]
    wandb.log({NAME: wandb.Table(list(rows[0]), data), "train/global_step": trainer.state.global_step})


def _to_trackio(trainer: Any, rows: Rows) -> None:
    import pandas
    import trackio

    trackio.log({NAME: trackio.Table(dataframe=pandas.DataFrame(rows)), "train/global_step": trainer.state.global_step})


def _to_tensorboard(trainer: Any, rows: Rows) -> None:
    """The host's callback has the writer, and writes text for a metric that is a string."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs={NAME: markdown(rows)})


def _to_mlflow(trainer: Any, rows: Rows) -> None:
    """One table for the run: each play's rows are added to it."""
    import mlflow

    if mlflow.active_run() is None:
        raise RuntimeError("there is no active run")
    columns: Mapping[str, list[Any]] = {key: [row[key] for row in rows] for key in rows[0]}
    step = [trainer.state.global_step] * len(rows)
    mlflow.log_table({"step": step, **columns}, artifact_file=f"{NAME}.json")


def _to_comet(trainer: Any, rows: Rows) -> None:
    """A table for each play: Comet keeps tables as files."""
    import comet_ml

    experiment = comet_ml.get_global_experiment()
    if experiment is None:
        raise RuntimeError("there is no running experiment")
    data = [list(row.values()) for row in rows]
    experiment.log_table(f"{NAME}/step-{trainer.state.global_step:06d}.csv", data, headers=list(rows[0]))


def _has_swanlab(trainer: Any) -> bool:
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
    return any("SwanLab" in type(callback).__name__ for callback in callbacks)


def _to_swanlab(trainer: Any, rows: Rows) -> None:
    """A text, as its tables need a package of their own; it raises where there is no run, or is told so."""
    import swanlab

    if swanlab.get_run() is None:
        raise RuntimeError("there is no run")
    step = trainer.state.global_step
    swanlab.log({NAME: swanlab.Text(markdown(rows), caption=rows[0]["model"])}, step=step)


# by their names in `report_to`
_SENDERS: dict[str, Callable[[Any, Rows], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "tensorboard": _to_tensorboard,
    "mlflow": _to_mlflow,
    "comet_ml": _to_comet,
    "swanlab": _to_swanlab,
}
