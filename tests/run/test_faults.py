"""Killed anywhere and started again with the same command, a run ends as one that was never stopped, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host
import pytest
import tiny
import yaml
from faults import POINTS
from recovery import differences, outcome, settings_in
from safetensors.torch import load_file
from warm import Warm

pytestmark = pytest.mark.host

QUICK = [
    "generate/chunk written aside",
    "pairs/chunks half removed",
    "train/first step taken",
    "checkpoint/random state saved",
    "checkpoint/half rotated away",
    "iteration end/model written aside",
    "iteration end/held-out play whole",
    "iteration 1/second epoch",
    "final/model half written",
]


@pytest.fixture(scope="module")
def seconds(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long the command takes that is never stopped."""
    folder = tmp_path_factory.mktemp("timed")
    settings_in(folder, shared)
    started = time.monotonic()
    code, output = start_command(folder)
    assert code == 0, output[-6000:]
    return time.monotonic() - started


def start_command(
    folder: Path, kill: str = "", after: float | None = None, by: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Runs the command that a user types, as a process group of its own.

    Args:
        folder: Holds the config, `run.yml`.
        kill: A name of `POINTS`.
        after: Seconds after which a signal is sent to the whole group.
        by: The signal.
    """
    command = [sys.executable, "-m", "axolotl.cli.train", "run.yml"]
    env = host.environment(ACCELERATE_USE_CPU="true", SPIN_KILL=kill)
    with open(folder / "log", "a+b") as log:
        start = log.tell()
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=after if after is not None else 300)
        except subprocess.TimeoutExpired:
            assert after is not None, (folder / "log").read_text()[-6000:]
            os.killpg(process.pid, by)
            code = process.wait(timeout=60)
        log.seek(start)
        return code, log.read().decode(errors="replace")


def check_equal(folder: Path, whole: dict[str, Any]) -> None:
    assert not differences(outcome(folder / "out"), whole)


OURS = ("generate/", "pairs/", "iteration end/")  # files that we write, in the same way on every host


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=pytest.mark.once) if point.startswith(OURS) else point for point in QUICK]
)
def test_killed_at(point: str, warm: Warm, shared: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Where our own files are half written, on the default host alone; where the host's are, on every one."""
    settings_in(tmp_path, shared)
    env = host.environment(ACCELERATE_USE_CPU="true")
    code, output = warm.run("axolotl.cli.train", "run.yml", env={**env, "SPIN_KILL": point}, cwd=tmp_path)
    assert (code, f"killed at: {point}" in output) == (-signal.SIGKILL, True), output[-6000:]
    code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=tmp_path)
    assert code == 0, output[-6000:]
    check_equal(tmp_path, whole)


def test_an_adapter_is_resumed_as_well(warm: Warm, shared: Path, tmp_path: Path) -> None:
    """LoRA, from an adapter on disk: hosts before 0.21 do not seed a new one's weights."""
    env = host.environment(ACCELERATE_USE_CPU="true")
    adapter = tiny.adapter(Path(host.config(shared, rows=19)["base_model"]), tmp_path / "adapter")
    outcomes = []
    for name, kill in (("whole", ""), ("killed", "iteration 1/second epoch")):
        folder = tmp_path / name
        folder.mkdir()
        settings = {**settings_in(folder, shared), **host.LORA, "lora_model_dir": str(adapter)}
        (folder / "run.yml").write_text(yaml.safe_dump(settings))
        if kill:
            code, output = warm.run("axolotl.cli.train", "run.yml", env={**env, "SPIN_KILL": kill}, cwd=folder)
            assert code == -signal.SIGKILL, output[-6000:]
        code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=folder)
        assert code == 0, output[-6000:]
        outcomes.append(outcome(folder / "out", "adapter_model.safetensors"))
    assert not differences(*outcomes)


def test_a_complete_run_says_so_and_does_nothing(shared: Path, whole: dict[str, Any], warm: Warm) -> None:
    out = shared / "whole" / "out"

    def times() -> dict[Path, int]:
        own = {"run.lock", "debug.log"}  # who started last; the host's own log
        return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name not in own}

    before = times()
    env = host.environment(ACCELERATE_USE_CPU="true")
    code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=shared / "whole")
    assert code == 0
    assert "this run is complete, so there is nothing to do" in output
    assert not host.loaded_a_model(out)
    assert times() == before


# -- all of it: `make test-faults` ------------------------------------------------------------------------------------


class Table:
    """Collects a row per case and prints them at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []

    def add(self, case: str, restarts: int, equal: bool) -> None:
        self.rows.append((case, str(restarts), "equal" if equal else "DIFFERS"))


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    made = Table()
    yield made
    lines = [f"| {case} | {restarts} | {result} |" for case, restarts, result in made.rows]
    path = os.environ.get("SPIN_FAULTS_TABLE")
    if path:
        Path(path).write_text("\n".join(["| killed at | restarts | result |", "|---|---|---|", *lines, ""]))


def finish(folder: Path, case: str, kills: int, whole: dict[str, Any], table: Table) -> None:
    """Starts the command until it completes, and compares."""
    code, output = start_command(folder)
    assert code == 0, output[-6000:]
    wrong = differences(outcome(folder / "out"), whole)
    table.add(case, kills, not wrong)
    assert not wrong
    shutil.rmtree(folder)


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
def test_the_command_killed_at_each_point(
    point: str, shared: Path, whole: dict[str, Any], tmp_path: Path, table: Table
) -> None:
    settings_in(tmp_path, shared)
    code, output = start_command(tmp_path, kill=point)
    assert (code, f"killed at: {point}" in output) == (-signal.SIGKILL, True), output[-6000:]
    finish(tmp_path, point, 1, whole, table)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_the_command_killed_at_random(
    seed: int, shared: Path, whole: dict[str, Any], seconds: float, tmp_path: Path, table: Table
) -> None:
    """Killed up to three times, each after a random time that is at most the whole run's."""
    settings_in(tmp_path, shared)
    generator = random.Random(seed)
    times = [generator.uniform(0.3, 1.0) * seconds for _ in range(generator.randint(1, 3))]
    kills = sum(start_command(tmp_path, after=after)[0] != 0 for after in times)
    finish(tmp_path, f"seed {seed}: after {', '.join(f'{after:.1f}' for after in times)} s", kills, whole, table)


@pytest.mark.faults
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("share", [0.7, 0.85])
def test_the_command_interrupted(
    by: signal.Signals, share: float, shared: Path, whole: dict[str, Any], seconds: float, tmp_path: Path, table: Table
) -> None:
    """Ctrl-C and a cluster's time limit, in mid-run."""
    settings_in(tmp_path, shared)
    start_command(tmp_path, after=share * seconds, by=by)
    finish(tmp_path, f"{by.name} after {share:.0%} of the run", 1, whole, table)


# one after the other in a single run, each on one rank; what counts calls counts them from that start on
CHAIN = [
    ("generate/chunk whole", 0),
    ("score/first batch", 1),
    ("checkpoint/model saved", 1),
    ("checkpoint/all files saved", 0),
    ("iteration end/model written aside", 0),
    ("iteration 1/optimizer restarting", 1),
    ("iteration 1/first epoch", 1),
    ("final/before the save", 0),
]


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["ddp", "zero3", "fsdp2"])
def test_two_ranks_of_which_one_is_killed_again_and_again(
    kind: str, shared: Path, tmp_path: Path, table: Table
) -> None:
    changes = {**settings_in(tmp_path, shared), **host.layout(kind, tmp_path)}
    changes["plugins"] = ["cpu_cluster.CpuClusterPlugin", "faults.FaultPlugin", *host.OURS]
    whole = host.train({**changes, "output_dir": str(tmp_path / "whole")}, kind)
    settings = {**changes, "output_dir": str(tmp_path / "killed")}
    for point, rank in CHAIN:
        fault = {"SPIN_KILL": point, "SPIN_KILL_RANK": str(rank)}
        killed = host.train(settings, kind, env=fault, fails=True)
        assert f"killed at: {point}" in killed.output, killed.output[-6000:]
    resumed = host.train(settings, kind)
    ids = all(resumed.pairs(i)["rejected_ids"] == whole.pairs(i)["rejected_ids"] for i in range(2))
    losses = resumed.losses() == pytest.approx(whole.losses(), abs=1e-5)
    final = [load_file(run.out / "model.safetensors") for run in (resumed, whole)]
    weights = all(tensor.allclose(final[1][name], atol=1e-5) for name, tensor in final[0].items())
    table.add(f"{kind} on two ranks, at {len(CHAIN)} points", len(CHAIN), ids and losses and weights)
    assert (ids, losses, weights) == (True, True, True)
