"""Where a start begins: at step 0, at a checkpoint, or nowhere, the run being complete. Decided before a model loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spin.data.pairs import check_pairs
from axolotl_spin.disk.atomic import (
    DamagedFileError,
    ForeignFileError,
    read_json,
    remove_folder,
    remove_leftovers,
    write_json,
)
from axolotl_spin.disk.directory import RunDirectory, check_own
from axolotl_spin.disk.lock import hold_directory
from axolotl_spin.run.checkpoints import Checkpoint, lost_pairs, read_checkpoint, read_checkpoints
from axolotl_spin.run.keeping import alone, remove_asides
from axolotl_spin.run.plan import IterationPlan, Plan
from axolotl_spin.run.prepare import SpinRun
from axolotl_spin.run.regrouping import remove_universal, why_not_regrouped
from axolotl_spin.run.selected import ended_at

LOG = get_logger(__name__)


def settle_start(run: SpinRun, cfg: Any) -> None:
    """Takes the run's folder, checks what is in it, and tells the host where to start.

    A run goes on from its last complete checkpoint unless `auto_resume_from_checkpoints: false`; `resume_from_checkpoint`
    names another one. Every rank must call, before there is a process group: all find the same.

    Args:
        run: The run.
        cfg: The host's config; `resume_from_checkpoint` and `auto_resume_from_checkpoints` are set.

    Raises:
        SystemExit: With code 0: the run is complete.
        ValueError: What is on disk belongs to another run or to none, or does not allow to go on; names the way out.
        RuntimeError: Another process is writing to the folder.
        OSError: The folder cannot be written to.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    _refuse_overwriting_the_start(run, cfg)
    if main:
        check_own(run.directory)
        hold_directory(run.directory)
        remove_leftovers(run.directory.root)
        remove_asides(run.directory.root.parent)
    completed = _check_plan(run)
    output_dir = run.directory.root.parent
    asked = cfg.get("resume_from_checkpoint")
    if completed and not asked:
        if main:
            why, key = (f" ({completed})", "patience") if isinstance(completed, str) else ("", "iterations")
            LOG.info(
                f"this run is complete{why}, so there is nothing to do: its final model is in {output_dir}, its "
                f"figures are shown by `axolotl spin table {output_dir}`. Raise `spin.{key}` to go on, or choose another "
                "`output_dir`"
            )
        raise SystemExit(0)
    found = read_checkpoints(output_dir)
    _refuse_foreign(found, output_dir)
    if main:
        for checkpoint in found:
            if not checkpoint.finished:
                LOG.info(f"removing {checkpoint.folder}: {checkpoint.fault}")
                remove_folder(checkpoint.folder, run.directory.root)
            else:
                remove_universal(checkpoint.folder)  # of a start that was killed
    if asked:
        chosen: Checkpoint | None = _asked_for(Path(asked), run)
    elif cfg.get("auto_resume_from_checkpoints") is False:
        chosen = None
    else:
        chosen = _latest([checkpoint for checkpoint in found if checkpoint.finished], run)
    if chosen is not None:
        if _check_launch(chosen, run, cfg):
            run.regrouped = chosen.folder
        _check_pairs_for(chosen, run)
        if main:
            LOG.info(f"going on from {chosen.folder} (step {chosen.step} of {run.plan.total_steps})")
    cfg.resume_from_checkpoint = str(chosen.folder) if chosen else None
    cfg.auto_resume_from_checkpoints = False  # the host would take the last folder by name


def stopped_early(directory: RunDirectory, plan: Plan, step: int) -> str:
    """Returns what a run that the host ended before its last step has lost, and where the next start goes on.

    Args:
        directory: The run's.
        plan: Its iterations.
        step: Optimizer steps at which it was ended.
    """
    line = (
        f"the host ended training at step {step} of {plan.total_steps} (as `loss_watchdog_threshold` and "
        "callbacks that stop a run do), so the run is not complete"
    )
    sound = [found for found in read_checkpoints(directory.root.parent) if not found.fault and found.step <= step]
    if not sound:
        return f"{line}: there is no checkpoint to go on from, so the next start begins at step 0"
    lost = step - sound[-1].step
    again = f", and takes the {lost} step(s) since again" if lost else ", and nothing is lost"
    return f"{line}: the next start goes on from {sound[-1].folder}{again}"


def _refuse_overwriting_the_start(run: SpinRun, cfg: Any) -> None:
    """A run that writes its final model over what it started from cannot be started again."""
    output_dir = run.directory.root.parent.resolve()
    for key in ("base_model", "lora_model_dir"):
        start = cfg.get(key)
        if start and Path(start).is_dir() and Path(start).resolve() == output_dir:
            raise ValueError(
                f"`output_dir: {cfg.get('output_dir')}` is also `{key}`, so the final model would overwrite the one that "
                "the run starts from: choose another `output_dir`"
            )


def _check_plan(run: SpinRun) -> bool | str:
    """Checks that `OUTPUT_DIR/spin` is empty or this run's.

    Returns:
        Whether the run is complete; why, where `spin.patience` ended it before its last step.
    """
    directory = run.directory
    try:
        kept = read_json(directory.plan)
        if not isinstance(kept.get("fixed"), dict) or not isinstance(kept.get("iterations"), list):
            raise DamagedFileError(f"{directory.plan} is damaged (not a plan)")
    except FileNotFoundError:
        return False
    except DamagedFileError as error:
        LOG.warning(f"{error}: it is written anew from the config; pairs and checkpoints are told by their own marks")
        return False
    changes = run.identity.changes(kept)
    if changes:
        raise ValueError(
            f"{directory.root} holds a run with other settings:\n" + "\n".join(changes) + "\n"
            f"choose another `output_dir`, restore these settings, or delete {directory.root} and the checkpoints beside it"
        )
    return is_complete(run, kept.get("completed_steps"))


def is_complete(run: SpinRun, steps: int | None) -> bool | str:
    """Whether a run that ended after so many steps has nothing left to do; why, where `spin.patience` ended it.

    With another `spin.patience` or `spin.select` than it ended by, it may have.
    """
    if steps is None or steps == run.plan.total_steps:
        return steps is not None
    standing = ended_at(run, steps)
    return standing.why_ended if standing else False


def _refuse_foreign(found: list[Checkpoint], output_dir: Path) -> None:
    foreign = [checkpoint.folder.name for checkpoint in found if not checkpoint.ours]
    if foreign:
        raise ValueError(
            f"`output_dir: {output_dir}` holds {', '.join(foreign[:3])}, saved by a run without `rl: spin`; training here "
            "would rotate it away: choose another `output_dir`, or move it"
        )


def _asked_for(folder: Path, run: SpinRun) -> Checkpoint:
    """Returns the checkpoint that `resume_from_checkpoint` names."""
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint: {folder}` does not exist")
    checkpoint = read_checkpoint(folder)
    fault = checkpoint.fault or _another_runs(checkpoint, run)
    if fault:
        raise ValueError(
            f"`resume_from_checkpoint: {folder}` cannot be resumed from: {fault}. To start from its weights alone, name it "
            "as `base_model` (an adapter as `lora_model_dir`)"
        )
    return checkpoint


def _latest(found: list[Checkpoint], run: SpinRun) -> Checkpoint | None:
    """Returns the last checkpoint that is sound; a damaged one is passed over: the steps since can be made again."""
    for checkpoint in reversed(found):
        if checkpoint.step > run.plan.total_steps:
            continue  # of iterations that the config no longer has
        if checkpoint.fault:
            LOG.warning(f"passing over {checkpoint.folder}: {checkpoint.fault}")
            continue
        fault = _another_runs(checkpoint, run)
        if fault:
            raise ValueError(f"{checkpoint.folder} {fault}: choose another `output_dir`, or move the checkpoints away")
        return checkpoint
    return None


def _another_runs(checkpoint: Checkpoint, run: SpinRun) -> str:
    if checkpoint.step > run.plan.total_steps:
        return f"is at step {checkpoint.step}, but this run has {run.plan.total_steps}"
    if checkpoint.mark.get("run") != run.identity.through(run.plan.locate(checkpoint.step - 1).iteration):
        return "was saved by a run with other settings or data"
    return ""


def _check_launch(checkpoint: Checkpoint, run: SpinRun, cfg: Any) -> bool:
    """Refuses a launch that the host could not load a checkpoint into; see `Launch`.

    Returns:
        Whether the checkpoint has to be written out for this number of ranks; see `make_universal`.
    """
    launch = run.launch
    ranks, sharding = checkpoint.mark.get("ranks"), checkpoint.mark.get("sharding")
    if sharding != launch.sharding:
        raise ValueError(
            f"{checkpoint.folder} was saved with {sharding or 'no sharding'}, and its optimizer's state cannot be read "
            f"with {launch.sharding or 'no sharding'}: use the `deepspeed` and `fsdp_config` of the first start"
        )
    regrouped = ranks != launch.ranks and (launch.sharding or "").startswith("ZeRO")
    why = why_not_regrouped(cfg) if regrouped else ""
    if why:
        raise ValueError(
            f"{checkpoint.folder} was saved on {ranks} ranks, and DeepSpeed cannot read its optimizer's state on "
            f"{launch.ranks}, since {why}: start as many ranks as before"
        )
    return regrouped


def _check_pairs_for(checkpoint: Checkpoint, run: SpinRun) -> None:
    """Checks that the pairs a resume needs are on disk: their opponents exist nowhere else."""
    position = run.plan.locate(checkpoint.step)
    if position.iteration == len(run.plan.iterations):
        return
    entry = run.plan.iterations[position.iteration]
    begun = checkpoint.step > entry.first_step
    fault = _fault_of_pairs(run, entry)
    needed = entry.iteration
    if fault and not begun and entry.kept_rows:  # they are made again, with pairs kept from the iteration before
        needed = entry.iteration - 1
        fault = _fault_of_pairs(run, run.plan.iterations[needed])
    if fault and (begun or entry.kept_rows):
        raise ValueError(f"{checkpoint.folder}: {lost_pairs(fault, run, needed)}") from fault


def _fault_of_pairs(run: SpinRun, entry: IterationPlan) -> Exception | None:
    try:
        check_pairs(run.directory.pairs(entry.iteration), run.identity.before(entry.iteration), entry.rows)
    except (FileNotFoundError, DamagedFileError, ForeignFileError) as error:
        return error
    return None


def set_aside(run: SpinRun, step: int) -> list[Path]:
    """Moves what lies beyond a start out of the way: later iterations and checkpoints, made by a run that got further.

    Their opponents came from weights that this run is only going to make. The pairs of the iteration that the run starts in
    stay: its opponent is the same. Nothing is deleted. Call it on one rank.

    Args:
        run: The run.
        step: Optimizer steps before the start.

    Returns:
        Where they are now.
    """
    directory, position = run.directory, run.plan.locate(step)
    found = [checkpoint.folder for checkpoint in read_checkpoints(directory.root.parent) if checkpoint.step > step]
    for folder in sorted(directory.root.glob("iteration-*")):
        index = folder.name.removeprefix("iteration-")
        if index.isdecimal() and int(index) > position.iteration:
            found.append(folder)
    at = position.iteration
    results = (directory.model(at), directory.heldout(at), directory.eval_rows(at), directory.evals(at))
    found += [path for path in results if path.exists()]
    if not found:
        return []
    one = alone(run)
    if _judged(directory.best, at):
        found.append(directory.best)
    number = 1
    while os.path.lexists(replaced := directory.root / f"replaced-{number}"):
        number += 1
    moved = []
    for path in found:
        target = replaced / (path.relative_to(directory.root) if path.is_relative_to(directory.root) else path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        moved.append(path.rename(target))
    if one is not None and one < at and directory.best in found:
        write_json(directory.best, {"alone": one})
    return moved


def _judged(best: Path, iteration: int) -> bool:
    """Returns whether `best.json` judges an iteration or a later one."""
    try:
        return len(read_json(best).get("iterations") or []) > iteration
    except (FileNotFoundError, DamagedFileError):
        return False
