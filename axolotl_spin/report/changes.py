"""What changed on held-out prompts: the human's answer, the one of the model before, and the newest, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from axolotl_spin.report.reading import RunData

# prompts on which the human answer became likelier the most, and as many on which it became less likely
_EACH = 4
_CHARACTERS = 1200
_COLUMNS = ["prompt", "human", "own", "prompt_ids", "human_ids", "own_ids", "human_logp"]


@dataclass
class Changes:
    """Two plays of a run on the same prompts.

    Attributes:
        before, newest: Whose answers they are.
        wins, length_wins: See `head_to_head`; None where they are not known.
        total: Prompts played on.
        prompts: Some of them, those that changed most, as plain values.
    """

    before: str
    newest: str
    wins: float | None
    length_wins: float | None
    total: int
    prompts: list[dict[str, Any]]


def read_changes(run: RunData) -> Changes | None:
    """Reads the newest iteration's play and the one before it; None where one of them is not on disk."""
    played = [entry.iteration for entry in run.iterations if run.directory.heldout(entry.iteration).exists()]
    if not played:
        return None
    newest = played[-1]
    before = newest - 1 if newest else None
    tables = [_read(run, run.directory.heldout(iteration)) for iteration in (before, newest)]
    if tables[0] is None or tables[1] is None or not tables[0]["prompt_ids"].equals(tables[1]["prompt_ids"]):
        return None
    old, new = (table.to_pylist() for table in tables if table is not None)
    gains = np.array(
        [(b["human_logp"] - a["human_logp"]) / max(1, len(b["human_ids"])) for a, b in zip(old, new, strict=True)]
    )
    order = np.argsort(-gains, kind="stable")
    picked = [*order[:_EACH], *order[_EACH:][-_EACH:]]
    figures = run.metrics.get(newest, {})
    return Changes(
        before="the start model" if before is None else f"iteration {before}",
        newest=f"iteration {newest}",
        wins=figures.get("spin/heldout_wins"),
        length_wins=figures.get("spin/heldout_length_wins"),
        total=len(new),
        prompts=[_prompt(old[index], new[index], float(gains[index])) for index in picked],
    )


def _prompt(old: dict[str, Any], new: dict[str, Any], gain: float) -> dict[str, Any]:
    answers = [("human", "human", new), ("before", "own", old), ("newest", "own", new)]
    found = {who: {"text": _cut(row[name]), "tokens": len(row[f"{name}_ids"])} for who, name, row in answers}
    return {"prompt": _cut(new["prompt"], end=True), "gain": gain, **found}


def _cut(text: str, end: bool = False) -> str:
    """Returns a text for the page; of a prompt its end says most."""
    if len(text) <= _CHARACTERS:
        return text
    return f"… {text[-_CHARACTERS:]}" if end else f"{text[:_CHARACTERS]} …"


def _read(run: RunData, path: Path) -> pa.Table | None:
    try:
        return pq.read_table(path, columns=_COLUMNS, page_checksum_verification=True)
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        run.notes.append(f"{path} is damaged ({str(error).splitlines()[0]}): left out.")
        return None
