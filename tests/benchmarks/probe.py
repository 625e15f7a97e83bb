"""What a benchmark sees of a run from within: the time of each training step and the memory of the process.

`BenchPlugin` is listed in a run's `plugins:`; it attaches `Probe` to the host's trainer. Settings come by environment:

    BENCH_RESULT    file to which the probe writes its figures as JSON
    BENCH_LAYOUT    lays pairs out so, whatever the model would take ("padded", "packed", "shared")
    BENCH_STOP      "begin": ends the process before the first answer (without SPIN: the first step), with the seconds since
                    its start; "pairs": ends it at the first step, when the pairs are on disk
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

# the host imports them after it has loaded the model: no part of a step's memory
_LATE_IMPORTS = ("axolotl.core.builders", "axolotl.core.trainers.base", "trl", "axolotl.train")


def resident(field: str = "VmRSS") -> int:
    """Returns a figure of this process's memory in bytes; `VmHWM` is the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Makes what is resident now the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def baseline() -> int:
    """Returns the bytes that are resident once everything is imported and before a model is loaded."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    return resident()


class Probe(TrainerCallback):
    """Times the steps, the first one apart: it makes the optimizer's state and fills caches.

    Args:
        path: Where the figures go when training ends.
        baseline: Bytes that are resident before a model is loaded.
        stop: "begin" or "pairs" where training is not wanted; see the module.
        trainer: Of the host; a SPIN trainer says itself when an iteration begins.
    """

    def __init__(self, path: Path, baseline: int, stop: str | None = None, trainer: Any = None):
        self.path, self.baseline, self.stop, self.trainer = path, baseline, stop, trainer
        self.play: Any = None
        self.begun = time.perf_counter()
        self.ends: list[float] = []
        self.tokens: list[int] = []

    def iteration_begins(self) -> None:
        """Notes the time before the first answer; without SPIN, before the first step's data."""
        self.begun = time.perf_counter()
        if self.stop == "begin":
            spent = psutil.Process().cpu_times()
            figures = {
                "start_seconds": time.time() - psutil.Process().create_time(),
                "start_cpu_seconds": spent.user + spent.system,
            }
            self.path.write_text(json.dumps(figures))
            os._exit(0)

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.play = getattr(getattr(self.trainer, "loop", None), "self_play", None)
        if self.play is not None:
            self.play.begin = self._timed(self.play.begin)

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        if not self.ends and self.play is None:
            self.iteration_begins()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.stop == "pairs":
            os._exit(0)
        self.tokens.append(0)
        if len(self.ends) == 1:
            _cuda("reset_peak_memory_stats")
            forget_peak()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _cuda("synchronize")
        self.ends.append(time.perf_counter())

    def on_train_end(self, *_: Any, **__: Any) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - self.baseline
        steps = len(self.ends) - 1
        figures = {
            # from one step's end to another's: loading data and logging are part of training
            "step_seconds": (self.ends[-1] - self.ends[0]) / steps if steps else None,
            "iteration_seconds": self.ends[-1] - self.begun,
            "peak_bytes": peak,
            "most_tokens": max(self.tokens[1:], default=0),
        }
        self.path.write_text(json.dumps(figures))

    def _timed(self, begin: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.iteration_begins()
            return begin(*args, **kwargs)

        return timed

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if self.tokens and ids is not None:
            self.tokens[-1] += ids.numel()


def _cuda(function: str) -> None:
    import torch

    if torch.cuda.is_available():
        getattr(torch.cuda, function)()


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
