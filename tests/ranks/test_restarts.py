"""Ranks that are killed and started again by their launcher end as a run that was never stopped, without a person."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import faults
import host
import pytest
from recovery import settings_in
from safetensors.torch import load_file
from warm import Ranks

from axolotl_spin.ranks.restarts import warn_of_going_back, warn_of_shared_store

# as docs/clusters.md has it; PyTorch's agent else keeps the store with the addresses of the dead
ELASTIC = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# a point and a rank for each start; what counts calls counts them from that start on
KILLS = [
    ("generate/chunk whole", 0),
    ("score/first batch", 1),
    ("checkpoint/model saved", 1),
    ("iteration end/model written aside", 0),
    ("iteration 1/optimizer restarting", 1),
    ("iteration 1/first epoch", 1),
    ("final/before the save", 0),
]
FEW = [KILLS[5]]


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param("fsdp2", FEW, id="fsdp2"),
        *(
            pytest.param(kind, KILLS, id=f"{kind}-everywhere", marks=pytest.mark.faults)
            for kind in ("ddp", "zero3", "fsdp2")
        ),
    ],
)
def test_torchrun_brings_killed_ranks_back(
    kind: str, kills: list[tuple[str, int]], warm_ranks: Ranks, tmp_path: Path
) -> None:
    """One command, in which torchrun starts both ranks again whenever one is killed."""
    changes = {**settings_in(tmp_path, tmp_path), **host.layout(kind, tmp_path)}
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    whole = host.train({**changes, "output_dir": str(tmp_path / "whole")}, kind, by=warm_ranks)
    faults.write_kills(tmp_path / "kills", kills)
    _, marks = host.launcher(kind)
    launch = f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts {len(kills)}".split()
    run = host.start(
        {**changes, "output_dir": str(tmp_path / "killed")},
        *launch,
        *("-m", "axolotl.cli.train", "{config}"),
        env={**marks, **ELASTIC, "SPIN_KILLS": str(tmp_path / "kills")},
        timeout=1500,
    )
    assert run.code == 0, run.output[-12000:]
    assert faults.carried_out(tmp_path / "kills") == [point for point, _ in kills]
    assert "restarted ranks would read the addresses" not in run.output
    check_same(run, whole)


def check_same(run: host.Run, whole: host.Run) -> None:
    """Holds a run on several ranks to one that was never stopped: the same answers, losses and weights to 1e-5."""
    for iteration in range(2):
        assert run.pairs(iteration)["rejected_ids"] == whole.pairs(iteration)["rejected_ids"]
    assert run.losses() == pytest.approx(whole.losses(), abs=1e-5)
    final, expected = (load_file(one.out / "model.safetensors") for one in (run, whole))
    assert final.keys() == expected.keys()
    for name, tensor in final.items():
        assert tensor.allclose(expected[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
        ({}, False),
    ],
)
def test_restarts_that_would_share_a_store_are_warned_of(
    environment: dict[str, Any], warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        warn_of_shared_store()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warned


@pytest.mark.parametrize(
    ("environment", "cfg", "said"),
    [
        (
            {"TORCHELASTIC_MAX_RESTARTS": "3"},
            {"resume_from_checkpoint": "a/checkpoint-6"},
            "`resume_from_checkpoint: a/ch",
        ),
        (
            {"SLURM_RESTART_COUNT": "1"},
            {"auto_resume_from_checkpoints": False},
            "`auto_resume_from_checkpoints: false`",
        ),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, {"auto_resume_from_checkpoints": None}, ""),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, {"resume_from_checkpoint": "a/checkpoint-6"}, ""),
        ({}, {"auto_resume_from_checkpoints": False}, ""),
    ],
)
def test_restarts_that_would_each_go_back_are_warned_of(
    environment: dict[str, str], cfg: dict, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        warn_of_going_back(cfg)
    assert said in caplog.text and bool(said) == bool(caplog.text)
