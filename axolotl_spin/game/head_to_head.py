"""Head to head: on how many held-out prompts a model came nearer to the human's answer than the model before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from axolotl_spin.run.selected import read_marked

_COLUMNS = ["prompt_ids", "human_ids", "own_ids", "human_logp"]


def head_to_head(new: pa.Table, old: pa.Table) -> dict[str, float]:
    """Compares two plays on the same prompts.

    Args:
        new: Of the newest model: `prompt_ids`, `human_ids`, `own_ids`, and `human_logp`, its own log-prob of the human
            answer in nats.
        old: Of the model before it, in the same order.

    Returns:
        `spin/heldout_wins`: the share of prompts whose human answer the newest model finds likelier than the model before
        did; `spin/heldout_length_wins`: the share of prompts on which its answer's length is nearer to the human's. A tie
        counts half. The first is left out where a log-prob is no number.
    """
    human = _lengths(new, "human_ids")
    figures = {}
    logps = [table["human_logp"].to_numpy() for table in (new, old)]
    if all(np.isfinite(values).all() for values in logps):
        figures["spin/heldout_wins"] = _wins(logps[0] - logps[1])  # both of the same tokens
    off = [np.abs(_lengths(table, "own_ids") - human) for table in (new, old)]
    figures["spin/heldout_length_wins"] = _wins(off[1] - off[0])
    return figures


def play_before(path: Path, mark: str, new: pa.Table) -> pa.Table | None:
    """Returns the play of the model before, where it is on disk, sound, and on the same prompts.

    Args:
        path: Its file.
        mark: What identifies that model.
        new: The newest play.
    """
    table = read_marked(path, _COLUMNS, mark, "there is no head to head with it")
    if table is None:
        return None
    same = all(table[name].equals(new[name]) for name in ("prompt_ids", "human_ids"))
    return table if same else None


def _wins(gain: np.ndarray) -> float:
    return float((gain > 0).mean() + (gain == 0).mean() / 2)


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    return pc.list_value_length(table[name]).to_numpy().astype(np.int64)
