"""A test-only plugin that kills the run at a point named by SPIN_KILL, or raises there.

SPIN_KILL_RANK names the one rank to which that happens; without it every rank is killed with its whole process group.
SPIN_RAISE is the message of an exception that is raised instead of killing.

A run that is started again by its launcher cannot be given another environment. SPIN_KILLS names a file that holds a kill
for each start, a line `rank<tab>point`; what was carried out is noted beside it, and a start plants the first that was not.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from axolotl.integrations.base import BasePlugin


class Point(NamedTuple):
    """Where a run is killed.

    Attributes:
        target: A function as `module:qualified.name`.
        after: Whether the call has returned by then.
        call: Which call it is, counted from 1 among those that `where` takes.
        where: Told the call's arguments, says whether the call counts.
    """

    target: str
    after: bool = False
    call: int = 1
    where: Callable[..., bool] | None = None


def _to(name: str, parent: str = "") -> Callable[..., bool]:
    """Takes the renaming of a file into place."""
    return lambda aside, path, *_, **__: Path(path).name == name and parent in Path(path).parent.name


def _chunk(path: Path, **_: Any) -> bool:
    return path.parent.name == "chunks"


REPLACE = "os:replace"
STEP = "transformers:Trainer.training_step"
WEIGHTS = "accelerate.optimizer:AcceleratedOptimizer.step"
CHUNK = "axolotl_spin.generation.chunk_files:ChunkFiles.write"
LOOP = "axolotl_spin.game.loop:Loop."

# in the order in which a run comes by; 16 prompts: 8 steps of two micro-batches in iteration 0, 16 in iteration 1
POINTS: dict[str, Point] = {
    "start/config read": Point("axolotl_spin.run.prepare:prepare_run"),
    "start/folder locked": Point("axolotl_spin.run.resume:hold_directory", after=True),
    "start/plan written aside": Point(REPLACE, where=_to("plan.json")),
    "start/plan whole": Point(REPLACE, after=True, where=_to("plan.json")),
    "generate/first answers drawn": Point(CHUNK),
    "generate/chunk written aside": Point(REPLACE, where=_to("000001.parquet")),
    "generate/chunk whole": Point(REPLACE, after=True, where=_to("000002.parquet")),
    "generate/all chunks whole": Point("axolotl_spin.game.self_play:SelfPlay._assemble"),
    "score/first batch": Point("axolotl_spin.training.scoring:completion_logps", after=True),
    "score/all scored": Point("axolotl_spin.game.self_play:write_pairs"),
    "pairs/written aside": Point(REPLACE, where=_to("pairs.parquet")),
    "pairs/whole": Point(REPLACE, after=True, where=_to("pairs.parquet")),
    "pairs/chunks half removed": Point("pathlib:Path.unlink", after=True, call=2, where=_chunk),
    "pairs/metrics written aside": Point(REPLACE, where=_to("metrics.json")),
    "train/first micro-batch": Point(STEP, after=True),
    "train/first step taken": Point(WEIGHTS, after=True),
    "train/before the first checkpoint": Point(STEP, call=5),
    "checkpoint/marked as unfinished": Point(REPLACE, after=True, where=_to("spin.json")),
    "checkpoint/model saved": Point("transformers:Trainer._save_optimizer_and_scheduler"),
    "checkpoint/optimizer saved": Point("transformers:Trainer._save_rng_state"),
    "checkpoint/random state saved": Point("transformers:TrainerState.save_to_json"),
    "checkpoint/all files saved": Point("axolotl_spin.run.saving:_complete"),
    "checkpoint/marked as complete": Point("axolotl_spin.run.saving:_complete", after=True),
    "train/after a checkpoint": Point(STEP, after=True, call=9),
    "checkpoint/second, optimizer saved": Point("transformers:Trainer._save_rng_state", call=2),
    "checkpoint/half rotated away": Point(
        "axolotl_spin.disk.atomic:shutil.rmtree", where=lambda path, *_, **__: "checkpoint" in Path(path).name
    ),
    "train/last step of the iteration": Point(WEIGHTS, after=True, call=8),
    "iteration end/checkpoint complete": Point(LOOP + "end"),
    "iteration end/evaluated": Point("transformers:Trainer.evaluate", after=True, call=2),  # after the start model
    "iteration end/model written aside": Point("axolotl_spin.run.saving:publish_folder"),
    "iteration end/model whole": Point("axolotl_spin.run.saving:publish_folder", after=True),
    "iteration end/held-out play written aside": Point(REPLACE, where=_to("heldout.parquet", "iteration")),
    "iteration end/held-out play whole": Point(REPLACE, after=True, where=_to("heldout.parquet", "iteration")),
    "iteration end/judged": Point("axolotl_spin.game.outcome:write_best"),
    "iteration end/closed": Point(LOOP + "end", after=True),
    "iteration 1/generating": Point(CHUNK, call=6),
    "iteration 1/keeping pairs": Point("axolotl_spin.game.self_play:SelfPlay._kept", after=True),
    "iteration 1/pairs written aside": Point(REPLACE, call=2, where=_to("pairs.parquet")),
    "iteration 1/optimizer restarting": Point("axolotl_spin.game.loop:restart_optimizer"),
    "iteration 1/optimizer restarted": Point("axolotl_spin.game.loop:restart_optimizer", after=True),
    "iteration 1/first epoch": Point(STEP, call=23),
    "iteration 1/second epoch": Point(STEP, call=40),
    "iteration 1/last checkpoint": Point("transformers:TrainerState.save_to_json", call=9),
    "iteration 1/before closing": Point(LOOP + "end", call=2),
    "iteration 1/model written aside": Point("axolotl_spin.run.saving:publish_folder", call=2),
    "final/before the save": Point("axolotl.train:save_trained_model"),
    "final/model half written": Point(
        "transformers.modeling_utils:safe_save_file",
        where=lambda _, path, **__: not {"checkpoint", "spin"} & {part.split("-")[0] for part in Path(path).parts},
    ),
    "final/saved": Point("axolotl.train:save_trained_model", after=True),
    "final/marked as complete": Point("axolotl_spin.run.prepare:SpinRun.write_plan", after=True, call=2),
}
# only where `spin.keep: best` or `spin.patience` has something to do
CHOOSING: dict[str, Point] = {
    "patience/has run out": Point("axolotl_spin.game.outcome:Outcome.after", after=True, call=2),
    "best/copied aside": Point(REPLACE, where=_to("model.safetensors", "out")),
    "best/in place": Point("axolotl_spin.run.keeping:write_best"),
}
# of the second of two ranks, which answers two of an iteration's four chunks
SECOND_RANK: dict[str, Point] = {
    "iteration 1/one chunk whole": Point(CHUNK, call=4),
    "iteration 1/resumed, after a checkpoint": Point(STEP, call=14),
}


class FaultPlugin(BasePlugin):
    """Plants the kill as late as our own modules are imported anyway."""

    def get_input_args(self):
        if "SPIN_KILLS" in os.environ:
            _take_next(Path(os.environ["SPIN_KILLS"]))
        name = os.environ.get("SPIN_KILL")
        if name and os.environ.get("SPIN_KILL_RANK", os.environ.get("RANK", "0")) == os.environ.get("RANK", "0"):
            _plant(name, {**POINTS, **CHOOSING, **SECOND_RANK}[name])
        return None


def _take_next(kills: Path) -> None:
    """Sets this start's kill, if there is one left."""
    left = kills.read_text().splitlines()[len(carried_out(kills)) :]
    if left:
        os.environ["SPIN_KILL_RANK"], os.environ["SPIN_KILL"] = left[0].split("\t")


def write_kills(path: Path, kills: Sequence[tuple[str, int]]) -> None:
    """Writes what SPIN_KILLS names: a point and a rank for each start, in their order."""
    path.write_text("".join(f"{rank}\t{point}\n" for point, rank in kills))


def carried_out(kills: Path) -> list[str]:
    """Returns the points of a file of kills at which a rank was killed."""
    done = kills.with_suffix(".done")
    return done.read_text().splitlines() if done.exists() else []


def _plant(name: str, point: Point) -> None:
    module, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, attribute)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        counts = point.where is None or point.where(*args, **kwargs)
        calls += counts
        due = counts and calls == point.call
        if due and not point.after:
            kill(name, args)
        result = function(*args, **kwargs)
        if due and point.after:
            kill(name, args)
        return result

    setattr(owner, attribute, wrapped)


def kill(name: str, arguments: tuple) -> None:
    """Kills the group, after leaving half a file where the point says so."""
    if "SPIN_RAISE" in os.environ:
        raise RuntimeError(os.environ["SPIN_RAISE"])
    if name == "final/model half written":
        Path(arguments[1]).write_bytes(b"half a model")
    os.write(2, f"killed at: {name}\n".encode())
    if "SPIN_KILLS" in os.environ:
        with Path(os.environ["SPIN_KILLS"]).with_suffix(".done").open("a") as done:
            done.write(f"{name}\n")
    if "SPIN_KILL_RANK" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    os.killpg(os.getpgrp(), signal.SIGKILL)
