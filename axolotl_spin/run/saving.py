"""Checkpoints and models reach the disk whole, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers.trainer import SCHEDULER_NAME

from axolotl_spin.disk.atomic import explained, flush, publish_folder, read_json, remove_folder, write_json
from axolotl_spin.ranks.ferry import Ferry
from axolotl_spin.run.checkpoints import _MARK, read_checkpoints


def save_whole(trainer: Any, folder: Path, *, private: bool = False) -> None:
    """Saves the model or adapter so that it loads with `from_pretrained`, also where checkpoints are sharded.

    The folder appears complete or not at all; one that is there already is this very model and stays.

    Args:
        trainer: The host's trainer; every rank must call.
        folder: Destination.
        private: Nobody but the owner can look into the folder.

    Raises:
        OSError: The disk is full or the folder cannot be written to; nothing is left where the model was to appear.
    """
    main, ranks = trainer.accelerator.is_main_process, trainer.loop.ranks
    # the others do not look: on a network's filesystem they would keep for a while that nothing is there
    present = [main and folder.exists()]
    broadcast_object_list(present)
    if present[0]:
        return
    aside = folder.with_name(f".{folder.name}")
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    kept = plugin.state_dict_type if plugin else None
    if plugin:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        with explained(folder):
            if private:
                if main:
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    aside.mkdir(mode=0o700, exist_ok=True)
                trainer.accelerator.wait_for_everyone()  # each rank's save would make the folder for everybody
            trainer.save_model(str(aside), _internal_call=True)
    finally:
        if plugin:
            plugin.set_state_dict_type(kept)
    ranks.meet_again()  # what rank 0 writes alone may take longer than a collective waits
    trainer.accelerator.wait_for_everyone()
    if main:
        config_path = aside / "config.json"
        if plugin and config_path.exists():
            # FSDP2 gives the classes another name, which the host takes back in its final save only
            config = read_json(config_path)
            if config.get("architectures"):
                config["architectures"] = [name.removeprefix("FSDP") for name in config["architectures"]]
                write_json(config_path, config)
        for path in Path(trainer.args.output_dir).glob("*processor_config.json"):
            shutil.copy(path, aside)  # of a model that takes more than text: the host saves them at its start, once
        publish_folder(aside, folder)
    ranks.meet_again()
    trainer.accelerator.wait_for_everyone()


@contextmanager
def saving(
    trainer: Any, folder: Path, *, root: Path, mark: dict[str, Any], restarts: bool, ferry: Ferry
) -> Iterator[None]:
    """Surrounds the host's saving of a checkpoint: marks it first as unfinished, and as complete when it is on disk.

    The host's rotation runs inside its save, so that a kill could leave nothing to resume from. It is put off until the new
    checkpoint is marked complete.

    Args:
        trainer: The host's; every rank must call.
        folder: The checkpoint's.
        root: The run's `spin` folder.
        mark: What `spin.json` is to hold; `files` and `complete` are added.
        restarts: Whether the optimizer starts anew with the next step, so that its state is not needed. The host goes on
            where it cannot save it (some under FSDP2), and only warns.
        ferry: Brings what ranks of other nodes save to rank 0's folder.
    """
    accelerator, arguments, ranks = trainer.accelerator, trainer.args, trainer.loop.ranks
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    try:
        if ferry.keeps:
            write_json(folder / _MARK, {**mark, "complete": False, "files": {}})
            # DeepSpeed makes its folder on rank 0 alone
            if trainer.is_deepspeed_enabled and not accelerator.is_main_process:
                (folder / f"global_step{mark['step']}").mkdir(exist_ok=True)
        accelerator.wait_for_everyone()
        with explained(folder):
            yield
        ranks.meet_again()  # as in `save_whole`
        accelerator.wait_for_everyone()
        ferry.fetch(folder)
        if accelerator.is_main_process:
            _complete(folder, {**mark, "resumable": mark["resumable"] and (restarts or _has_optimizer(folder))})
            _rotate(folder.parent, root, limit)
        ranks.meet_again()  # the next collective is training's
    finally:
        arguments.save_total_limit = limit


def _has_optimizer(folder: Path) -> bool:
    """Whether the host has saved an optimizer's state: it saves the schedule right after it, DeepSpeed all in a folder."""
    return (folder / SCHEDULER_NAME).exists() or any(folder.glob("global_step*"))


def _complete(folder: Path, mark: dict[str, Any]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != _MARK]
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}
    write_json(folder / _MARK, {**mark, "complete": True, "files": sizes})
    flush(folder.parent)


def _rotate(output_dir: Path, root: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond `save_total_limit`, each from one moment to the next.

    Never the newest from which a run can go on.
    """
    if not limit or limit <= 0:
        return
    found_here = read_checkpoints(output_dir)
    resumable = [found for found in found_here if not found.fault]
    complete = [found for found in found_here if found in resumable or not found.mark.get("resumable", True)]
    kept = {found.folder.resolve() for found in complete[-1:] + resumable[-1:]}
    spare = [found for found in complete if found.folder.resolve() not in kept]
    for found in spare[: max(0, len(complete) - limit)]:
        remove_folder(found.folder, root)
