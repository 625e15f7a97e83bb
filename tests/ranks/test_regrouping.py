"""A ZeRO run goes on with fewer ranks and with more, and ends as the one whose number never changed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import pytest
from recovery import settings_in
from test_restarts import check_same
from warm import Ranks

from axolotl_spin.run.regrouping import make_universal, why_not_regrouped


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.parametrize("kind", [pytest.param("zero2", marks=pytest.mark.faults), "zero3"])
def test_zero_goes_on_with_another_number_of_ranks(kind: str, warm_ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks, one from the midst of iteration 0 on, two again from the midst of iteration 1 on.

    Weight decay sets the optimizer's two groups apart.
    """
    changes = {**settings_in(tmp_path, tmp_path), **host.layout(kind, tmp_path), "weight_decay": 0.1}
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    zero = json.loads(Path(changes["deepspeed"]).read_text())

    def train(ranks: int, out: str, kill: str = "") -> host.Run:
        path = tmp_path / f"{kind}-{ranks}.json"
        path.write_text(json.dumps({**zero, "gradient_accumulation_steps": 4 // ranks}))
        split = {"deepspeed": str(path), "gradient_accumulation_steps": 4 // ranks, "output_dir": str(tmp_path / out)}
        by = Ranks(warm_ranks.warm[:ranks])
        return host.train({**changes, **split}, kind, env={"SPIN_KILL": kill}, fails=bool(kill), by=by)

    whole = train(2, "whole")
    first = train(2, "moved", kill="train/after a checkpoint")
    second = train(1, "moved", kill="iteration 1/second epoch")
    last = train(2, "moved")
    for killed, run in ((first, second), (second, last)):
        assert "killed at: " in killed.output, killed.output[-6000:]
        assert "going on from" in run.output and "for another number of ranks" in run.output
    steps = [int(run.output.partition("(step ")[2].split()[0]) for run in (second, last)]
    assert 0 < steps[0] < 8 < steps[1] < 24
    check_same(last, whole)
    assert not list(last.out.rglob("*universal*"))


def config(optimizer: str = "adamw_torch", section: str | None = None, stage: int = 3, **zero: Any) -> Any:
    deepspeed = {"zero_optimization": {"stage": stage, **zero}, "optimizer": section and {"type": section}}
    return SimpleNamespace(optimizer=optimizer, deepspeed=deepspeed)


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (config("adamw_torch_fused"), ""),
        (config("adamw_bnb_8bit", section="AdamW"), ""),
        (config(stage=0), "only shards of ZeRO-1, ZeRO-2 and ZeRO-3"),
        (config("adamw_bnb_8bit"), "`optimizer: adamw_bnb_8bit` is none of adamw_torch"),
        (config(section="Lion"), "the `deepspeed` config's optimizer is Lion"),
        (config(offload_optimizer={"device": "nvme"}), "offloaded to `nvme`"),
        (config(offload_optimizer={"device": "cpu"}), ""),
    ],
)
def test_what_deepspeed_cannot_write_out_is_told_before_a_model_loads(cfg: Any, why: str) -> None:
    assert why in why_not_regrouped(cfg) and bool(why) == bool(why_not_regrouped(cfg))


def test_shards_that_deepspeed_cannot_write_out_are_named(tmp_path: Path) -> None:
    shards = tmp_path / "checkpoint-3" / "global_step3"
    shards.mkdir(parents=True)
    (shards.parent / "latest").write_text("global_step3")
    with pytest.raises(
        RuntimeError, match=r"could not write .*global_step3 out .*optim_states.* start as many as before"
    ):
        make_universal(shards.parent)
    assert [path.name for path in shards.parent.iterdir() if "universal" in path.name] == []
