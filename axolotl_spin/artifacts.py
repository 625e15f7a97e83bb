"""What a run leaves in `OUTPUT_DIR/spin/`, and how: every file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunDirectory:
    """The paths of a run's artifacts below the host's `output_dir`.

    They stay out of `checkpoint-*`, which the host's rotation deletes.
    """

    def __init__(self, output_dir: str | Path):
        self.root = Path(output_dir) / "spin"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    def iteration(self, iteration: int) -> Path:
        return self.root / f"iteration-{iteration}"

    def pairs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "pairs.parquet"

    def metrics(self, iteration: int) -> Path:
        return self.iteration(iteration) / "metrics.json"

    def model(self, iteration: int) -> Path:
        return self.iteration(iteration) / "model"

    def chunk(self, iteration: int, chunk: int) -> Path:
        """A finished piece of an iteration's generation; gone once `pairs.parquet` holds it."""
        return self.iteration(iteration) / "chunks" / f"{chunk:06d}.parquet"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file aside, flushes it to disk and renames it into place.

    Args:
        path: Where the file is to appear; missing folders are made.
        write: Writes the content to the path it is given.

    Raises:
        OSError: The disk is full or the folder is read-only; `path` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    aside = Path(name)
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole file (see `write_whole`)."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Reads a JSON artifact.

    Raises:
        ValueError: The file is not JSON; names it and the way out.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and start again") from error
