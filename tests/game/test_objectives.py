"""The objectives and the parts of a plan through the host's command: what is trained on is what the settings say.

One run has them all: `space` with rewards per token, a part of the prompts each time, a schedule longer than what is run.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import host
import pytest
from recovery import CHANGES, differences, outcome
from warm import Ranks, Warm

from axolotl_spin.data.slices import prompt_slice
from axolotl_spin.training.batches import MicroBatches

pytestmark = pytest.mark.host

PART = 6
SPIN: dict[str, Any] = {
    "iterations": 2,
    "loss": "space",
    "length_normalized": True,
    "prompts_per_iteration": PART,
    "schedule_epochs": 5,
    "generation": {"max_new_tokens": 8, "batch_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("objectives")
    host.config(made, rows=19)
    return made


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Two epochs of each iteration: 6, then 12 pairs, four in a step; 4 and 6 steps."""
    made = host.config(folder, **{**CHANGES, "spin": SPIN, "output_dir": str(folder / name), "logging_steps": 1})
    return {**made, "gradient_accumulation_steps": 2, "micro_batch_size": 2, **changes}


@pytest.fixture(scope="module")
def single(folder: Path, warm: Warm) -> host.Run:
    return host.train(settings(folder, "single"), by=warm)


def test_it_starts_where_space_does(single: host.Run) -> None:
    assert [single.metrics(iteration)["loss_first"] for iteration in range(2)] == pytest.approx([2 * math.log(2)] * 2)
    assert "is off by" not in single.output
    assert [single.metrics(iteration)["spin/beta"] for iteration in range(2)] == [1.0, 1.0]
    assert min(single.losses()) < 2 * math.log(2) - 0.01


def test_each_iteration_answers_its_part_of_the_prompts(single: host.Run) -> None:
    """16 prompts: 6, another 6 beside those that are kept; texts, rows and answers belong together."""
    new = [[row for row in single.pairs(i).to_pylist() if row["generated_in"] == i] for i in range(2)]
    assert [single.pairs(i).num_rows for i in range(2)] == [PART, 2 * PART]
    rows = [[row["row"] for row in of_iteration] for of_iteration in new]
    assert rows == [prompt_slice(16, PART, number, seed=7).tolist() for number in range(2)]
    assert not {*rows[0]} & {*rows[1]}
    kept = [row["row"] for row in single.pairs(1).to_pylist() if row["generated_in"] == 0]
    assert kept == rows[0]
    assert "iteration 1: generated 6 answers" in single.output


def test_the_rate_follows_the_longer_schedule(single: host.Run) -> None:
    """Linear with two steps of warmup over 5 epochs: of 10 steps 4 are taken, of 15 steps 6."""
    rates = [row["learning_rate"] for row in single.logs() if "loss" in row]
    expected = [
        1e-3 * min(step / 2, (whole - step) / (whole - 2))
        for whole, taken in ((10, 4), (15, 6))
        for step in range(taken)
    ]
    assert rates == pytest.approx(expected)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "per_token"), [("sigmoid", True), ("hinge", True), ("space", True), ("hinge", False), ("space", False)]
)
def test_loss_and_rewards_of_every_step(folder: Path, warm: Warm, kind: str, per_token: bool) -> None:
    """One pair in a step, so that the log has its log-probs, from which its rewards and its loss follow by hand."""
    spin = {"iterations": 1, "loss": kind, "beta": 0.7, "length_normalized": per_token, "eval_prompts": 0}
    name = f"{kind}-{per_token}"
    changes: dict[str, Any] = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1}
    block = {**spin, "generation": SPIN["generation"], "save_iterations": False}
    run = host.train(settings(folder, name, **changes, spin=block), by=warm)
    rows = run.pairs(0).to_pylist()
    order = [int(batch[0]) for batch in MicroBatches(len(rows), micro_batch=1, step=1, seed=7, first_epoch=0)]
    logs = [row for row in run.logs() if "rewards/chosen" in row]
    assert len(logs) == len(rows) == 16
    for log, pair in zip(logs, (rows[index] for index in order), strict=True):
        rewards = [
            0.7
            * (log[f"logps/{side}"] - pair[f"opponent_{side}_logp"])
            / (len(pair[f"{side}_ids"]) if per_token else 1)
            for side in ("chosen", "rejected")
        ]
        assert [log["rewards/chosen"], log["rewards/rejected"]] == pytest.approx(rewards, abs=1e-5)
        margin = rewards[0] - rewards[1]
        loss = {
            "sigmoid": math.log1p(math.exp(-margin)),
            "hinge": max(0.0, 1 - margin),
            "space": math.log1p(math.exp(-rewards[0])) + math.log1p(math.exp(rewards[1])),
        }[kind]
        assert log["loss"] == pytest.approx(loss, abs=2e-5)
    assert max(abs(log["rewards/chosen"]) for log in logs) > 0.05


@pytest.mark.once
@pytest.mark.parametrize("point", ["generate/chunk written aside", "train/last step of the iteration"])
def test_a_stopped_run_ends_as_one_that_was_not(folder: Path, warm: Warm, single: host.Run, point: str) -> None:
    """Bit for bit: a part's answers that were there, its pairs, the schedule beyond the stop, the weights."""
    again = settings(folder, f"stopped-{point.split('/')[0].split()[0]}")
    killed = host.train(again, by=warm, env={"SPIN_KILL": point}, fails=True)
    assert f"killed at: {point}" in killed.output
    resumed = host.train(again, by=warm)
    assert "already answered" in resumed.output or "going on from" in resumed.output
    assert differences(outcome(resumed.out), outcome(single.out)) == []


@pytest.mark.once
@pytest.mark.ranks
@pytest.mark.parametrize("name", ["single-lora", "ddp", "ddp-lora", "zero3", "fsdp2"])
def test_layouts_agree(name: str, folder: Path, warm: Warm, warm_ranks: Ranks, single: host.Run) -> None:
    """The same parts, answers and losses, on one rank and two; an adapter starts from the same model."""
    kind = name.partition("-")[0]
    changes = {**host.layout(name, folder), "plugins": ["cpu_cluster.CpuClusterPlugin", *host.OURS]}
    run = host.train(settings(folder, name, **changes), kind, by=warm if kind == "single" else warm_ranks)
    assert [run.metrics(iteration)["loss_first"] for iteration in range(2)] == pytest.approx(
        [2 * math.log(2)] * 2, abs=1e-5
    )
    assert "is off by" not in run.output
    # what an adapter has learnt until iteration 1 is another thing, and so are its answers there
    same = 1 if name.endswith("-lora") else 2
    for iteration in range(2):
        assert run.pairs(iteration)["row"] == single.pairs(iteration)["row"]
        if iteration < same:
            assert run.pairs(iteration)["rejected_ids"] == single.pairs(iteration)["rejected_ids"]
    if same == 2:
        assert run.losses() == pytest.approx(single.losses(), abs=1e-4)


@pytest.mark.once
def test_given_pairs_take_no_part_of_the_prompts(folder: Path, warm: Warm, single: host.Run) -> None:
    """Iteration 0 has those that it is given, all of them; iteration 1 answers the first part."""
    source = folder / "given.parquet"
    shutil.copy(single.out / "spin" / "iteration-1" / "pairs.parquet", source)
    spin = {**SPIN, "initial_pairs": str(source), "eval_prompts": 0}
    run = host.train(settings(folder, "given", spin=spin, num_epochs=1), by=warm)
    assert [run.pairs(i).num_rows for i in range(2)] == [2 * PART, 3 * PART]
    rows = [row["row"] for row in run.pairs(1).to_pylist() if row["generated_in"] == 1]
    assert rows == prompt_slice(16, PART, 0, seed=7).tolist()
