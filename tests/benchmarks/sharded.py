"""Answering prompts on two ranks: sharded weights gathered for the phase, and at every forward, against DDP.

Two real ranks run the host on a CPU, as the tests do; every run answers the same prompts and ends before its first step.
The seconds are those that a run reports, gathering included. Called by `run.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import workload

BATCH = 8
SHARDED = ("zero3", "fsdp2")


def measure(folder: Path, model: str, *, prompts: int, few: int, most: int, repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of the table; none where there is an accelerator, which the two ranks would have to share.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        prompts: How many are answered where weights are gathered once, which costs the less the longer a phase is.
        few: How many where they are gathered at every forward.
        most: Most tokens in an answer; half as many for the few.
        repeats: Of each contestant; medians count.
    """
    import torch

    if torch.cuda.is_available():
        return []
    rows = []
    for gather, count, limit in (("auto", prompts, most), (False, few, most // 2)):
        rates: dict[str, list[float]] = {}
        for _ in range(repeats):
            for layout in ("ddp", *SHARDED):
                rate = _tokens_per_second(folder, model, layout, gather, prompts=count, most=limit)
                rates.setdefault(layout, []).append(rate)
        speed = {layout: median(found) for layout, found in rates.items()}
        rows += [
            {
                "figure": f"generation on 2 ranks, tokens/s, {layout}, gather_weights: {str(gather).lower()}",
                "workload": f"{model}, {count} prompts, batch {BATCH}, at most {limit} tokens, one thread a rank",
                "value": speed[layout],
                "against": "DDP",
                "other": speed["ddp"],
                "ratio": speed[layout] / speed["ddp"],
                "target": "",
            }
            for layout in SHARDED
        ]
    return rows


def _tokens_per_second(folder: Path, model: str, layout: str, gather: Any, *, prompts: int, most: int) -> float:
    import host

    work = folder / "sharded"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    generation = {"max_new_tokens": most, "batch_size": BATCH, "gather_weights": gather}
    spin = {"iterations": 1, "save_iterations": False, "max_prompts": prompts, "generation": generation}
    changes = {**host.layout(layout, work), "gradient_accumulation_steps": 2, "output_dir": str(work / "out")}
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "bench_plugin.BenchPlugin", *workload.OURS]
    launcher, marks = host.launcher(layout)
    env = {"ACCELERATE_USE_CPU": None, "OMP_NUM_THREADS": "1", **marks}
    metrics = work / "out" / "spin" / "iteration-0" / "metrics.json"
    try:
        settings = workload.settings(folder, model, spin=spin, **changes)
        workload.run(work, settings, launcher=launcher, BENCH_STOP="pairs", **env)
    except RuntimeError:
        if not metrics.exists():  # a rank may find the other one gone: both end when the pairs are there
            raise
    return json.loads(metrics.read_text())["spin/generation_tokens_per_second"]
