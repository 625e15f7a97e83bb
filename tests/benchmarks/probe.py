"""What a benchmark sees of a trainer from within: the time of each training step and the memory of the process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback


def resident(field: str = "VmRSS") -> int:
    """Returns a figure of this process's memory in bytes; `VmHWM` is the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Makes what is resident now the peak."""
    Path("/proc/self/clear_refs").write_text("5")


class Probe(TrainerCallback):
    """Times the steps, the first one apart: it makes the optimizer's state and fills caches.

    Args:
        path: Where the figures go when training ends.
        baseline: Bytes that are resident before a model is loaded.
        stop: "begin" or "pairs" where training is not wanted; see `bench_plugin.py`.
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
