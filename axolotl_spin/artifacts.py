"""What a run leaves in `OUTPUT_DIR/spin/`, and how: every file appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @property
    def log(self) -> Path:
        """What the Trainer logged, a row a line."""
        return self.root / "log.jsonl"

    @property
    def about(self) -> Path:
        """What ran and on what."""
        return self.root / "about.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def lock(self) -> Path:
        """Held by the process that writes here."""
        return self.root / "run.lock"

    def iteration(self, iteration: int) -> Path:
        return self.root / f"iteration-{iteration}"

    def pairs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "pairs.parquet"

    def staged(self, iteration: int) -> Path:
        """What the ranks map into memory of the pairs while the iteration lasts."""
        return self.iteration(iteration) / ".pairs.arrow"

    def metrics(self, iteration: int) -> Path:
        return self.iteration(iteration) / "metrics.json"

    def heldout(self, iteration: int) -> Path:
        """The held-out play of the model that the iteration's training resulted in."""
        return self.iteration(iteration) / "heldout.parquet"

    def model(self, iteration: int) -> Path:
        return self.iteration(iteration) / "model"

    def opponent(self, iteration: int) -> Path:
        """The policy as it answers, for an engine; gone once it has."""
        return self.iteration(iteration) / ".opponent"

    def engine(self, iteration: int, engine: int) -> Path:
        """What an engine is asked and tells, and its log; gone once it has answered, and at the next start."""
        return self.iteration(iteration) / f".engine-{engine}"

    def chunk(self, iteration: int, chunk: int) -> Path:
        """A finished piece of an iteration's generation; gone once `pairs.parquet` holds it."""
        return self.iteration(iteration) / "chunks" / f"{chunk:06d}.parquet"


def check_output_dir(output_dir: str) -> None:
    """Checks that a run can write to its folder, before anything else is done.

    Args:
        output_dir: The host's key.

    Raises:
        OSError: It cannot be made or written to; names the key.
    """
    probe = _aside(Path(output_dir) / "probe")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        message = (
            f"`output_dir: {output_dir}` cannot be written to ({os.strerror(error.errno or 0)}): choose another folder"
        )
        raise OSError(error.errno, message) from error


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says what to do where a full disk or a read-only folder stops a write, by whichever library.

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
        aside = _aside(path)
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


def _aside(path: Path) -> Path:
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
    gone = _aside(root / path.name)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Removes what a killed run left half written: the dotted names that this module writes aside.

    Args:
        root: The `spin` folder of a run that no process is writing to.
    """
    for pattern in (".*", "iteration-*/.*", "iteration-*/chunks/.*"):
        for path in root.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole file (see `write_whole`)."""
    text = json.dumps(value, indent=2) + "\n"
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


class DamagedFileError(ValueError):
    """An artifact is cut, empty, corrupt, or not what its name says."""


class ForeignFileError(ValueError):
    """An artifact is whole, but belongs to another run or another iteration."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON artifact.

    Raises:
        DamagedFileError: The file is not a JSON object; names it.
        FileNotFoundError: There is no such file.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{path} is damaged (a JSON object was expected)")
    return value
