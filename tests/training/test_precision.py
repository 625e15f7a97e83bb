"""bf16 through the real host on a CPU: policy and opponent are rounded alike, in every layout, on ranks, after a stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import host
import pytest
from warm import Ranks, Warm

pytestmark = pytest.mark.host

# nothing moves at such a rate, and beta is the largest of the paper's
STILL = {"learning_rate": 1e-12, "num_epochs": 2, "bf16": None, "bfloat16": True, "lr_scheduler": "constant"}
SPIN = {"iterations": 2, "beta": 5.0, "generation": {"max_new_tokens": 30, "batch_size": 8}}


def config(folder: Path, kind: str = "single", rows: int = 25, **changes: Any) -> dict[str, Any]:
    """A model whose answers are long and whose attention is busy, so that its rounding shows."""
    settings = {**host.config(folder, rows=rows), **host.layout(kind, folder), **STILL, "spin": SPIN, **changes}
    own = [name for name in settings.get("plugins") or [] if name not in host.OURS]
    settings["plugins"] = ["half.HalfPlugin", "half.LayoutPlugin", *own, *host.OURS]
    return {key: value for key, value in settings.items() if value is not None}


def half_precision(settings: dict[str, Any]) -> dict[str, Any]:
    """Has DeepSpeed compute in bf16 as well."""
    if "deepspeed" in settings:
        path = Path(settings["deepspeed"])
        path.write_text(json.dumps({**json.loads(path.read_text()), "bf16": {"enabled": True}}))
    return settings


def strayed(run: host.Run) -> float:
    """Returns how far a logged loss is from ln 2 at the most."""
    losses = run.losses()
    assert losses
    return max(abs(loss - math.log(2.0)) for loss in losses)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_loss_is_ln_2_where_nothing_moves(layout: str, warm: Warm, tmp_path: Path) -> None:
    run = host.train(config(tmp_path), by=warm, env={"SPIN_LAYOUT": layout})
    assert f"laid out {layout}" in run.output
    assert len(run.losses()) == 2 * 7 + 2 * 13
    assert strayed(run) < 1e-8  # fp32's closest number; 0.02 to 0.03 where the opponent scores with other neighbours


@pytest.mark.once
def test_after_a_stop_too(warm: Warm, tmp_path: Path) -> None:
    """Killed in iteration 1's second epoch: the rest is trained on against the log-probs on disk."""
    settings = config(tmp_path, save_steps=5)
    settings["plugins"] = ["faults.FaultPlugin", *settings["plugins"]]
    host.train(settings, by=warm, env={"SPIN_KILL": "iteration 1/second epoch"}, fails=True)
    run = host.train(settings, by=warm)
    assert "going on from" in run.output and len(run.losses()) == 2 * 7 + 2 * 13
    assert strayed(run) < 1e-3


@pytest.mark.once
@pytest.mark.ranks
def test_one_rank_has_scored_what_two_are_trained_on(warm: Warm, warm_ranks: Ranks, tmp_path: Path) -> None:
    """Stopped on one rank in the midst of an iteration, resumed on two: the micro-batches are the same."""
    one = {**config(tmp_path, save_steps=3), "micro_batch_size": 1, "gradient_accumulation_steps": 4}
    one["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *one["plugins"]]
    host.train(one, by=warm, env={"SPIN_KILL": "iteration 1/second epoch"}, fails=True)
    run = host.train({**one, "gradient_accumulation_steps": 2}, "ddp", by=warm_ranks)
    assert "going on from" in run.output and strayed(run) < 1e-3


@pytest.mark.ranks
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.once) for kind in ("ddp", "zero2")), "zero3", "fsdp2"]
)
def test_on_two_ranks(kind: str, warm_ranks: Ranks, tmp_path: Path) -> None:
    run = host.train(half_precision(config(tmp_path, kind, rows=13)), kind, by=warm_ranks)
    assert len(run.losses()) == 2 * 4 + 2 * 7
    assert strayed(run) < 1e-3
