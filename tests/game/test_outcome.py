"""Through the host's command: the best iteration is kept, patience ends a run, and both survive a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import host
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from warm import Ranks, Warm

from axolotl_spin.cli import spin as spin_command
from axolotl_spin.disk.atomic import read_json

pytestmark = pytest.mark.host

# iteration 0 learns; the second one's learning rate breaks the model; the third is never begun
SPIN = {
    "iterations": 3, "sft_weight": 1.0, "learning_rate": [1e-2, 1.0, 1e-2], "keep": "best", "patience": 1,
    "eval_prompts": 6, "generation": {"max_new_tokens": 6, "batch_size": 8},
}  # fmt: skip


def settings(folder: Path, **spin: Any) -> dict[str, Any]:
    made = host.config(folder, rows=28, val_set_size=12, logging_steps=50, spin={**SPIN, **spin})
    return {**made, "plugins": ["faults.FaultPlugin", *host.OURS]}


def same(one: Path, other: Path) -> bool:
    """Whether two files hold the same weights, bit for bit."""
    weights = [load_file(path) for path in (one, other)]
    return weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def check(run: host.Run, weights: str = "model.safetensors", second_is: str = "worse") -> None:
    """The run ended after its second iteration, complete, and its final model is the first one's."""
    spin = run.out / "spin"
    plan, about, best = (read_json(spin / f"{name}.json") for name in ("plan", "about", "best"))
    second = plan["iterations"][1]
    assert plan["completed_steps"] == second["first_step"] + second["steps"] < plan["total_steps"]
    why = "the last iteration was no better by `eval_loss` than what was there before (`spin.patience: 1`)"
    assert about["completed"] and about["ended"] == {"step": plan["completed_steps"], "why": why}
    assert (best["best"], best["kept"], best["ended"]) == (0, 0, why)
    assert [entry["verdict"] for entry in best["iterations"]] == ["better", second_is]
    assert best["over_start"]["paired"] and best["iterations"][1]["paired"]
    assert same(run.out / weights, spin / "iteration-0" / "model" / weights)
    assert not (spin / "iteration-2").exists()
    assert "(iteration 0's, the best)" in run.output and f"steps: {why}" in run.output.replace("\n", " ")


@pytest.fixture(scope="module")
def ended(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> host.Run:
    return host.train(settings(tmp_path_factory.mktemp("ended")), by=warm)


def test_the_best_iteration_is_the_final_model(ended: host.Run) -> None:
    check(ended)
    models = [ended.out / "spin" / f"iteration-{iteration}" / "model" / "model.safetensors" for iteration in range(2)]
    assert not same(*models)  # so that the last one's in its place would be seen
    assert not list(ended.out.glob(".*"))
    # figures are on disk for the start model and both iterations
    for name in ("start", "iteration-0", "iteration-1"):
        assert {"heldout.parquet", "eval_rows.parquet"} <= {path.name for path in (ended.out / "spin" / name).iterdir()}


def test_a_rerun_and_the_commands_say_that_it_is_complete(ended: host.Run, warm: Warm) -> None:
    config = settings(ended.out.parent)
    before = (ended.out / "model.safetensors").stat().st_mtime_ns
    again = host.train(config, by=warm)
    assert "this run is complete (the last iteration was no better" in again.output and "spin.patience" in again.output
    assert (ended.out / "model.safetensors").stat().st_mtime_ns == before
    table = CliRunner().invoke(spin_command, ["table", str(ended.out)]).output
    assert "* 0" in table and "* best by `eval_loss`" in table and "complete: 12 of 20 steps, since the last" in table
    page = (ended.out / "spin" / "report.html").read_text()
    assert "complete: 12 of 20 steps" in page and "What changed on held-out prompts" in page and "0 ★" in page


@pytest.mark.once
@pytest.mark.parametrize("point", ["patience/has run out", "best/copied aside", "best/in place"])
def test_a_run_that_is_killed_at_its_end_ends_alike(ended: host.Run, warm: Warm, tmp_path: Path, point: str) -> None:
    """From the checkpoint of the second iteration's end, which no start takes for a reason to begin the third."""
    shutil.copytree(ended.out, tmp_path / "out")
    plan = read_json(tmp_path / "out" / "spin" / "plan.json")
    config = {**settings(ended.out.parent), "output_dir": str(tmp_path / "out")}
    begun = str(tmp_path / "out" / f"checkpoint-{plan['iterations'][0]['steps']}")
    killed = host.train({**config, "resume_from_checkpoint": begun}, by=warm, env={"SPIN_KILL": point}, fails=True)
    assert read_json(tmp_path / "out" / "spin" / "plan.json")["completed_steps"] is None, killed.output[-2000:]
    check(host.train(config, by=warm))
    assert not list((tmp_path / "out").glob(".model*"))


@pytest.mark.once
def test_with_more_patience_it_goes_on(ended: host.Run, warm: Warm, tmp_path: Path) -> None:
    """And `patience` and `keep` change nothing in what an iteration gives: the run goes on with what is there."""
    shutil.copytree(ended.out, tmp_path / "out")
    more = {**settings(ended.out.parent, patience=None, keep="last"), "output_dir": str(tmp_path / "out")}
    run = host.train(more, by=warm)
    assert "iteration 2: generated" in run.output and "iteration 1: generated" not in run.output
    best = read_json(run.out / "spin" / "best.json")
    assert (best["best"], best["kept"], best["ended"]) == (0, 2, None)
    assert same(run.out / "model.safetensors", run.out / "spin" / "iteration-2" / "model" / "model.safetensors")


def test_an_adapter_of_which_only_the_best_is_kept(warm: Warm, tmp_path: Path) -> None:
    """The second iteration hardly moves: what it gains is noise, and it is not the final model either."""
    made = {**settings(tmp_path, save_iterations=False, learning_rate=[1e-1, 1e-5, 1e-2]), **host.LORA}
    run = host.train(made, by=warm)
    check(run, "adapter_model.safetensors", second_is="noise")
    assert not (run.out / "spin" / "iteration-1" / "model").exists()
    assert read_json(run.out / "spin" / "best.json")["alone"] == 0


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [pytest.param("ddp", marks=pytest.mark.once), "fsdp2"])
def test_on_two_ranks(warm_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    run = host.train({**settings(tmp_path), **host.layout(layout, tmp_path)}, layout, by=warm_ranks)
    check(run)
