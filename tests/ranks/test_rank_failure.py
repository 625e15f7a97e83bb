"""An exception on one rank ends the others within seconds, with its message, and without a launcher's help.

The two ranks are started by hand, as on two machines: nothing but the run itself can tell one of the other's failure.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import host
import pytest
import yaml
from warm import Ranks

pytestmark = [pytest.mark.host, pytest.mark.ranks, pytest.mark.once]


@pytest.mark.parametrize(
    ("kind", "point", "rank"),
    [
        ("ddp", "generate/first answers drawn", 1),
        ("ddp", "score/first batch", 0),  # the rank that holds the store
        ("zero3", "generate/first answers drawn", 1),
        ("fsdp2", "score/first batch", 1),
    ],
)
def test_the_other_rank_stops_and_says_why(kind: str, point: str, rank: int, warm_ranks: Ranks, tmp_path: Path) -> None:
    settings = {**host.config(tmp_path), **host.layout(kind, tmp_path)}
    settings["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    fault = {"SPIN_KILL": point, "SPIN_KILL_RANK": str(rank), "SPIN_RAISE": "planted: out of memory"}
    env = host.environment(**host.rank_environment(kind), **fault)
    logs = [tmp_path / f"rank{index}.log" for index in range(2)]
    ranks = warm_ranks.start("axolotl.cli.train", "run.yml", env=env, cwd=tmp_path, logs=logs)
    try:
        assert ranks[rank].wait(timeout=300) == 1
        failed = time.monotonic()
        assert ranks[1 - rank].wait(timeout=60) == 1
        assert time.monotonic() - failed < 15
    finally:
        for fork in ranks:
            if fork.alive():
                fork.end(signal.SIGKILL)
    message = f"rank {rank} failed: RuntimeError: planted: out of memory"
    assert message in logs[1 - rank].read_text(), logs[1 - rank].read_text()[-3000:]
    assert f"{message}" in logs[rank].read_text() and "telling the other ranks" in logs[rank].read_text()
