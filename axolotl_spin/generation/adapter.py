"""What PEFT is told of an adapter: by the host's keys, or by the saved one that a run begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# ranks of adapters that vLLM has kernels for
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# PEFT's names, and the host's keys for them
_KEYS = {
    "r": "lora_r",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "trainable_token_indices": "peft_trainable_token_indices",
    "layer_replication": "peft_layer_replication",
    "init_lora_weights": "peft_init_lora_weights",
    "use_dora": "peft_use_dora",
}
_LOFTQ = "peft.loftq_config.loftq_bits"


@dataclass(frozen=True)
class Adapter:
    """An adapter's settings.

    Attributes:
        settings: By PEFT's names, as in `adapter_config.json`.
        keys: The host's keys that gave them, by PEFT's names.
        saved: The `lora_model_dir` that they were read from, whose settings the host takes; None where its keys count.
    """

    settings: Mapping[str, Any]
    keys: Mapping[str, str]
    saved: str | None = None

    @property
    def by_module(self) -> str | None:
        """PEFT's name of a setting that gives some modules a rank or alpha of their own; None where all have the same."""
        return next((name for name in ("rank_pattern", "alpha_pattern") if self.settings.get(name)), None)

    def named(self, name: str) -> str:
        """Returns a setting as the user finds it: `key: value`, or what is saved of it.

        Args:
            name: PEFT's.
        """
        value = self.settings.get(name)
        if self.saved is None:
            return f"`{self.keys.get(name, name)}: {value}`"
        return f"`lora_model_dir: {self.saved}` (its adapter_config.json has `{name}: {value}`)"


def adapter_of(cfg: Any) -> Adapter:
    """Returns the adapter of a run.

    Args:
        cfg: The host's normalized config; it has an `adapter`.

    Raises:
        ValueError: `lora_model_dir` cannot be read.
    """
    if cfg.lora_model_dir:
        saved = saved_adapter(cfg.lora_model_dir)
        kind = getattr(saved.peft_type, "value", None)
        return Adapter({**saved.to_dict(), "peft_type": kind}, {}, str(cfg.lora_model_dir))
    settings, keys = {name: cfg.get(key) for name, key in _KEYS.items()}, dict(_KEYS)
    loftq = ((cfg.get("peft") or {}).get("loftq_config") or {}).get("loftq_bits")
    if loftq and not settings["init_lora_weights"]:  # which counts, where both are set
        settings["init_lora_weights"], keys["init_lora_weights"] = "loftq", _LOFTQ
    return Adapter(settings, keys)


def saved_adapter(folder: Any) -> Any:
    """Returns the settings (`peft.PeftConfig`) of a saved adapter.

    Args:
        folder: The host's `lora_model_dir`.

    Raises:
        ValueError: It cannot be read.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`lora_model_dir: {folder}`: no adapter can be read there: {error}") from error


def largest_rank(settings: Mapping[str, Any]) -> int | None:
    """Returns the largest rank of an adapter's modules; None where none is set.

    Args:
        settings: By PEFT's names.
    """
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    return max((int(rank) for rank in ranks if rank), default=None)


def served_rank(rank: int) -> int:
    """Returns vLLM's `max_lora_rank` for adapters of a rank: the least that it has kernels for."""
    return next((known for known in LORA_RANKS if known >= rank), rank)
