"""A test-only plugin that has a run take the layout named by SPIN_LAYOUT, whatever its model would prefer."""

from __future__ import annotations

import os
from typing import Any

from axolotl.integrations.base import BasePlugin


class LayoutPlugin(BasePlugin):
    """Stands in for the choice by attention: `packed` is flash attention's, which needs a GPU."""

    def get_input_args(self) -> None:
        layout = os.environ.get("SPIN_LAYOUT")
        if layout:
            from axolotl_spin.training import layout_check

            layout_check.preferred_layout = lambda *_, **__: (layout, "the test asks for it")

    def get_training_args(self, cfg: Any) -> None:
        return None
