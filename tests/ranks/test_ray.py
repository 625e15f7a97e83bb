"""Ray Train as the host starts it: a killed worker fails the command, and the same command goes on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import faults
import host
import pytest
from recovery import settings_in
from test_restarts import KILLS, check_same
from warm import Ranks

PYTHON = os.environ.get("SPIN_RAY_PYTHON", "")
# in generation, scoring and training
TURNS = [KILLS[0], KILLS[1], KILLS[5]]
COMMAND = re.compile(r"```bash\n(for try in .*?)```", re.S)


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
@pytest.mark.ray
@pytest.mark.skipif(not PYTHON, reason="SPIN_RAY_PYTHON names no Python with Ray; `make test-ray` makes one")
def test_killed_workers_are_brought_back_on_ray(warm_ranks: Ranks, tmp_path: Path) -> None:
    """The loop of the documentation over two workers on a local Ray, of which one is killed in three of its turns."""
    changes = {**settings_in(tmp_path, tmp_path), **host.layout("ddp", tmp_path)}
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    whole = host.train({**changes, "output_dir": str(tmp_path / "whole")}, "ddp", by=warm_ranks)
    ray = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"GPU": 1}}
    settings = {**changes, **ray, "output_dir": str(tmp_path / "killed")}
    settings["plugins"] = ["on_ray.OnRayPlugin", *changes["plugins"]]
    faults.write_kills(tmp_path / "kills", TURNS)
    [loop] = COMMAND.findall((host.ROOT / "docs" / "clusters.md").read_text())
    command = loop.replace("axolotl train spin.yml", f"{PYTHON} -m axolotl.cli.train {host.write(settings)}")
    assert command != loop
    env = host.environment(
        **host.rank_environment("ddp"),
        SPIN_KILLS=str(tmp_path / "kills"),
        RAY_OVERRIDE_RESOURCES='{"CPU": 4, "GPU": 2}',
        RAY_USAGE_STATS_ENABLED="0",
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-12000:]
    assert faults.carried_out(tmp_path / "kills") == [point for point, _ in TURNS], output[-6000:]
    check_same(host.Run(0, output, tmp_path / "killed"), whole)
