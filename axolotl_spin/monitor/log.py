"""`spin/log.jsonl`: every row that the Trainer logs, one JSON object a line, while the run goes on.

The Trainer itself writes its rows with a checkpoint only. Each line is appended as it is logged; at a start the file is
made anew from the rows that the checkpoint holds, so that it ends as that of a run which was never stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from axolotl_spin.disk.atomic import explained, write_whole


def restart_log(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Makes the file anew, whole.

    Args:
        path: `log.jsonl`.
        rows: What was logged up to where the run starts, as the checkpoint has it.
    """
    text = "".join(map(_line, rows))
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row; it is in the file when this returns. Call it on one rank.

    Args:
        path: `log.jsonl`.
        row: As the Trainer keeps it, with `step` and `epoch`. Numbers that are NaN or infinite become null.

    Raises:
        OSError: The disk is full or the folder is read-only.
    """
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the rows; a last line that a killed run left half written is left out, and so is a damaged one.

    Args:
        path: `log.jsonl`; a missing file has no rows.
    """
    rows = []
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    rows.append(row)
    except FileNotFoundError:
        return []
    return rows


def _line(row: dict[str, Any]) -> str:
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(plain, default=float) + "\n"
