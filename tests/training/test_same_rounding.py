"""In bf16 the opponent is rounded as the policy is: a run that does not move has a loss of ln 2 at every step.

A pair's log-probs move by 0.05 nats at this size where other pairs stand in its micro-batch; beta 5 makes 0.1 of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import host
import pytest
from warm import Ranks, Warm

pytestmark = pytest.mark.host

LN2 = pytest.approx(math.log(2), abs=1e-3)
# 13 pairs are steps of 4, 4, 4 and 1, for which the second of two ranks has none; then 26 with those kept
STILL: dict[str, Any] = {
    "bfloat16": True,
    "learning_rate": 1e-12,
    "num_epochs": 2,
    "save_steps": 3,
    "spin": {"iterations": 2, "beta": 5.0, "generation": {"max_new_tokens": 10, "batch_size": 8}},
}
STEPS = 2 * 4 + 2 * 7


def settings(folder: Path, ranks: int = 1) -> dict[str, Any]:
    two = ["cpu_cluster.CpuClusterPlugin"] if ranks > 1 else []
    plugins = [*two, "faults.FaultPlugin", "half.LayoutPlugin", "half.HalfPlugin", *host.OURS]
    return host.config(folder, rows=13, plugins=plugins, gradient_accumulation_steps=2 // ranks, **STILL)


def holds_still(run: host.Run, layout: str) -> None:
    assert f"pairs are laid out {layout}:" in run.output
    rows = [json.loads(line) for line in (run.out / "spin" / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS
    assert losses == [LN2] * STEPS
    assert "is off by" not in run.output


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_every_loss_of_every_epoch_is_ln_2(layout: str, tmp_path: Path, warm: Warm) -> None:
    holds_still(host.train(settings(tmp_path), by=warm, env={"SPIN_LAYOUT": layout}), layout)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_every_loss_is_ln_2_on_two_ranks(layout: str, tmp_path: Path, warm_ranks: Ranks) -> None:
    holds_still(host.train(settings(tmp_path, 2), "ddp", by=warm_ranks, env={"SPIN_LAYOUT": layout}), layout)


@pytest.mark.ranks
def test_every_loss_is_ln_2_after_a_resume_on_two_ranks(tmp_path: Path, warm: Warm, warm_ranks: Ranks) -> None:
    """The pairs that one rank has scored are trained on by two, from the middle of an iteration."""
    stopped = settings(tmp_path)
    host.train(stopped, by=warm, env={"SPIN_KILL": "iteration 1/first epoch"}, fails=True)
    run = host.train(settings(tmp_path, 2), "ddp", by=warm_ranks)
    assert "going on from" in run.output and "iteration 1: using the pairs" in run.output
    holds_still(run, "shared")
