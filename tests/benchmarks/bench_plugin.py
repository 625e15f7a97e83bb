"""A plugin that attaches a probe to the host's trainer; listed in a run's `plugins:`, and set by environment variables:

BENCH_RESULT    file to which the probe writes its figures as JSON
BENCH_LAYOUT    lays pairs out so, whatever the model would take ("padded", "packed", "shared")
BENCH_STOP      "begin": ends the process before the first answer (without SPIN: the first step), with the seconds since
                its start; "pairs": ends it at the first step, when the pairs are on disk
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from probe import Probe, resident
from transformers import TrainerCallback

# the host imports them after it has loaded the model: no part of a step's memory
_LATE_IMPORTS = ("axolotl.core.builders", "axolotl.core.trainers.base", "trl", "axolotl.train")


def baseline() -> int:
    """Returns the bytes that are resident once everything is imported and before a model is loaded."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    return resident()


class BenchPlugin(BasePlugin):
    """Attaches the probe, and forces a layout where one is named."""

    def pre_model_load(self, cfg: Any) -> None:
        self.baseline = baseline() if os.environ.get("BENCH_STOP") is None else 0

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        layout = os.environ.get("BENCH_LAYOUT")
        if layout:
            from axolotl_spin.training import layout_check

            layout_check.preferred_layout = lambda *_, **__: (layout, "the benchmark asks for it")
        path = os.environ.get("BENCH_RESULT")
        if not path or int(os.environ.get("RANK", "0")):
            return [_Stop()] if os.environ.get("BENCH_STOP") == "pairs" else []
        return [Probe(Path(path), self.baseline, os.environ.get("BENCH_STOP"), trainer)]


class _Stop(TrainerCallback):
    """Ends the other ranks of a run that is not to train."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        os._exit(0)
