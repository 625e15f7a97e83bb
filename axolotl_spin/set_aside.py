"""What an SFT config says that has no meaning in self-play, or another: set aside before the host reads it, and said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl_spin.refusals import shards_by_fsdp1

Test = Callable[[Any], bool]

_NOT_COMPARED = "training losses of different iterations have different opponents and do not compare"
_BEST = "`spin.keep: best` makes the best iteration's model, by `spin.select`, the final one"
_NOISE = "noise in the policy's embeddings alone would tell it from the opponent before anything is learnt"
_OTHER_LOSS = "it changes the loss of SFT, and `spin.loss` is what is trained"
_AT_ONCE = (
    "weights are quantised from the start, since in an iteration in which that began the opponent would be another model "
    "than the one that the policy was"
)

# key of the host's YAML, the values meant, what is put in their place, why
SET_ASIDE: tuple[tuple[str, Test, Any, str], ...] = (
    ("load_best_model_at_end", bool, False, f"{_NOT_COMPARED}; {_BEST}"),
    (
        "metric_for_best_model",
        bool,
        None,
        "with `save_total_limit: 1` the host would remove the last checkpoint, from which a stopped run goes on, in favour "
        f"of the best by it; {_BEST}",
    ),
    (
        "early_stopping_patience",
        bool,
        None,
        f"{_NOT_COMPARED}; `spin.patience` ends a run whose iterations get no better",
    ),
    (
        "save_strategy",
        lambda value: str(value).lower() == "best",
        "epoch",
        f"checkpoints are what a stopped run goes on from, so they are saved after each epoch; {_BEST}",
    ),
    ("neftune_noise_alpha", bool, None, _NOISE),
    ("noisy_embedding_alpha", bool, None, _NOISE),
    ("nvfp4_merge_aware_start_step", bool, None, _AT_ONCE),  # of the host's kernels plugin
    ("use_dft", bool, None, _OTHER_LOSS),
    ("use_eaft", bool, None, _OTHER_LOSS),
    (
        "train_on_inputs",
        bool,
        False,
        "the human answer is what follows the prompt, and the prompt is given to both players",
    ),
    (
        "batch_flattening",
        bool,
        False,
        "pairs have layouts of their own, and held-out rows are counted one by one; `sample_packing` is independent of it",
    ),
    (
        "include_tkps",
        bool,
        False,
        "it counts the tokens of SFT's batches; `spin/training_seconds` tells how long an iteration's training took",
    ),
    (
        "deepcompile",
        bool,
        False,
        "it builds the gathering of sharded weights into the graph of training, by which an opponent cannot answer",
    ),
    (
        "torch_compile_regional",
        bool,
        False,
        "the opponent is scored by the whole model as it is trained; `torch_compile` compiles that",
    ),
    ("dataloader_drop_last", bool, False, "each pair is trained on once an epoch, the last batch included"),
)
# FSDP1's word for what FSDP2's `reshard_after_forward` says
_RESHARD = {"FULL_SHARD": True, "1": True, "SHARD_GRAD_OP": False, "2": False}


def set_aside(data: dict[str, Any]) -> list[str]:
    """Changes a raw config where self-play takes it otherwise, and says so in the log.

    Args:
        data: The config as the user wrote it; changed in place.

    Returns:
        A line for each change: the key, its value, what is taken and why.
    """
    from axolotl.utils.logging import get_logger  # `axolotl spin --help` loads this file and no host

    lines = []
    for key, meant, instead, why in SET_ASIDE:
        if data.get(key) is not None and meant(data[key]):
            what = "has no effect" if not instead else f"is taken as `{instead}`"
            lines.append(f"`{key}: {data[key]}` {what} with `rl: spin`: {why}")
            data[key] = instead
    lines += _quantise_at_once(data)
    lines += _lift_fsdp(data)
    for line in lines:
        get_logger(__name__).warning(line)
    return lines


def _quantise_at_once(data: dict[str, Any]) -> list[str]:
    """Has quantisation-aware training begin with the first answer: the opponent must be rounded as the policy is."""
    name, block = "fake_quant_after_n_steps", data.get("qat")
    if not isinstance(block, dict) or not block.get(name):
        return []
    data["qat"] = {**block, name: None}
    return [f"`qat.{name}: {block[name]}` has no effect with `rl: spin`: {_AT_ONCE}"]


def _lift_fsdp(data: dict[str, Any]) -> list[str]:
    """Takes FSDP2 where a config asks for FSDP without a version, for which Axolotl 0.19 takes FSDP1.

    What FSDP2 has no word for is left as it stands, and then refused.
    """
    config = data.get("fsdp_config")
    config = dict(config) if isinstance(config, dict) else {}
    versions = (data.get("fsdp_version"), config.get("fsdp_version"), config.get("version"))
    if not (data.get("fsdp") or config) or any(version is not None for version in versions):
        return []
    config = {key if key == "fsdp_version" else key.removeprefix("fsdp_"): value for key, value in config.items()}
    strategy = config.pop("sharding_strategy", None)
    reshard = None if strategy is None else _RESHARD.get(str(strategy).upper())
    unlike = (strategy is not None and reshard is None) or shards_by_fsdp1(data.get("fsdp") or ())
    if config.pop("forward_prefetch", False) or unlike:
        return []
    if reshard is not None:
        config.setdefault("reshard_after_forward", reshard)
    taken = "`fsdp_version: 2` is taken"
    if data.get("load_in_4bit") and config.get("cpu_ram_efficient_loading"):
        config["cpu_ram_efficient_loading"] = False
        taken += " (with `cpu_ram_efficient_loading: false`: the host cannot have one rank load 4-bit weights then)"
    data["fsdp_version"], data["fsdp_config"] = 2, {**config, "fsdp_version": 2}
    return [f"FSDP is asked for without a version: {taken}, under which an opponent can answer"]
