"""What a run's results depend on, and whether what is on disk belongs to it.

Settings of two kinds decide a result. Some hold for the whole run (data, base model, seeds, optimizer, sampling): where one
of them differs, it is another run. The others (iterations, learning rates, betas, epochs, history) act through the plan, so
two runs are one as far as their plans have the same iterations: more may be appended at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from axolotl_spin.run.compared import host_defaults, host_values, reasons
from axolotl_spin.run.plan import Plan
from axolotl_spin.settings.spin import SpinConfig

VERSION = 2

# keys that act through the plan's iterations alone
_PLANNED = ("learning_rate", "warmup_steps", "warmup_ratio", "num_epochs", "max_steps")
_PLANNED_SPIN = ("iterations", "beta", "learning_rate", "history", "schedule_epochs")
# parameter groups with a rate of their own refer to the base rate
_GROUP_RATES = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio", "dion_lr")
# settings of the spin block that change nothing in the result: another backend draws from the same distribution
# (and what is in a set of pairs counts, not where it is). `patience` ends a run and `keep` picks among its models, but
# every iteration that is run gives the same weights
_HARMLESS = (
    *("initial_pairs", "save_iterations", "eval_prompts", "active", "select", "keep", "patience"),
    *("eval_tasks", "eval_limit", "eval_chat_template", "eval_confirm_run_unsafe_code"),
    *("generation.backend", "generation.gather_weights", "generation.batch_size"),
)
_HARMLESS_BLOCK = "generation.vllm."


@dataclass(frozen=True)
class Identity:
    """What identifies a run.

    Attributes:
        fixed: Keys and values that hold for the whole run, as plain JSON; those at their default are left out.
        planned: Keys and values that act through `plan`, as plain JSON.
        iterations: The plan's iterations, as plain JSON.
        values: All settings, those at their default too, as plain JSON: against which a run made by an earlier version is
            compared.
        defaults: What a key that `fixed` leaves out stands for, as plain JSON.
        version: Of what `fixed` holds. 1: 40 keys of the host's, whatever their value. 2: all but those of `NOT_COMPARED`.
    """

    fixed: dict[str, Any]
    planned: dict[str, Any]
    iterations: list[dict[str, Any]]
    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

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
        return {"hash": self.hash, "identity": self.version, "fixed": self.fixed, "planned": self.planned}

    def changes(self, kept: dict[str, Any]) -> list[str]:
        """Compares with a `plan.json` found on disk.

        Args:
            kept: Its content.

        Returns:
            A line for each key whose change makes this another run, with both values; none where it is the same run,
            or one with iterations appended or left out at the end.
        """
        iterations = kept.get("iterations", [])
        old = kept.get("fixed", {})
        lines = _differences(old, self.like(kept).fixed, self.defaults)
        shared = min(len(iterations), len(self.iterations))
        if iterations[:shared] != self.iterations[:shared]:
            lines += _differences(kept.get("planned", {}), self.planned, {})
            lines = lines or ["  the plan's iterations"]
        return lines

    def like(self, kept: dict[str, Any]) -> Identity:
        """Returns this identity in the form of a `plan.json` found on disk, so that what that run made is known by marks.

        Args:
            kept: Its content. A run made by an earlier version is compared on the keys that it has, and what it kept of
                keys that are not compared is taken as it is.
        """
        old, version = kept.get("fixed", {}), kept.get("identity", 1)
        given = {key: value for key, value in old.items() if not _is_compared(key)}
        if version == self.version:
            return replace(self, fixed={**self.fixed, **given})
        return replace(self, fixed={key: given.get(key, self.values.get(key)) for key in old}, version=version)


def identify(
    cfg: Any, settings: SpinConfig, prompts: Any, plan: Plan, given: str | None = None, pictures: str | None = None
) -> Identity:
    """Collects what identifies a run.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        prompts: The prompts (`datasets.Dataset` with `prompt_ids` and `chosen_ids`).
        plan: Made from them.
        given: Digest of the pairs that iteration 0 is given, if it is.
        pictures: Digest of the prompts' pictures, where they have some.
    """
    spin = {f"spin.{key}": value for key, value in _flat(settings.model_dump())}
    usual = {f"spin.{key}": value for key, value in _flat(SpinConfig().model_dump())}
    planned_spin = {f"spin.{key}" for key in _PLANNED_SPIN}
    host = host_values(cfg)
    values = _plain(
        {
            "data (prompts and human answers as token ids)": _content_hash(prompts),
            "global batch (micro_batch_size x gradient_accumulation_steps x ranks)": plan.global_batch,
            **host,
            **spin,
        }
    )
    if given is not None:
        values["spin.initial_pairs (pairs as token ids)"] = given
    if pictures is not None:
        values["data (pictures)"] = pictures
    defaults = _plain({**host_defaults(), **usual})
    kept = (key for key in values if key not in _PLANNED and _is_compared(key))
    fixed = {key: values[key] for key in kept if values[key] != defaults.get(key)}
    if any(host.get(key) for key in _GROUP_RATES):
        fixed["learning_rate"] = values.get("learning_rate")
    planned = {**{key: host.get(key) for key in _PLANNED}, **{key: spin[key] for key in sorted(planned_spin)}}
    iterations = _plain([entry.to_json() for entry in plan.iterations])
    return Identity(fixed, _plain(planned), iterations, values, defaults)


def _is_compared(key: str) -> bool:
    if key.startswith("spin."):
        return not _harmless(key.removeprefix("spin."))
    return key == "learning_rate" or not reasons(key)  # it is in `fixed` only where groups' rates refer to it


def _harmless(key: str) -> bool:
    return key in _HARMLESS or key in _PLANNED_SPIN or key.startswith(_HARMLESS_BLOCK)


def _differences(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    both = [(key, *(side.get(key, defaults.get(key)) for side in (old, new))) for key in sorted({*old, *new})]
    return [f"  {key}: {_short(before)} -> {_short(now)}" for key, before, now in both if before != now]


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
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
