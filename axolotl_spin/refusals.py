"""What SPIN cannot work with, and what to do instead: one row per key, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Test = Callable[[Any], bool]

# another method's blocks, which the host fills in by itself once it has read a config
_OTHER_BLOCKS = {
    "trl": "answers are drawn as `spin.generation` says, and `spin.beta` is the beta",
    "vllm": "SPIN's engines read `spin.generation.vllm`",
}
# keys that begin so are another method's, and would say nothing here
_OTHER_METHODS = ("dpo_", "kto_", "cpo_", "orpo_", "simpo_", "rpo_", "gdpo", "grpo", "ebft", "center_rewards_")
# others of theirs, and what there is to know of them here
_OTHERS_KEYS = {
    "max_prompt_len": " (`sequence_len` bounds a prompt with its answer)",
    "precompute_ref_log_probs": "",
    "rl_adapter_ref_model": "",
}
# refused at the top, and the key of ours in their place
_IN_PLACE = {"rl_beta": "spin.beta", "dpo_beta": "spin.beta"}
# types of `datasets:` that only other methods read: DPO's and KTO's, Bradley-Terry's, EBFT's
_PREFERENCES = ("chatml", "llama3", "zephyr", "passthrough", "orpo", "bradley_terry", "stepwise_supervised", "ebft")


def _truthy(value: Any) -> bool:
    return bool(value)


def _number(value: Any) -> float | None:
    """Returns a number, which the host takes as a string too; None for all else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def above_one(value: Any) -> bool:
    """Whether a value is a number above 1, written as one or as a string."""
    number = _number(value)
    return number is not None and number > 1


def _below_one(value: Any) -> bool:
    number = _number(value)
    return number is None or not number >= 1


def _not_whole(value: Any) -> bool:
    number = _number(value)
    return number is None or not number >= 1 or not number.is_integer()


def _not_positive(value: Any) -> bool:
    number = _number(value)
    return number is None or not number > 0


def shards_by_fsdp1(value: Any) -> bool:
    """Whether the host's `fsdp` names a way to shard that FSDP1 alone has."""
    listed = value if isinstance(value, (list, tuple)) else str(value).split()
    return any(str(name).lower() in ("hybrid_shard", "hybrid_shard_zero2", "no_shard") for name in listed)


def _one_of(*names: str) -> Test:
    return lambda value: str(value).lower() in names


# key of the host's YAML, the values refused, why and what to write instead
REFUSED: tuple[tuple[str, Test, str], ...] = (
    ("streaming", _truthy, "self-play answers every prompt, so it needs a finite dataset; remove it"),
    ("pretraining_dataset", _truthy, "pretraining data has no prompt to answer; use `datasets:`"),
    ("reward_model", _truthy, "SPIN trains a language model and needs no reward model; remove it"),
    ("process_reward_model", _truthy, "SPIN trains a language model and needs no reward model; remove it"),
    (
        "context_parallel_size",
        above_one,
        "a rank would see a part of each pair, and log-probs are sums over whole answers; set it to 1 and use data "
        "parallelism, ZeRO-3 or FSDP2",
    ),
    ("sequence_parallel_degree", above_one, "sequences are not split over ranks here; set it to 1"),
    (
        "tensor_parallel_size",
        above_one,
        "its ranks make each forward together, and here each answers prompts of its own, which ends in a crash or a hang; "
        "set it to 1 and shard with ZeRO-3 or FSDP2",
    ),
    (
        "fsdp",
        shards_by_fsdp1,
        "FSDP2, under which an opponent can answer, does not shard so; write full_shard or shard_grad_op there",
    ),
    (
        "expert_parallel_size",
        above_one,
        "experts are exchanged in each forward, in which all its ranks must take part, and here a rank may have fewer; set "
        "it to 1 and shard with FSDP2",
    ),
    ("relora", _truthy, "merging the adapter in mid-iteration would move the opponent; use `adapter: lora`"),
    (
        "peft_init_lora_weights",
        lambda value: str(value).lower().startswith("pissa_niter"),
        "it takes a start drawn at random out of the base model, which a saved adapter does not bring back; use `pissa`",
    ),
    ("auto_find_batch_size", _truthy, "the plan fixes batches and steps before training; set `micro_batch_size`"),
    ("trainer_cls", _truthy, "the plugin brings its own trainer; remove it"),
    ("use_pose", _truthy, "training would skip positions, which an answer being written cannot; remove it"),
    (
        "attn_implementation",  # into which the host turns `xformers_attention` and `sage_attention`
        _one_of("xformers", "sage"),
        "the host's code for it takes packed rows alone, and answers begin with padded ones; use flash_attention_2, sdpa "
        "or flex_attention",
    ),
    (
        "scaling_softmax",
        _truthy,
        "the host scales all rows of a batch by the first one's positions, so that an answer would depend on its "
        "neighbours; remove it",
    ),
    ("diffusion_lm", _truthy, "answers are drawn one token after another; remove it"),
    ("rl_beta", _truthy, "SPIN's beta is `spin.beta`; move the value there"),
    ("dpo_beta", _truthy, "SPIN's beta is `spin.beta`; move the value there"),
    ("dpo_loss_type", _truthy, "SPIN's loss is `spin.loss`; remove it"),
    ("balance_labels", _truthy, "batches are made of whole pairs, each weighted the same; remove it"),
    ("jagged_restart_steps", _truthy, "warmup and decay restart at each iteration by themselves; remove it"),
    (
        "lr_scheduler",
        _one_of("reduce_lr_on_plateau", "greedy"),
        "the schedule is fixed before step 1; use linear, cosine, constant, rex, ...",
    ),
    (
        "optimizer",
        lambda value: str(value).lower().startswith("schedule_free"),
        "its running average spans iterations and cannot be restarted; use adamw_torch_fused, rmsprop, ...",
    ),
    (
        "optimizer",
        lambda value: "layerwise" in str(value).lower() or "lomo" in str(value).lower(),
        "it updates weights inside backward and its state cannot be restarted; use adamw_torch_fused, rmsprop, ...",
    ),
    (
        "num_epochs",
        _not_whole,
        "it counts per iteration and an iteration is made of whole epochs; use a whole number",
    ),
    ("micro_batch_size", _below_one, "it is the number of pairs in a rank's forward; use 1 or more"),
    ("gradient_accumulation_steps", _below_one, "it is the number of forwards in a step; use 1 or more"),
    ("learning_rate", _not_positive, "nothing would be learnt, or unlearnt; use a number above 0, such as 5e-7"),
)


def why_refused(key: str) -> str:
    """Returns why a key of the host's is refused, and what to write instead.

    Args:
        key: One of `REFUSED`.
    """
    return next(why for name, _, why in REFUSED if name == key)


def refuse_unsupported(data: dict[str, Any]) -> None:
    """Refuses raw YAML values that SPIN cannot work with.

    Args:
        data: The config as the user wrote it.

    Raises:
        ValueError: Names the key, its value, the reason and the remedy, for every offending key at once.
    """
    found = [
        f"`{key}: {data[key]}` does not work with `rl: spin`: {why}"
        for key, refused, why in REFUSED
        if data.get(key) is not None and refused(data[key])
    ]
    found += _of_images(data)
    fsdp = data.get("fsdp_config")
    fsdp = fsdp if isinstance(fsdp, dict) else {}
    version = data.get("fsdp_version") or fsdp.get("fsdp_version") or fsdp.get("version")
    if version is not None and str(version) != "2":
        found.append(
            f"`fsdp_version: {version}` does not work with `rl: spin`: generation runs under FSDP2; "
            "set `fsdp_version: 2`"
        )
    if found:
        raise ValueError("\n".join(found))


def _of_images(data: dict[str, Any]) -> list[str]:
    """Says what of a config does not go with pictures in the data, which `processor_type` has the host read."""
    if not data.get("processor_type"):
        skipped = (
            "`skip_prepare_dataset: true` does not work with `rl: spin`: prompts are read from prepared rows; remove it"
        )
        return [skipped] if data.get("skip_prepare_dataset") else []
    with_them = f"does not work with `processor_type: {data['processor_type']}` and `rl: spin`"
    found = []
    if not data.get("skip_prepare_dataset"):
        found.append(
            f"`skip_prepare_dataset` left out {with_them}: pictures are processed with each batch; set it to `true`, with "
            "`remove_unused_columns: false` and `sample_packing: false`, or remove `processor_type` where all is text (a "
            "model that takes more keeps its processor without it)"
        )
    if data.get("sample_packing"):
        found.append(f"`sample_packing: true` {with_them}: prompts with pictures are not packed; set it to `false`")
    spin = _block(data, "spin")
    generation = _block(spin, "generation")
    if generation.get("gather_weights") is False and (
        data.get("deepspeed") or data.get("fsdp_config") or data.get("fsdp")
    ):
        found.append(
            f"`spin.generation.gather_weights: false` {with_them} and sharded weights: not every forward needs a tower's, "
            "which ranks would gather together; set it to `true`"
        )
    if spin.get("turns") == "all":
        found.append(
            f"`spin.turns: all` {with_them}: a row's pictures belong to the prompt of its last answer; use `last`"
        )
    if spin.get("initial_pairs"):
        found.append(f"`spin.initial_pairs` {with_them}: pairs of a file have no pictures; remove it")
    return found


def _block(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def refuse_leftovers(data: dict[str, Any]) -> None:
    """Refuses what a config keeps of another method in whose place `rl: spin` was written.

    Args:
        data: The config as the user wrote it: the host fills in defaults, and drops keys from its entries of `datasets`.

    Raises:
        ValueError: Names each key, or the dataset that holds preferences.
    """
    named = {key for key, _, _ in REFUSED}
    found = [
        f"`{key}:` is a block of another method: {why}; remove it"
        for key, why in _OTHER_BLOCKS.items()
        if data.get(key)
    ]
    found += [
        f"`{key}: {value}` is another method's and says nothing to `rl: spin`{_OTHERS_KEYS.get(key, '')}; remove it"
        for key, value in data.items()
        if value and key not in named and _is_of_another_method(key)
    ]
    for name in ("datasets", "test_datasets"):
        entries = data.get(name)
        for place, entry in enumerate(entries if isinstance(entries, (list, tuple)) else ()):
            if isinstance(entry, dict) and (what := _preferences(entry)):
                found.append(
                    f"`{name}[{place}]` ({entry.get('path')}) holds preferences ({what}): SPIN needs no rejected answers, "
                    "and makes its own; give it prompts with one human answer each, in a format of SFT such as "
                    "`type: chat_template`"
                )
    if found:
        raise ValueError("\n".join(found))


def _is_of_another_method(key: Any) -> bool:
    return key in _OTHERS_KEYS or str(key).startswith(_OTHER_METHODS)


def refused_keys(keys: Iterable[str]) -> dict[str, str | None]:
    """Returns which of the host's keys are of no use here, whatever they say, each with the key of ours in its place.

    Args:
        keys: The host's.
    """
    refused = {key for key, test, _ in REFUSED if test in (_truthy, above_one)} | _OTHER_BLOCKS.keys()
    return {key: _IN_PLACE.get(key) for key in keys if key in refused or _is_of_another_method(key)}


def _preferences(entry: dict[str, Any]) -> str | None:
    """Returns by what an entry of `datasets:` is known to hold preferences, or None."""
    kind = entry.get("type")
    columns = {**entry, **(kind if isinstance(kind, dict) else {})}
    for key in ("field_chosen", "field_rejected", "chosen_format", "rejected_format"):
        if columns.get(key):
            return f"`{key}: {columns[key]}`"
    if isinstance(kind, str) and kind.startswith(_PREFERENCES):
        return f"`type: {kind}`"
    return None
