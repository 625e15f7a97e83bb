"""Nodes that do not see each other's files: rank 0's folder is the run's, and what the others need is brought to them.

Two ranks are two nodes here: each has a working folder of its own, in which all paths of the config are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host
import pytest
import yaml
from recovery import CHANGES, differences, outcome
from warm import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.once]


def node(folder: Path, kind: str = "ddp", **changes: Any) -> Path:
    """Makes a node's folder, with a model and data of its own, and a config in which nothing but it is named."""
    made = {
        **host.config(folder, rows=19),
        **host.layout(kind, folder),
        **CHANGES,
        "micro_batch_size": 1,
        "num_epochs": 1,
        "save_steps": 5,
    }
    made["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    made |= {"base_model": "model", "output_dir": "out", "dataset_prepared_path": "prepared", **changes}
    made["datasets"] = [{**made["datasets"][0], "path": "data.jsonl"}]
    if "deepspeed" in made:
        made["deepspeed"] = Path(made["deepspeed"]).name
    (folder / "run.yml").write_text(yaml.safe_dump(made))
    return folder


def start(ranks: Ranks, cwd: Path | list[Path], kind: str = "ddp", kill: str = "") -> tuple[int, str]:
    env = host.environment(**host.rank_environment(kind), SPIN_KILL=kill, SPIN_KILL_RANK="1")
    return ranks.run("axolotl.cli.train", "run.yml", env=env, cwd=cwd)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.host
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_two_nodes_with_folders_of_their_own_play_as_one(kind: str, warm_ranks: Ranks, tmp_path: Path) -> None:
    """Stopped while it generates and while it trains, the run ends as that of two ranks on one node."""
    one, first, second = (node(tmp_path / name, kind) for name in ("one", "first", "second"))
    code, output = start(warm_ranks, one, kind)
    assert code == 0, output[-6000:]
    assert "by the process group" not in output

    both = [first, second]
    assert start(warm_ranks, both, kind, kill="iteration 1/one chunk whole")[0] != 0
    assert (second / "out/spin/iteration-1/chunks/000001.parquet").exists()
    code, output = start(warm_ranks, both, kind, kill="iteration 1/resumed, after a checkpoint")
    assert code != 0 and "going on from out/checkpoint-4 " in output, output[-6000:]
    assert " of 16 prompts are already answered" in output
    code, output = start(warm_ranks, both, kind)
    assert code == 0 and "going on from out/checkpoint-10 " in output, output[-6000:]
    assert "is not one folder for all nodes, but 2" in output

    assert not differences(outcome(first / "out"), outcome(one / "out"))
    assert files(first / "out/checkpoint-12") == files(one / "out/checkpoint-12")
    assert {"checkpoint-12/rng_state_1.pth"} < files(first / "out")
    left = files(second / "out")
    assert not [name for name in left if name.startswith(("checkpoint", "spin")) and name != "spin/run.lock"], left
    assert "model.safetensors" not in left
