"""What SPIN cannot work with, known once the host has read a config, the model's and DeepSpeed's, and who takes part."""

from __future__ import annotations

from typing import Any

from axolotl_spin.refusals import above_one, why_refused
from axolotl_spin.settings.spin import SpinConfig


def refuse_loaded(cfg: Any, settings: SpinConfig, other_trainers: list[str], needs_whole: bool) -> None:
    """Refuses what is only known once the host has read the model's and DeepSpeed's configs.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        other_trainers: Names of other plugins that bring a trainer for this config.
        needs_whole: Whether the opponent has to be on disk as a whole model, for vLLM.

    Raises:
        ValueError: Names the key, the reason and the remedy.
    """
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    schedule = cfg.get("lr_scheduler")
    known = {*(kind.value for kind in SchedulerType), "one_cycle", "rex"}
    if schedule and schedule not in known:
        raise ValueError(f"`lr_scheduler: {schedule}` is none of the host's: {', '.join(sorted(known))}")
    optimizer = getattr(cfg.get("optimizer"), "value", cfg.get("optimizer"))
    known = {kind.value for names in (OptimizerNames, CustomSupportedOptimizers) for kind in names}
    if optimizer and optimizer not in known:
        raise ValueError(f"`optimizer: {optimizer}` is none of the host's: {', '.join(sorted(known))}")
    if (cfg.get("fsdp") or cfg.get("fsdp_config")) and str(cfg.get("fsdp_version")) != "2":
        raise ValueError(
            f"`fsdp_version: {cfg.get('fsdp_version')}`, which this host takes where none is given, does not work with "
            "`rl: spin`: generation runs under FSDP2; set `fsdp_version: 2`"
        )
    if other_trainers:
        raise ValueError(
            f"`plugins:` also lists {', '.join(other_trainers)}, which brings a trainer of its own; "
            "remove it from a config with `rl: spin`"
        )
    if (cfg.get("world_size") or 1) > 1 and cfg.get("tiled_mlp") and not cfg.get("tiled_mlp_num_shards"):
        raise ValueError(
            "`tiled_mlp: true` on several ranks has them agree on a number of tiles in each forward, in which all must "
            "take part, and here a rank may have fewer; set `tiled_mlp_num_shards`, 2 say"
        )
    _refuse_carried_over(cfg, settings)
    deepspeed = cfg.get("deepspeed")
    if not isinstance(deepspeed, dict):
        return
    splits = {
        "tensor_parallel.autotp_size": (
            (deepspeed.get("tensor_parallel") or {}).get("autotp_size"),
            "tensor_parallel_size",
        ),
        "sequence_parallel_size": (deepspeed.get("sequence_parallel_size"), "sequence_parallel_degree"),
    }
    for name, (size, key) in splits.items():
        if above_one(size):
            raise ValueError(
                f"`{name}: {size}` of the `deepspeed` config does not work with `rl: spin`: {why_refused(key)}"
            )
    if deepspeed.get("scheduler"):
        raise ValueError(
            "the `deepspeed` config has a `scheduler` section, which cannot restart at each iteration; remove the "
            "section (the host's `lr_scheduler`, `warmup_steps` and `learning_rate` keys apply)"
        )
    if needs_whole and saves_sharded(deepspeed):
        raise ValueError(
            "the `deepspeed` config has `stage: 3` without `gather_16bit_weights_on_model_save: true`, so that no opponent "
            "could be saved for vLLM; add it to `zero_optimization`, or set `spin.generation.backend: transformers`"
        )


def _refuse_carried_over(cfg: Any, settings: SpinConfig) -> None:
    """Refuses what would carry an old game's gradients into the next iteration, where optimizers restart."""
    if settings.iterations == 1 or not settings.restart_optimizer:
        return
    deepspeed = cfg.get("deepspeed")
    zero = (deepspeed.get("zero_optimization") or {}) if isinstance(deepspeed, dict) else {}
    keep = "or set `spin.restart_optimizer: false`"
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ValueError(
            "the `deepspeed` config has `offload_optimizer` to `nvme`, whose swapped state cannot restart at each "
            f"iteration: offload to `cpu`, {keep}"
        )
    for name in cfg.get("plugins") or []:
        if "grokfast" in str(name).lower():
            raise ValueError(
                f"`plugins:` lists {name}, whose average of gradients does not restart at each iteration: remove it, {keep}"
            )


def refuse_devices(cfg: Any, seen: int, kind: str | None = None) -> None:
    """Refuses devices that SPIN cannot compute on: Apple's, and several GPUs of one process.

    Args:
        cfg: The host's normalized config.
        seen: GPUs that this process sees, over which the host would spread the model, and a pair's tensors.
        kind: Of accelerator, as torch calls it; None where there is none.

    Raises:
        ValueError: With the remedy.
    """
    if kind == "mps":
        raise ValueError(
            "Apple's GPUs have no float64, in which `rl: spin` sums log-probs and draws tokens: set "
            "ACCELERATE_USE_CPU=true in the environment, or train on another machine"
        )
    if seen > 1 and (cfg.get("world_size") or 1) == 1 and not cfg.get("deepspeed"):
        raise ValueError(
            f"one process sees {seen} GPUs, over which it would spread the model, which `rl: spin` does not work with: "
            f"give each a process (`accelerate launch --num_processes {seen}`), or show it one (`CUDA_VISIBLE_DEVICES=0`)"
        )


def saves_sharded(deepspeed: Any) -> bool:
    """Whether a DeepSpeed config (a dict) has a full model saved as shards: ZeRO-3 that is not told to gather it."""
    zero = (deepspeed.get("zero_optimization") or {}) if isinstance(deepspeed, dict) else {}
    names = (
        "gather_16bit_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
    )  # DeepSpeed takes either
    return zero.get("stage") == 3 and not any(zero.get(name) is True for name in names)
