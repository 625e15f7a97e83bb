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
from faults import POINTS
from recovery import differences, outcome, settings_in
from warm import Warm

pytestmark = pytest.mark.host

QUICK = [
    "generate/chunk written aside",
    "pairs/chunks half removed",
    "train/first step taken",
    "checkpoint/random state saved",
    "checkpoint/half rotated away",
    "iteration end/model written aside",
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


@pytest.mark.parametrize("point", QUICK)
def test_killed_at(point: str, warm: Warm, shared: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    settings_in(tmp_path, shared)
    env = host.environment(ACCELERATE_USE_CPU="true")
    code, output = warm.run("axolotl.cli.train", "run.yml", env={**env, "SPIN_KILL": point}, cwd=tmp_path)
    assert (code, f"killed at: {point}" in output) == (-signal.SIGKILL, True), output[-6000:]
    code, output = warm.run("axolotl.cli.train", "run.yml", env=env, cwd=tmp_path)
    assert code == 0, output[-6000:]
    check_equal(tmp_path, whole)


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
