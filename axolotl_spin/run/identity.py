"""What a run's results depend on, and whether what is on disk belongs to it.

Settings of two kinds decide a result. Some hold for the whole run (data, base model, seeds, optimizer, sampling): where one
of them differs, it is another run. The others (iterations, learning rates, betas, epochs, history) act through the plan, so
two runs are one as far as their plans have the same iterations: more may be appended at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from axolotl_spin.args import SpinConfig
from axolotl_spin.run.plan import Plan

# host keys that the result depends on for the whole run, beside the prompts themselves
_HOST_KEYS = (
    "base_model",
    "revision_of_model",
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_target_linear",
    "lora_modules_to_save",
    "peft_layers_to_transform",
    "lora_model_dir",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "load_in_4bit",
    "load_in_8bit",
    "bf16",
    "fp16",
    "sequence_len",
    "lr_scheduler",
    "lr_scheduler_kwargs",
    "cosine_min_lr_ratio",
    "cosine_constant_lr_ratio",
    "lr_div_factor",
    "embedding_lr",
    "embedding_lr_scale",
    "lr_groups",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
    "optimizer",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "unfrozen_parameters",
    "seed",
    "curriculum_sampling",
)
# keys that act through the plan's iterations alone
_PLANNED = ("learning_rate", "warmup_steps", "warmup_ratio", "num_epochs", "max_steps")
_PLANNED_SPIN = ("iterations", "beta", "learning_rate", "history")
# parameter groups with a rate of their own refer to the base rate
_GROUP_RATES = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
# settings of the spin block that change nothing in the result: another backend draws from the same distribution
# (and what is in a set of pairs counts, not where it is)
_HARMLESS = (
    *("initial_pairs", "save_iterations", "eval_prompts", "active"),
    *("generation.backend", "generation.gather_weights"),
)
_HARMLESS_BLOCK = "generation.vllm."


@dataclass(frozen=True)
class Identity:
    """What identifies a run.

    Attributes:
        fixed: Keys and values that hold for the whole run, as plain JSON.
        planned: Keys and values that act through `plan`, as plain JSON.
        iterations: The plan's iterations, as plain JSON.
    """

    fixed: dict[str, Any]
    planned: dict[str, Any]
    iterations: list[dict[str, Any]]

    @property
    def hash(self) -> str:
        """SHA-256 of the whole run."""
        return _hash(self.fixed, self.iterations)

    def before(self, iteration: int) -> str:
        """SHA-256 of what an iteration's opponent, and so its answers, depend on; its artifacts carry it."""
        entry = self.iterations[iteration]
        return _hash(self.fixed, [*self.iterations[:iteration], {"rows": entry["rows"], "kept": entry["kept_rows"]}])

    def through(self, iteration: int) -> str:
        """SHA-256 of what the weights within and after an iteration's training depend on; its checkpoints carry it."""
        return _hash(self.fixed, self.iterations[: iteration + 1])

    def to_json(self) -> dict[str, Any]:
        """Returns what `plan.json` keeps of this, from which `changes` can tell what differs."""
        return {"hash": self.hash, "fixed": self.fixed, "planned": self.planned}

    def changes(self, kept: dict[str, Any]) -> list[str]:
        """Compares with a `plan.json` found on disk.

        Args:
            kept: Its content.

        Returns:
            A line for each key whose change makes this another run, with both values; none where it is the same run,
            or one with iterations appended or left out at the end.
        """
        iterations = kept.get("iterations", [])
        lines = _differences(kept.get("fixed", {}), self.fixed)
        shared = min(len(iterations), len(self.iterations))
        if iterations[:shared] != self.iterations[:shared]:
            lines += _differences(kept.get("planned", {}), self.planned)
            lines = lines or ["  the plan's iterations"]
        return lines


def identify(cfg: Any, settings: SpinConfig, prompts: Any, plan: Plan, given: str | None = None) -> Identity:
    """Collects what identifies a run.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        prompts: The prompts (`datasets.Dataset` with `prompt_ids` and `chosen_ids`).
        plan: Made from them.
        given: Digest of the pairs that iteration 0 is given, if it is.
    """
    spin = {f"spin.{key}": value for key, value in _flat(settings.model_dump()) if not _harmless(key)}
    planned_spin = {f"spin.{key}" for key in _PLANNED_SPIN}
    fixed = {
        "data (prompts and human answers as token ids)": _content_hash(prompts),
        "global batch (micro_batch_size x gradient_accumulation_steps x ranks)": plan.global_batch,
        **{key: cfg.get(key) for key in _HOST_KEYS},
        **{key: value for key, value in spin.items() if key not in planned_spin},
    }
    if given is not None:
        fixed["spin.initial_pairs (pairs as token ids)"] = given
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, dict) and deepspeed.get("optimizer"):
        fixed["deepspeed.optimizer"] = deepspeed["optimizer"]
    if any(cfg.get(key) for key in _GROUP_RATES):
        fixed["learning_rate"] = cfg.get("learning_rate")
    planned = {**{key: cfg.get(key) for key in _PLANNED}, **{key: spin[key] for key in sorted(planned_spin)}}
    return Identity(_plain(fixed), _plain(planned), _plain([asdict(entry) for entry in plan.iterations]))


def _harmless(key: str) -> bool:
    return key in _HARMLESS or key.startswith(_HARMLESS_BLOCK)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"  {key}: {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text[:14] + "..." if len(text) == 66 and isinstance(value, str) else text  # a hash


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _content_hash(prompts: Any) -> str:
    """Hashes prompts and human answers, so that other data, another template or another tokenizer is another run."""
    digest = hashlib.sha256()
    for batch in prompts.with_format("arrow").iter(batch_size=1000):
        for name in ("prompt_ids", "chosen_ids"):
            column = batch[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy().tobytes())
            digest.update(column.flatten().to_numpy().tobytes())
    return digest.hexdigest()


def _flat(block: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    """Returns a value as it comes back from JSON, so that what was kept compares equal."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
