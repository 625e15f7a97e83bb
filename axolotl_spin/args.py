"""The claim of `rl: spin`: what the plugin adds to the host's config schema.

Only pydantic is imported here: the host loads this module for every config of an environment in
which the package is installed. `settings/` holds the block's keys, `refusals.py` what SPIN cannot work with.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from axolotl_spin.keys import levels, refuse_misplaced
from axolotl_spin.refusals import refuse_unsupported, refused_keys
from axolotl_spin.set_aside import set_aside
from axolotl_spin.settings.spin import SpinConfig


class SpinArgs(BaseModel):
    """What the plugin adds to the host's config schema: the `spin:` block, switched on by `rl: spin`."""

    spin: SpinConfig | None = Field(default=None, description="Self-Play Fine-Tuning settings; used with `rl: spin`.")

    @model_validator(mode="before")
    @classmethod
    def _claim(cls, data: Any) -> Any:
        """Turns `rl: spin` into the host's SFT path plus an active `spin` block.

        Runs ahead of the host's own RL checks, which do not know the value `spin`.

        Raises:
            ValueError: A `spin:` block without `rl: spin`, or a key that SPIN cannot work with.
        """
        if not isinstance(data, dict):
            return data
        block = data.get("spin")
        if isinstance(block, SpinConfig):
            block = block.model_dump()
        if data.get("rl") == "spin":
            # the class has the fields of the host's schema and of every other plugin's
            keys = cls.model_fields.keys()
            refuse_misplaced(data, levels(SpinConfig), keys, refused_keys(keys))
            if block is not None and not isinstance(block, dict):
                raise ValueError(f"spin: expected a block of keys, got {block!r}")
            data["rl"] = None
            data["spin"] = {**(block or {}), "active": True}
            set_aside(data)
        elif data.get("inference"):
            data["spin"] = None  # `axolotl inference` takes `rl` out of the config
        elif block is not None and not (isinstance(block, dict) and block.get("active")):
            raise ValueError(
                "the config has a `spin:` block, but `rl` is "
                f"{data.get('rl')!r}: write `rl: spin` to train by self-play, or remove the block"
            )
        if data.get("spin"):
            refuse_unsupported(data)
        return data


def is_on(cfg: Any) -> bool:
    """Whether a validated host config says `rl: spin`."""
    block = cfg.get("spin")
    return bool(block and block.get("active"))


def spin_config(cfg: Any) -> SpinConfig | None:
    """Returns the typed `spin` block of a validated host config, or None when SPIN is off."""
    if not is_on(cfg):
        return None
    block = cfg.get("spin")
    return SpinConfig.model_validate(block.to_dict() if hasattr(block, "to_dict") else dict(block))
