"""Models that answer by `generate` on several ranks, which have unequal numbers of chunks."""

from __future__ import annotations

from pathlib import Path

import host
import pytest
from warm import Ranks, Warm

pytestmark = [pytest.mark.host, pytest.mark.ranks]


@pytest.fixture(scope="module")
def alone(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """Where model and data are, and the answers of one rank: 37 prompts in 5 chunks."""
    folder = tmp_path_factory.mktemp("generate")
    settings = host.config(folder, rows=37, spin=spin("auto"), plugins=["generate_only.GenerateOnlyPlugin", *host.OURS])
    return folder, host.train(settings, by=warm).pairs(0)["rejected_ids"].to_pylist()


def spin(gather: str | bool) -> dict:
    return {"iterations": 1, "generation": {"max_new_tokens": 6, "batch_size": 8, "gather_weights": gather}}


ONCE = [pytest.param(name, marks=pytest.mark.once) for name in ("fsdp2", "zero3-lora")]


@pytest.mark.parametrize("gather", [pytest.param(True, marks=pytest.mark.once), False])
@pytest.mark.parametrize("layout", ["zero3", *ONCE, "fsdp2-lora"])
def test_ranks_with_unequal_chunks_answer_and_end(
    layout: str, gather: bool, alone: tuple[Path, list[list[int]]], warm_ranks: Ranks
) -> None:
    """Three chunks and two: `generate` would wait for a rank that has ended, at each token under ZeRO-3, and with FSDP2,
    for which the host wraps it, at its start. An adapter begins as nothing, so it answers as the model does.
    """
    folder, answers = alone
    kind, changes = layout.partition("-")[0], host.layout(layout, folder)
    plugins = ["cpu_cluster.CpuClusterPlugin", "generate_only.GenerateOnlyPlugin", *host.OURS]
    out = str(folder / f"{layout}-{gather}")
    settings = host.config(folder, **{**changes, "spin": spin(gather), "plugins": plugins, "output_dir": out})
    run = host.train(settings, kind, by=warm_ranks, timeout=300)
    assert run.pairs(0)["rejected_ids"].to_pylist() == answers
