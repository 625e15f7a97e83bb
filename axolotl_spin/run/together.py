"""A start on several nodes: all have the same run before them, and where rank 0 begins, all do.

Where every rank sees the run's folder each finds its start there by itself, as on one node, and all compare what they find.
Else rank 0's folder is the run's: it alone decides, and what the others need of it is brought to them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import remove_folder, remove_leftovers
from axolotl_spin.disk.lock import hold_directory
from axolotl_spin.ranks.nodes import Meeting, find_nodes, meeting_of_nodes
from axolotl_spin.run.checkpoints import read_checkpoints
from axolotl_spin.run.prepare import SpinRun

LOG = get_logger(__name__)

Settle = Callable[[SpinRun, Any], None]


def settle_together(run: SpinRun, cfg: Any, settle: Settle) -> None:
    """Settles where a start begins, on every rank of a launch; see `settle_start`.

    Args:
        run: The run; its `nodes` are found out.
        cfg: The host's config; `resume_from_checkpoint` and `auto_resume_from_checkpoints` are set.
        settle: Does so on a rank that sees the run's folder.

    Raises:
        SystemExit: There is nothing to do.
        ValueError: A rank has other settings or data than rank 0, a node's own folder holds a run, or what `settle` says.
    """
    meeting = meeting_of_nodes()
    if meeting is None:
        return settle(run, cfg)
    _agree_on_run(meeting, run)
    output_dir = run.directory.root.parent
    run.nodes = find_nodes(meeting, output_dir)
    if run.nodes.shared:
        return _settle_alike(meeting, run, cfg, settle)
    if meeting.rank == 0:
        LOG.info(
            f"`output_dir: {output_dir}` is not one folder for all nodes, but {len(run.nodes.keepers)}: rank 0's is the "
            "run's, and files go between them by the process group"
        )
    keeps = meeting.rank in run.nodes.keepers[1:]
    meeting.agree("folders", _clear_own(run, meeting.rank) if keeps else "")
    _start_as_rank_0(meeting, run, cfg, settle)


def _agree_on_run(meeting: Meeting, run: SpinRun) -> None:
    """Refuses ranks that would train on something else than rank 0; what is on its disk all know by its marks."""
    main = meeting.from_main("run", lambda: {**run.identity.to_json(), "iterations": run.identity.iterations})
    changes, fault = run.identity.changes(main), ""
    if changes:
        fault = f"rank {meeting.rank} has other settings or data than rank 0:\n" + "\n".join(changes) + "\n"
        fault += "start all nodes with the same config, and give them the same data"
    meeting.agree("same run", fault)
    run.identity = run.identity.like(main)


def _settle_alike(meeting: Meeting, run: SpinRun, cfg: Any, settle: Settle) -> None:
    """Settles the start on every rank, and raises on every rank what one refuses: rank 0 alone takes the folder.

    A network's filesystem may show a node for some time what another has replaced since, so that ranks find another start.
    """
    ended: Exception | SystemExit | None = None
    try:
        settle(run, cfg)
    except (Exception, SystemExit) as error:
        ended = error
    try:
        meeting.agree("start", (str(ended) or repr(ended)) if isinstance(ended, Exception) else "")
    except ValueError:
        if not isinstance(ended, Exception):
            raise
    if not isinstance(ended, Exception):
        begins = _begins(run, cfg, complete=ended is not None)
        main = meeting.from_main("begins", lambda: begins)
        fault = (
            f"rank {meeting.rank} finds {begins} in `output_dir: {run.directory.root.parent}`, and rank 0 {main}: a "
        )
        fault += "network's filesystem may show a node for a minute or so what is there no more; start again"
        meeting.agree("one start", "" if begins == main else fault)
    if ended is not None:
        raise ended


def _begins(run: SpinRun, cfg: Any, complete: bool) -> str:
    """Returns where a rank that has settled the start would go on, in words."""
    if complete:
        return "a complete run"
    checkpoint = cfg.resume_from_checkpoint
    if not checkpoint:
        return "no checkpoint to go on from"
    return f"{Path(checkpoint).name}{', of another number of ranks' if run.regrouped else ''} to go on from"


def _clear_own(run: SpinRun, rank: int) -> str:
    """Takes the folder of a node that does not see rank 0's, and clears it of what an earlier start left.

    Returns:
        What keeps this node from using it.
    """
    output_dir, root = run.directory.root.parent, run.directory.root
    try:
        hold_directory(run.directory)
        remove_leftovers(root)
        found = read_checkpoints(output_dir)
        for checkpoint in found:
            if not checkpoint.finished:  # of a save that was stopped
                remove_folder(checkpoint.folder, root)
    except (OSError, RuntimeError) as error:
        return f"rank {rank}: {error}"
    runs = [run.directory.plan] if run.directory.plan.exists() else []
    runs += [checkpoint.folder for checkpoint in found if checkpoint.finished]
    if not runs:
        return ""
    return (
        f"`output_dir: {output_dir}` is no folder that all nodes share. Rank 0's is the run's, and where rank {rank} is "
        f"there is a run too ({runs[0]}): start that node as the first one, or move what is there away"
    )


def _start_as_rank_0(meeting: Meeting, run: SpinRun, cfg: Any, settle: Settle) -> None:
    """Has rank 0 settle the start, and all do what it does."""
    raised: list[BaseException] = []

    def work() -> dict[str, Any]:
        try:
            settle(run, cfg)
            if run.regrouped is not None:
                raise ValueError(
                    f"{run.regrouped} was saved by another number of ranks, whose shards all nodes would have to read: "
                    f"`output_dir: {run.directory.root.parent}` is not one folder for all of them; start as many ranks as "
                    "before, or on nodes that share it"
                )
        except SystemExit as ended:
            raised.append(ended)
            return {"ended": ended.code}
        except Exception as error:
            raised.append(error)
            return {"fault": str(error)}
        return {"checkpoint": cfg.resume_from_checkpoint}

    said = meeting.from_main("start", work)
    for error in raised:
        raise error
    if "ended" in said:
        raise SystemExit(said["ended"])
    if "fault" in said:
        raise ValueError(said["fault"])
    if meeting.rank:
        checkpoint = said["checkpoint"]
        if checkpoint and run.nodes.far(meeting.rank):
            checkpoint = str(run.directory.brought(Path(checkpoint)))
        cfg.resume_from_checkpoint, cfg.auto_resume_from_checkpoints = checkpoint, False
