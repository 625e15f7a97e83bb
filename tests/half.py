"""Test-only plugins: half precision on a CPU, and 4-bit weights on a CPU as a GPU keeps them."""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import BasePlugin


class HalfPlugin(BasePlugin):
    """Has the host compute in bf16 on a CPU, which it refuses by itself; the YAML says `bfloat16: true`."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True, "bf16": True}


class PlainBitsPlugin(BasePlugin):
    """Has bitsandbytes take this processor for one without AVX512-BF16, so that it never packs weights anew."""

    def pre_model_load(self, cfg: Any) -> None:
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


class LayoutPlugin(BasePlugin):
    """Has pairs laid out as SPIN_LAYOUT says, whatever the model's attention is."""

    def get_input_args(self) -> None:
        layout = os.environ.get("SPIN_LAYOUT")
        if layout:
            from axolotl_spin.training import layout_check

            layout_check.preferred_layout = lambda *_, **__: (layout, "the test asks for it")
