"""The paths of what a run leaves in `OUTPUT_DIR/spin/`."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from axolotl_spin.disk.atomic import path_aside
from axolotl_spin.disk.printable import printable


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
    def thumbnails(self) -> Path:
        """Small copies of the pictures that the report shows; only of runs on pictures."""
        return self.root / "thumbnails.parquet"

    @property
    def lock(self) -> Path:
        """Held by the process that writes here."""
        return self.root / "run.lock"

    @property
    def best(self) -> Path:
        """Which iteration is the best, and why."""
        return self.root / "best.json"

    @property
    def start(self) -> Path:
        """What is known of the model that the run starts from."""
        return self.root / "start"

    def of_model(self, iteration: int | None) -> Path:
        """What is known of the model that an iteration resulted in; of the start model without one."""
        return self.start if iteration is None else self.iteration(iteration)

    def iteration(self, iteration: int) -> Path:
        return self.root / f"iteration-{iteration}"

    def pairs(self, iteration: int) -> Path:
        return self.iteration(iteration) / "pairs.parquet"

    def staged(self, iteration: int) -> Path:
        """What the ranks map into memory of the pairs while the iteration lasts."""
        return self.iteration(iteration) / ".pairs.arrow"

    def metrics(self, iteration: int) -> Path:
        return self.iteration(iteration) / "metrics.json"

    def heldout(self, iteration: int | None) -> Path:
        """The held-out play of the model that the iteration's training resulted in, or of the start model."""
        return self.of_model(iteration) / "heldout.parquet"

    def eval_rows(self, iteration: int | None) -> Path:
        """Each held-out row's NLL under that model."""
        return self.of_model(iteration) / "eval_rows.parquet"

    def evals(self, iteration: int) -> Path:
        """The benchmarks of the model that the iteration's training resulted in."""
        return self.iteration(iteration) / "evals.json"

    @property
    def start_evals(self) -> Path:
        """The benchmarks of the model that the run starts from."""
        return self.root / "start" / "evals.json"

    def model(self, iteration: int) -> Path:
        return self.iteration(iteration) / "model"

    def opponent(self, iteration: int) -> Path:
        """The policy as it answers, for an engine; gone once it has."""
        return self.iteration(iteration) / ".opponent"

    def engine(self, iteration: int, engine: int) -> Path:
        """What an engine is asked and tells, and its log; gone once it has answered, and at the next start."""
        return self.iteration(iteration) / f".engine-{engine}"

    def chunks(self, iteration: int) -> Path:
        """What is finished of an iteration's generation; gone once `pairs.parquet` holds it."""
        return self.iteration(iteration) / "chunks"

    def chunk(self, iteration: int, chunk: int) -> Path:
        return self.chunks(iteration) / f"{chunk:06d}.parquet"

    def brought(self, checkpoint: Path) -> Path:
        """Where a node that does not see rank 0's folder has its checkpoint while a start reads it."""
        return self.root / f".{checkpoint.name}"


class ForeignFolderError(ValueError):
    """Something in a run's folder is neither a file nor a folder, so that no run made it."""


def check_own(directory: RunDirectory) -> None:
    """Refuses a `spin` folder with links and pipes in it: whoever made them chose what would be read or overwritten.

    A run makes plain files and folders alone. `replaced-N` is passed over: nothing in it is read or written again. The
    folder that `output_dir` names may itself be reached by links, which are the user's.

    Args:
        directory: The run's; it need not be there.

    Raises:
        ForeignFolderError: Names what was found.
    """
    found = next(_foreign(directory.root), None)
    if found is not None:
        raise ForeignFolderError(
            f"{printable(found)} is a link or a special file, which no run makes: what is read and written by that name "
            "would lie outside the run's folder. Put what it stands for in its place, or remove it; to have a run on "
            "another disk, name a folder there as `output_dir`"
        )


def _foreign(path: Path) -> Iterator[Path]:
    """Yields what is neither a file nor a folder, at and below a path."""
    with suppress(
        FileNotFoundError, PermissionError
    ):  # a run that goes on removes files; what cannot be read is not read
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            for name in sorted(os.listdir(path)):
                if not name.startswith("replaced-"):
                    yield from _foreign(path / name)
        elif not stat.S_ISREG(mode):
            yield path


def check_output_dir(output_dir: str) -> None:
    """Checks that a run can write to its folder and rename in it, before anything else is done.

    Args:
        output_dir: The host's key.

    Raises:
        OSError: It cannot be made or written to, or what is in it cannot be renamed; names the key.
    """
    probe, moved = (path_aside(Path(output_dir) / "probe") for _ in range(2))
    fault, way = "cannot be written to", "choose another folder"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
        (probe / "aside").touch()
        # mounts of object stores rename no files, or no folders that have something in them
        fault = "is on a mount that cannot rename files and folders, by which all appears whole"
        way = "write to a local disk or a POSIX filesystem, and copy from there"
        os.replace(probe / "aside", probe / "file")
        os.replace(probe, moved)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fault = "has no space left"
            way = (
                "free some, or have the quota raised, and start again: a run goes on from its last complete checkpoint. "
                f"What a stopped one can spare is {output_dir}/spin/iteration-*/.model, {output_dir}/spin/replaced-*, "
                'and a checkpoint whose spin.json says `"complete": false`'
            )
        message = f"`output_dir: {output_dir}` {fault} ({os.strerror(error.errno or 0)}): {way}"
        raise OSError(error.errno, message) from error
    finally:
        for path in (probe, moved):
            shutil.rmtree(path, ignore_errors=True)


def sign_of(output_dir: Path, launch: str, rank: int) -> Path:
    """Returns the file that a rank leaves in its folder for a moment, by which others see whether it is theirs too.

    Args:
        output_dir: The host's.
        launch: What the ranks of one launch have in common: 16 hexadecimal digits.
        rank: Whose it is.
    """
    return output_dir / f".spin-{launch}-{rank}"


# what `check_output_dir` makes, and `sign_of`
_SIGN = re.compile(r"\.probe\.[0-9a-f]{8}|\.spin-[0-9a-f]{16}-\d+")
# seconds after which no start is still at it; another rank's, or another node's, may be
_OVER = 3600.0


def remove_signs(output_dir: Path) -> None:
    """Removes what starts that were killed left in a folder while they tried it, or looked who sees it.

    Args:
        output_dir: The host's.
    """
    for path in output_dir.glob(".*"):
        if _SIGN.fullmatch(path.name):
            with suppress(OSError):  # another start has just removed its own
                found = path.lstat()
                if time.time() - found.st_mtime > _OVER:
                    (shutil.rmtree if stat.S_ISDIR(found.st_mode) else os.unlink)(path)


def describe_upload(hub_model_id: str | None) -> str | None:
    """Returns what is uploaded with a run's model; None where nothing is.

    Args:
        hub_model_id: The host's key.
    """
    if not hub_model_id:
        return None
    return (
        f"`hub_model_id: {hub_model_id}`: the host uploads `output_dir` with its `spin` folder, so all prompts, human "
        "answers and own answers: see that the repository is private, or upload the model by hand"
    )


def check_base_model(base_model: str) -> None:
    """Checks that a start model which is written as a path is there; the host would take it for a name on the hub.

    Args:
        base_model: The host's key.

    Raises:
        FileNotFoundError: It is not; names the key.
    """
    if base_model.startswith(("./", "../", "/", "~")) and not Path(base_model).expanduser().exists():
        raise FileNotFoundError(errno.ENOENT, f"`base_model: {base_model}` does not exist, seen from {Path.cwd()}")
