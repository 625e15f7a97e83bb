"""Killed anywhere and started again with the same command, a run ends as one that was never stopped, bit for bit.

The run has two iterations of two epochs, a checkpoint every three steps of which two are kept, held-out data, and a log
every second step, so that logging intervals lie across checkpoints and iterations.
"""

from __future__ import annotations

import json
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
import torch
import yaml
from faults import POINTS
from safetensors.torch import load_file
from warm import Warm

pytestmark = pytest.mark.host

CHANGES = {
    "plugins": ["faults.FaultPlugin", *host.OURS],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_epochs": 2,
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 2,
    "val_set_size": 3,
    "spin": {"iterations": 2, "generation": {"max_new_tokens": 8, "batch_size": 4}},
}
# what a start shows of the run, apart from how long it took
CLOCKS = ("seconds", "runtime", "per_second", "total_flos", "train_loss", "memory/")
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


def settings_in(folder: Path, shared: Path) -> dict[str, Any]:
    """Returns the config of a run in `folder` over the model and data in `shared`."""
    made = {**host.config(shared, rows=19), **CHANGES, "output_dir": str(folder / "out")}
    (folder / "run.yml").write_text(yaml.safe_dump(made))
    return made


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not any(clock in name for clock in CLOCKS)}


def outcome(out: Path) -> dict[str, Any]:
    """Reads all that a run leaves and that must be equal, whatever stopped it on the way."""
    spin = out / "spin"
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    files = sorted(
        str(path.relative_to(spin)) for path in spin.rglob("*") if path.is_file() and "replaced" not in path.parts[-4]
    )
    found: dict[str, Any] = {
        "files": files,
        "checkpoints": [path.name for path in checkpoints],
        "logs": [without_clocks(row) for row in state["log_history"]],
        "plan": json.loads((spin / "plan.json").read_text()),
        "weights": load_file(out / "model.safetensors"),
    }
    for iteration in range(2):
        folder = spin / f"iteration-{iteration}"
        found[f"pairs {iteration}"] = host.Run(0, "", out).pairs(iteration).to_pydict()
        found[f"metrics {iteration}"] = without_clocks(json.loads((folder / "metrics.json").read_text()))
        found[f"weights {iteration}"] = load_file(folder / "model" / "model.safetensors")
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names of what differs; floats and tensors are compared bit for bit."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, dict) and one and isinstance(next(iter(one.values())), torch.Tensor):
            return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        return bool(one == other)

    return [name for name in expected if not equal(found[name], expected[name])]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    with Warm(host.environment(ACCELERATE_USE_CPU="true")) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def whole(shared: Path) -> dict[str, Any]:
    """The run that was never stopped, by the host's own command."""
    folder = shared / "whole"
    folder.mkdir()
    settings_in(folder, shared)
    started = time.monotonic()
    code, output = start_command(folder)
    assert code == 0, output[-6000:]
    return {**outcome(folder / "out"), "seconds": time.monotonic() - started}


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
    found = outcome(folder / "out")
    expected = {name: value for name, value in whole.items() if name != "seconds"}
    assert not differences(found, expected)


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
    assert "this run is complete, so there is nothing to do" in output and "loading model" not in output.lower()
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
    wrong = differences(outcome(folder / "out"), {k: v for k, v in whole.items() if k != "seconds"})
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
    seed: int, shared: Path, whole: dict[str, Any], tmp_path: Path, table: Table
) -> None:
    """Killed up to three times, each after a random time that is at most the whole run's."""
    settings_in(tmp_path, shared)
    generator = random.Random(seed)
    times = [generator.uniform(0.3, 1.0) * whole["seconds"] for _ in range(generator.randint(1, 3))]
    kills = sum(start_command(tmp_path, after=after)[0] != 0 for after in times)
    finish(tmp_path, f"seed {seed}: after {', '.join(f'{after:.1f}' for after in times)} s", kills, whole, table)


@pytest.mark.faults
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("share", [0.7, 0.85])
def test_the_command_interrupted(
    by: signal.Signals, share: float, shared: Path, whole: dict[str, Any], tmp_path: Path, table: Table
) -> None:
    """Ctrl-C and a cluster's time limit, in mid-run."""
    settings_in(tmp_path, shared)
    start_command(tmp_path, after=share * whole["seconds"], by=by)
    finish(tmp_path, f"{by.name} after {share:.0%} of the run", 1, whole, table)
