"""What makes the host's checkpoints safe to resume from: a mark in each, written when it is complete.

`checkpoint-N/spin.json` says which run saved it, on how many ranks, and whether the save was finished; and it keeps what
the host's own files leave out, so that a resumed run logs what the whole one would have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_spin.disk.atomic import DamagedFileError, read_json
from axolotl_spin.disk.printable import printable
from axolotl_spin.run.prepare import SpinRun

_MARK = "spin.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


@dataclass
class Checkpoint:
    """A checkpoint folder as found on disk.

    Attributes:
        folder: Where it is.
        step: Optimizer steps of the run before it.
        mark: Content of its `spin.json`; empty where there is none.
        fault: Why it cannot be resumed from; empty where it can.
        finished: False where a run was stopped while it saved this, so that nothing can use it.
        ours: Whether a run with `rl: spin` saved it.
    """

    folder: Path
    step: int
    mark: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    finished: bool = True
    ours: bool = True

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer gave `saving`, on rank 0."""
        return self.mark["state"]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint's mark and compares the files with it.

    Args:
        folder: `checkpoint-N`, or another name where a user renamed it.
    """
    match = _NAME.fullmatch(folder.name)
    found = Checkpoint(folder, int(match[1]) if match else -1)
    try:
        files = {path.name for path in folder.iterdir()}
    except FileNotFoundError:  # another rank has just removed it
        files = set()
    if _MARK not in files:
        # killed between making the folder and marking it, a save leaves nothing but what it wrote aside
        found.finished = folder.exists() and any(not name.startswith(".") for name in files)
        found.ours = not found.finished
        found.fault = f"it has no {_MARK}, so no run with `rl: spin` saved it"
        return found
    try:
        found.mark = read_json(folder / _MARK)
        found.step = int(found.mark["step"])
        found.finished = bool(found.mark["complete"])
        sizes = dict(found.mark["files"])
    except FileNotFoundError:  # another rank has renamed the folder away since it was listed
        found.finished, found.fault = folder.exists(), f"its {_MARK} is gone"
        return found
    except (DamagedFileError, KeyError, TypeError, ValueError) as error:
        found.fault = f"its {_MARK} is damaged ({error})"
        return found
    wrong = [name for name, size in sizes.items() if not _has_size(folder / name, size)]
    if not found.finished:
        found.fault = "the run was stopped while saving it"
    elif wrong:
        found.fault = f"{printable(', '.join(sorted(wrong)[:3]))} {'is' if len(wrong) == 1 else 'are'} missing or cut"
    elif not found.mark.get("resumable", True):
        found.fault = (
            "it was saved without the optimizer's state: with `save_only_model: true`, or by a host that cannot save this "
            "optimizer's, and warned of it"
        )
    return found


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def read_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Returns the checkpoints in a folder, in the order of their steps."""
    folders = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _NAME.fullmatch(path.name)]
    return sorted((read_checkpoint(folder) for folder in folders), key=lambda found: found.step)


def lost_pairs(error: Exception, run: SpinRun, iteration: int) -> str:
    """Returns what to do where an iteration's pairs are gone and its opponent too.

    Args:
        error: What was found when reading them.
        run: The run.
        iteration: Whose pairs they are.
    """
    start = run.plan.iterations[iteration].first_step
    earlier = [c for c in read_checkpoints(run.directory.root.parent) if c.step <= start and not c.fault]
    way = (
        f"set `resume_from_checkpoint: {earlier[-1].folder}`, from which they are made again"
        if earlier
        else "set `auto_resume_from_checkpoints: false` to start from the beginning"
    )
    return f"{error}, and the opponent that answered in iteration {iteration} is gone: put the file back, or {way}"
