"""Rows are converted once: later starts, and other ranks, find the result in the cache of `datasets`.

What is found there was made by the same code from the same rows and settings; one process makes it while the others wait.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# behind a remedy that the host does not see: a changed file, or a key that does not name its folder of prepared rows
PREPARE_AGAIN = (
    "then have the rows prepared anew by `axolotl preprocess`: the host takes those that it has, and does not see such a "
    "change"
)


def map_rows(
    rows: Any,
    convert: Callable[..., dict[str, list]],
    *,
    code: Sequence[ModuleType],
    settings: Sequence[Any],
    features: Any,
    desc: str,
    batch_size: int = 1000,
) -> Any:
    """Converts rows a batch at a time, or takes them from the cache.

    Args:
        rows: A `datasets.Dataset`; all its columns go.
        convert: Returns the new columns of a batch of rows and their indices.
        code: The modules that decide what comes out: where one of them changes, the rows are converted again.
        settings: What else decides it, told apart by its text.
        features: Of the result (`datasets.Features`).
        desc: For the progress bar.
        batch_size: Rows.
    """
    from datasets.fingerprint import Hasher
    from filelock import FileLock

    parts = (rows._fingerprint, _version(code), *settings)
    fingerprint = Hasher.hash(tuple(str(part) for part in parts))
    folders = sorted({Path(file["filename"]).parent for file in rows.cache_files})
    # beside the rows' own files, unless that folder is shared read-only
    writable = bool(folders) and all(os.access(folder, os.W_OK) for folder in folders)
    arguments: dict[str, Any] = {
        "batched": True,
        "batch_size": batch_size,
        "with_indices": True,
        "remove_columns": rows.column_names,
        "features": features,
        "keep_in_memory": not writable,
        "new_fingerprint": fingerprint,
        "desc": desc,
    }
    if not writable:
        return rows.map(convert, **arguments)
    with FileLock(str(folders[0] / f"axolotl-spin-{fingerprint}.lock")):
        return rows.map(convert, **arguments)


def _version(code: Sequence[ModuleType]) -> str:
    digest = hashlib.sha256()
    for module in code:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()
