"""What a run leaves in `OUTPUT_DIR/spin/`, and how: every file appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from axolotl_spin.disk.printable import printable


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says what to do where a full disk, a read-only folder or a mount stops a write, by whichever library.

    Args:
        path: What is being written.

    Raises:
        OSError: With the same `errno`, and a message that names the way out.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and torch.save have errors of their own
        text = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "file write failed")
        if number in (errno.ENOSPC, errno.EDQUOT) or any(sign in str(error) for sign in text):
            number = number or errno.ENOSPC
            why = "no space is left for it: free some, or have the quota raised, and start again"
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
            why = "the folder cannot be written to: choose another `output_dir`, or change its permissions"
        elif number in (errno.ENOSYS, errno.ENOTSUP):
            why = "this mount cannot do that (an object store's cannot rename): choose an `output_dir` on another disk"
        elif number == errno.EMFILE:
            why = (
                "too many files are open (raise `ulimit -n`), or an object store's mount cannot rename a folder of so many "
                "(choose an `output_dir` on another disk)"
            )
        else:
            raise
        message = f"{path} could not be written, because {why}. Everything finished is kept ({os.strerror(number)})"
        raise OSError(number, message) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file aside, flushes it to disk and renames it into place.

    Args:
        path: Where the file is to appear; missing folders are made.
        write: Writes the content to the path it is given.

    Raises:
        OSError: The disk is full or the folder is read-only; `path` is as it was before.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path_aside(path)
        try:
            write(aside)
            flush(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        flush(path.parent)


def publish_folder(aside: Path, path: Path) -> None:
    """Makes a folder that was filled aside appear whole: flushes its files to disk and renames it into place.

    Args:
        aside: The filled folder.
        path: Where it is to appear; nothing may be there yet.
    """
    with explained(path):
        for file in [*aside.rglob("*"), aside]:
            flush(file)
        os.replace(aside, path)
        flush(path.parent)


def path_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path, root: Path) -> None:
    """Removes a folder such that it is never seen in part: it is renamed away first.

    Args:
        path: What goes.
        root: The `spin` folder, on the same filesystem, whose leftovers `remove_leftovers` clears.
    """
    root.mkdir(parents=True, exist_ok=True)
    gone = path_aside(root / path.name)
    os.replace(path, gone)
    _remove(gone)


def _remove(path: Path) -> None:
    """Removes a file or a folder; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# what is written aside by this module, and what stands in an iteration's folder only while the iteration lasts
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}|\.pairs\.arrow|\.{1,2}opponent|\.model|\.engine-\d+|\.checkpoint-\d+")


def remove_leftovers(root: Path) -> None:
    """Removes what a killed run left half written; other dotted names, and what lies behind a link, are none of ours.

    Args:
        root: The `spin` folder of a run that no process is writing to.
    """
    for pattern in (".*", "start/.*", "iteration-*/.*", "iteration-*/chunks/.*"):
        for path in root.glob(pattern):
            inside = [root, *(root / part for part in path.relative_to(root).parents)]
            if _LEFTOVER.fullmatch(path.name) and not any(folder.is_symlink() for folder in inside):
                _remove(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole file (see `write_whole`)."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


# the key in a Parquet file's metadata under which lies what its content depends on
MARK = b"axolotl_spin"
# and the digest of the weights that made it
WEIGHTS = b"axolotl_spin_weights"


class DamagedFileError(ValueError):
    """An artifact is cut, empty, corrupt, or not what its name says.

    Args:
        message: What is wrong; it may quote the file.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class StaleFileError(DamagedFileError):
    """An artifact is whole and of this run, but was made by weights that this start does not have."""


class ForeignFileError(ValueError):
    """An artifact is whole, but belongs to another run or another iteration."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON artifact.

    Raises:
        DamagedFileError: The file is not a JSON object, or one too deep or with numbers too long; names it.
        FileNotFoundError: There is no such file.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged (a JSON object was expected)")
    return value
