"""Every kind of file in `spin/`, damaged in every way: found, named, and made again where that is safe, else refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from recovery import differences, outcome, settings_in
from warm import Warm

pytestmark = [pytest.mark.host, pytest.mark.once]

ENV = host.environment(ACCELERATE_USE_CPU="true")
Damage = Callable[[Path], None]


def cut_to(share: float) -> Damage:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def last_byte_lost(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zeros_inside(path: Path) -> None:
    """As a lost disk block: the file's length, head and tail are as before."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


def wrong_schema(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(["a", "list"]))
    else:
        pq.write_table(pa.table({"text": ["not this"]}), path)


DAMAGE: dict[str, Damage] = {
    "empty": cut_to(0),
    "a tenth": cut_to(0.1),
    "half": cut_to(0.5),
    "last byte lost": last_byte_lost,
    "zeros": zeros,
    "zeros inside": zeros_inside,
    "wrong schema": wrong_schema,
}
JSON_DAMAGE = {name: damage for name, damage in DAMAGE.items() if name != "last byte lost"}  # that is a newline


@pytest.fixture(scope="module")
def stopped(warm: Warm, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Returns a function that gives a copy of the output folder of a run that was killed at a point."""
    made: dict[str, Path] = {}

    def copy(point: str, target: Path, **changes: Any) -> Path:
        if point not in made:
            folder = made[point] = tmp_path_factory.mktemp("stopped")
            settings_in(folder, shared)
            code, output = warm.run("axolotl.cli.train", "run.yml", env={**ENV, "SPIN_KILL": point}, cwd=folder)
            assert code == -signal.SIGKILL, output[-6000:]
        shutil.copytree(made[point] / "out", target / "out")
        settings = {**settings_in(target, shared), **changes}
        (target / "run.yml").write_text(yaml.safe_dump(settings))
        return target / "out"

    return copy


@pytest.fixture(scope="module")
def other(warm: Warm, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of another seed, killed while it answers."""
    folder = tmp_path_factory.mktemp("other")
    settings = {**settings_in(folder, shared), "seed": 8}
    (folder / "run.yml").write_text(yaml.safe_dump(settings))
    point = {"SPIN_KILL": "generate/all chunks whole"}
    code, output = warm.run("axolotl.cli.train", "run.yml", env={**ENV, **point}, cwd=folder)
    assert code == -signal.SIGKILL, output[-6000:]
    shutil.copytree(folder / "out", folder / "generating")
    code, output = warm.run("axolotl.cli.train", "run.yml", env=ENV, cwd=folder)
    assert code == 0, output[-6000:]
    return folder


def start(warm: Warm, folder: Path) -> tuple[int, str]:
    return warm.run("axolotl.cli.train", "run.yml", env=ENV, cwd=folder)


def completes(warm: Warm, folder: Path, whole: dict[str, Any]) -> str:
    code, output = start(warm, folder)
    assert code == 0, output[-6000:]
    assert host.loaded_a_model(folder / "out")
    assert not differences(outcome(folder / "out"), whole)
    return output


def refused(warm: Warm, folder: Path, *messages: str) -> None:
    """The start is refused before a model loads, and what is on disk stays; but for what a killed run left half made."""

    def kept() -> list[Path]:
        paths = (folder / "out").rglob("*")
        return sorted(path for path in paths if path.name != "debug.log" and not path.name.startswith("."))

    names = kept()
    code, output = start(warm, folder)
    assert code == 1
    for message in messages:
        assert message in output, output[-3000:]
    assert not host.loaded_a_model(folder / "out")
    assert kept() == names


# -- made again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_damaged_plan_is_written_anew(damage: str, stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("iteration 1/first epoch", tmp_path)
    DAMAGE[damage](out / "spin" / "plan.json")
    assert "plan.json is damaged" in completes(warm, tmp_path, whole)


@pytest.mark.parametrize("damage", [*DAMAGE, "other run"])
def test_a_damaged_chunk_is_answered_again(
    damage: str, stopped, other: Path, warm: Warm, whole: dict, tmp_path: Path
) -> None:
    out = stopped("generate/all chunks whole", tmp_path)
    chunk = Path("spin/iteration-0/chunks/000001.parquet")
    if damage == "other run":
        shutil.copy(other / "generating" / chunk, out / chunk)
    else:
        DAMAGE[damage](out / chunk)
    output = completes(warm, tmp_path, whole)
    assert "000001.parquet is" in output and "its prompts are answered again" in output
    assert "12 of 16 prompts are already answered" in output


def test_a_chunk_in_anothers_place_is_answered_again(stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("generate/all chunks whole", tmp_path)
    chunks = out / "spin" / "iteration-0" / "chunks"
    shutil.copy(chunks / "000002.parquet", chunks / "000001.parquet")
    assert "holds answers of another file: what it should hold is answered again" in completes(warm, tmp_path, whole)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_pairs_are_made_again_while_their_opponent_lives(
    damage: str, stopped, warm: Warm, whole: dict, tmp_path: Path
) -> None:
    out = stopped("train/first micro-batch", tmp_path)
    DAMAGE[damage](out / "spin" / "iteration-0" / "pairs.parquet")
    assert "they are made again, by the same opponent" in completes(warm, tmp_path, whole)


@pytest.mark.parametrize("damage", ["empty", "half", "wrong schema"])
def test_a_damaged_metrics_file_is_written_anew(damage: str, stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("iteration 1/second epoch", tmp_path)
    DAMAGE[damage](out / "spin" / "iteration-1" / "metrics.json")
    completes(warm, tmp_path, whole)


def test_a_damaged_metrics_file_of_a_closed_iteration_is_left_out(stopped, warm: Warm, tmp_path: Path) -> None:
    out = stopped("iteration 1/second epoch", tmp_path)
    DAMAGE["half"](out / "spin" / "iteration-0" / "metrics.json")
    code, output = start(warm, tmp_path)
    assert code == 0 and "its figures are left out" in output


@pytest.mark.parametrize("file", ["spin.json", "model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(file: str, stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("iteration 1/second epoch", tmp_path)
    latest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    DAMAGE["half"](latest / file)
    assert f"passing over {latest}" in completes(warm, tmp_path, whole)
    assert (out / "spin" / "replaced-1" / latest.name).exists()


def test_half_written_files_are_cleared(stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("iteration 1/first epoch", tmp_path)
    for name in (
        ".plan.json.0a1b2c3d",
        "iteration-0/.model/x",
        "iteration-1/chunks/.000001.parquet.1b2c3d4e",
        ".checkpoint-3.0c1d2e3f/y",
    ):
        (out / "spin" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "spin" / name).write_text("half")
    completes(warm, tmp_path, whole)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [*DAMAGE, "gone"])
def test_damaged_pairs_are_refused_once_their_opponent_is_gone(
    damage: str, stopped, warm: Warm, tmp_path: Path
) -> None:
    """Zeros inside are found by the pages' checksums, which are read when the iteration goes on."""
    out = stopped("iteration 1/second epoch", tmp_path)
    pairs = out / "spin" / "iteration-1" / "pairs.parquet"
    if damage == "gone":
        pairs.unlink()
    else:
        DAMAGE[damage](pairs)
    if damage == "zeros inside":
        code, output = start(warm, tmp_path)
        assert code == 1 and "iteration-1/pairs.parquet is damaged" in output and "put the file back, or" in output
    else:
        refused(warm, tmp_path, "iteration-1/pairs.parquet", "put the file back, or set `")


def test_kept_pairs_that_are_damaged_are_refused(stopped, warm: Warm, tmp_path: Path) -> None:
    """Iteration 1 trains on iteration 0's pairs again; a checkpoint from before iteration 0 would make them again."""
    out = stopped("iteration end/closed", tmp_path)
    DAMAGE["half"](out / "spin" / "iteration-0" / "pairs.parquet")
    refused(warm, tmp_path, "iteration-0/pairs.parquet is damaged", "set `auto_resume_from_checkpoints: false`")


def test_the_way_out_that_is_named_works(stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("iteration end/closed", tmp_path, auto_resume_from_checkpoints=False)
    DAMAGE["half"](out / "spin" / "iteration-0" / "pairs.parquet")
    completes(warm, tmp_path, whole)


@pytest.mark.parametrize("point", ["train/first micro-batch", "iteration 1/second epoch"])
def test_another_runs_pairs_are_refused(point: str, stopped, other: Path, warm: Warm, tmp_path: Path) -> None:
    out = stopped(point, tmp_path)
    name = f"spin/iteration-{0 if point.startswith('train') else 1}/pairs.parquet"
    shutil.copy(other / "out" / name, out / name)
    code, output = start(warm, tmp_path)
    assert code == 1 and f"{name} belongs to another run or iteration" in output
    assert (out / name).read_bytes() == (other / "out" / name).read_bytes()


def test_another_runs_plan_is_refused(stopped, other: Path, warm: Warm, tmp_path: Path) -> None:
    out = stopped("iteration 1/first epoch", tmp_path)
    shutil.copy(other / "out" / "spin" / "plan.json", out / "spin" / "plan.json")
    refused(warm, tmp_path, "holds a run with other settings", "seed: 8 -> 7")


def test_another_runs_checkpoint_is_refused(stopped, other: Path, warm: Warm, tmp_path: Path) -> None:
    out = stopped("train/first micro-batch", tmp_path)
    shutil.copytree(other / "out" / "checkpoint-24", out / "checkpoint-24")
    refused(warm, tmp_path, "checkpoint-24 was saved by a run with other settings or data")
    shutil.rmtree(out / "checkpoint-24")
    settings = yaml.safe_load((tmp_path / "run.yml").read_text())
    settings["resume_from_checkpoint"] = str(other / "out" / "checkpoint-24")
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    refused(warm, tmp_path, "cannot be resumed from: was saved by a run with other settings or data")


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(stopped, warm: Warm, whole: dict, tmp_path: Path) -> None:
    out = stopped("train/first micro-batch", tmp_path)
    (out / "debug.log").unlink()  # the killed run's: the host begins a new one at each start
    first = warm.start("axolotl.cli.train", "run.yml", env=ENV, cwd=tmp_path)
    while not host.loaded_a_model(out):
        assert first.alive(), first.output()[-3000:]
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)  # what is in the log from here on is the second's
    code, output = start(warm, tmp_path)
    loaded = host.loaded_a_model(out)
    os.kill(first.pid, signal.SIGCONT)
    assert code == 1
    assert "another run is writing to `output_dir:" in output and f'"pid": {first.pid}' in output
    assert not loaded
    assert first.wait() == 0
    assert not differences(outcome(tmp_path / "out"), whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A function that mounts a filesystem of some KiB."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"mounting a small filesystem is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("free", [12, 60, 400])
def test_a_full_disk_is_said_and_harms_nothing(
    free: int, stopped, warm: Warm, whole: dict, shared: Path, tmp_path: Path, small_disk
) -> None:
    """With so many KiB free the disk is full during generation, while pairs are written, and in a checkpoint."""
    disk = small_disk("20m")
    (tmp_path / "made").mkdir()
    shutil.copytree(stopped("start/plan whole", tmp_path / "made"), disk / "out")
    settings = {**settings_in(disk, shared)}
    (disk / "run.yml").write_text(yaml.safe_dump(settings))
    # what the host writes beside our files goes elsewhere
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(left - free * 1024))
    (tmp_path / "run.yml").write_text((disk / "run.yml").read_text())
    code, output = start(warm, tmp_path)
    assert code == 1, output[-3000:]
    assert "No space left on device" in output
    assert "no space is left for it: free some" in output, output[-3000:]
    ballast.unlink()
    code, output = start(warm, tmp_path)
    assert code == 0, output[-6000:]
    assert not differences(outcome(disk / "out"), whole)


def test_a_read_only_folder_is_said_before_a_model_loads(warm: Warm, shared: Path, tmp_path: Path, small_disk) -> None:
    disk = small_disk("1m")
    settings = {**settings_in(tmp_path, shared), "output_dir": str(disk)}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, output = start(warm, tmp_path)
    assert code == 1
    assert f"`output_dir: {disk}` cannot be written to (Read-only file system)" in output
