"""A ZeRO checkpoint on another number of ranks than saved it, by DeepSpeed's universal checkpoints.

DeepSpeed reads the shards of as many ranks as wrote them. Its own tool writes weights and moments out parameter by
parameter, and an engine that is told so reads its part of those.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import explained, publish_folder, write_whole

LOG = get_logger(__name__)

_TOOL = "deepspeed.checkpoint.ds_to_universal"
_LATEST = "latest_universal"
# whose moments have the names that the tool asks for
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")
_SECTIONS = ("adam", "adamw")


def why_not_regrouped(cfg: Any) -> str:
    """Returns what in a config (the host's) keeps its checkpoints to the number of ranks that saved them; empty if nothing.

    Args:
        cfg: The host's; its `deepspeed` is a dict.
    """
    zero = cfg.deepspeed.get("zero_optimization") or {}
    if not zero.get("stage"):
        return "only shards of ZeRO-1, ZeRO-2 and ZeRO-3 can be written out"
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        return "the optimizer's state is offloaded to `nvme`"
    section = (cfg.deepspeed.get("optimizer") or {}).get("type")
    if section is not None:
        return "" if section.lower() in _SECTIONS else f"the `deepspeed` config's optimizer is {section}, not AdamW"
    name = str(getattr(cfg.optimizer, "value", cfg.optimizer))
    return "" if name in _OPTIMIZERS else f"`optimizer: {name}` is none of {', '.join(_OPTIMIZERS)}"


def make_universal(folder: Path) -> None:
    """Writes a checkpoint's shards out by parameter, beside them. Call it on one rank.

    Takes as much disk as the shards; see `remove_universal`.

    Args:
        folder: `checkpoint-N`.

    Raises:
        RuntimeError: DeepSpeed could not; with its message.
        OSError: The disk is full.
    """
    shards = folder / (folder / "latest").read_text().strip()
    made = shards.with_name(f"{shards.name}_universal")
    remove_universal(folder)
    aside = made.with_name(f".{made.name}")
    with explained(made):
        aside.mkdir()
    LOG.info(f"writing {shards} out by parameter, for another number of ranks")
    # states of parallelism that a trainer without it does not note
    arguments = ["--input_folder", str(shards), "--output_folder", str(aside), "--inject_missing_state"]
    done = subprocess.run([sys.executable, "-m", _TOOL, *arguments], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(aside, ignore_errors=True)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        with explained(made):
            raise RuntimeError(
                f"DeepSpeed could not write {shards} out for another number of ranks ({reason}): start as many as before"
            )
    publish_folder(aside, made)
    write_whole(folder / _LATEST, lambda path: path.write_text(made.name))


def read_universal(plugin: Any) -> None:
    """Has the engine that accelerate is going to make read what `make_universal` wrote.

    Args:
        plugin: accelerate's `DeepSpeedPlugin`.
    """
    config = plugin.deepspeed_config
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


def remove_universal(folder: Path) -> None:
    """Removes what `make_universal` wrote, once every rank has read it. Call it on one rank.

    Args:
        folder: `checkpoint-N`.
    """
    (folder / _LATEST).unlink(missing_ok=True)
    for path in folder.glob("*global_step*_universal"):
        shutil.rmtree(path, ignore_errors=True)
