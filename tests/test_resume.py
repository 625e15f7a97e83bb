"""A resumed run ends as one that was never stopped: same answers, log-probs, losses and weights, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import host
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.host

# iteration 0: 2 epochs of 10 steps; iteration 1: 2 epochs of 19; a checkpoint every 6 steps and at each iteration's end
CHANGES = {"num_epochs": 2, "save_strategy": None, "save_steps": 6, "save_total_limit": 100, "val_set_size": 3}
STOPS = {6: "in mid-iteration 0", 18: "at iteration 0's end", 24: "in mid-iteration 1", 48: "in its second epoch"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, host.Run]:
    folder = tmp_path_factory.mktemp("resume")
    settings = {**host.config(folder), **CHANGES}
    settings = {key: value for key, value in settings.items() if value is not None}
    return settings, host.train(settings)


def weights(run: host.Run) -> dict[str, torch.Tensor]:
    return load_file(run.out / "model.safetensors")


@pytest.mark.parametrize("stop", STOPS, ids=lambda step: STOPS[step].replace(" ", "-"))
def test_resumed_run_equals_the_whole_one(whole: tuple[dict, host.Run], stop: int, tmp_path: Path) -> None:
    settings, run = whole
    # 34 prompts: 9 steps an epoch, then 68 pairs and 17 steps
    assert sorted(int(p.name.split("-")[1]) for p in run.out.glob("checkpoint-*"))[:4] == [6, 12, 18, 24]
    out = tmp_path / "out"
    shutil.copytree(run.out, out)
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > stop:
            shutil.rmtree(path)
    (out / "model.safetensors").unlink()
    resumed = host.train({**settings, "output_dir": str(out)})
    for iteration in range(2):
        assert resumed.pairs(iteration).equals(run.pairs(iteration))
        ours, theirs = resumed.metrics(iteration), run.metrics(iteration)
        for name in ("loss_first", "loss_last", "eval_loss", "rewards/margins"):
            assert ours[name] == theirs[name], name
    expected = [row["loss"] for row in run.logs() if "loss" in row]
    assert [row["loss"] for row in resumed.logs() if "loss" in row] == expected
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(resumed).items())
    later = out / "spin" / "replaced-1" / "iteration-1"
    assert later.exists() == (stop < 18)  # the run that got further is kept


def test_pairs_that_are_gone_are_not_made_by_half_trained_weights(whole: tuple[dict, host.Run], tmp_path: Path) -> None:
    settings, run = whole
    out = tmp_path / "out"
    shutil.copytree(run.out, out)
    for path in out.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 24:
            shutil.rmtree(path)
    (out / "spin" / "iteration-1" / "pairs.parquet").unlink()
    again = {**settings, "output_dir": str(out), "auto_resume_from_checkpoints": True}
    stopped = host.start(again, "-m", "axolotl.cli.train", "{config}")
    assert stopped.code != 0
    assert "put the file back, or resume from a checkpoint at the start of iteration 1" in stopped.output


def test_an_interrupted_generation_goes_on_with_the_missing_chunks(
    whole: tuple[dict, host.Run], tmp_path: Path
) -> None:
    settings, run = whole
    plugins = ["defects.DefectPlugin", *host.OURS]
    settings = {**settings, "output_dir": str(tmp_path / "out"), "plugins": plugins, "max_steps": 2}
    planted = {"SPIN_DEFECT": "dies_after_two_chunks"}
    stopped = host.start(settings, "-m", "axolotl.cli.train", "{config}", env=planted)
    assert stopped.code != 0 and "planted: out of memory" in stopped.output
    chunks = tmp_path / "out" / "spin" / "iteration-0" / "chunks"
    assert sorted(path.name for path in chunks.iterdir()) == ["000000.parquet", "000001.parquet"]
    resumed = host.train(settings)
    assert "2 of 5 chunks are already answered" in resumed.output
    assert resumed.pairs(0)["rejected_ids"] == run.pairs(0)["rejected_ids"]
    assert not chunks.exists()
    again = host.train(settings)  # the first opponent is the base model: its pairs are there for any start
    assert "using the pairs in" in again.output and "generated 34 answers" not in again.output
