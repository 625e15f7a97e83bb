"""The sbatch script with the real torchrun and host; only Slurm's own commands are stood in for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import host
import pytest
import yaml

pytestmark = [pytest.mark.host, pytest.mark.once]

SCRIPT = host.ROOT / "example_configs" / "slurm" / "spin.sbatch"
STANDINS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> requeued; fi',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


def submit(folder: Path, srun: str = STANDINS["srun"], **more: str) -> subprocess.Popen[str]:
    """Starts the job as Slurm would on one node, with one rank."""
    for name, body in {**STANDINS, "srun": srun}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "1"}
    env = host.environment(**job, ACCELERATE_USE_CPU="true", SPIN_PORT="0", **more)
    env["PATH"] = os.pathsep.join([str(folder), env["PATH"]])
    log = (folder / "log").open("a")
    return subprocess.Popen(
        ["bash", str(SCRIPT), "run.yml"], cwd=folder, env=env, stdout=log, stderr=log, text=True, start_new_session=True
    )


def test_before_its_time_is_over_a_job_saves_and_comes_back(tmp_path: Path) -> None:
    settings = host.config(tmp_path, rows=16, num_epochs=12, save_steps=10_000, output_dir="./out")
    settings["spin"] = {**settings["spin"], "iterations": 1}
    settings["dynamic_checkpoint"] = {"enabled": True, "check_interval": 1}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    job = submit(tmp_path)
    try:
        until = time.monotonic() + 200
        while not (tmp_path / "out/spin/log.jsonl").exists() or not (tmp_path / "out/spin/log.jsonl").stat().st_size:
            assert job.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)  # Slurm's, to the script alone
        while not (tmp_path / "requeued").exists():
            assert job.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-4000:]
            time.sleep(0.05)
    finally:
        os.killpg(job.pid, signal.SIGTERM)  # and Slurm ends it
        job.wait(60)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    saved = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert len(saved) == 1 and not (tmp_path / "out/axolotl_checkpoint.save").exists()
    assert submit(tmp_path).wait(200) == 0, (tmp_path / "log").read_text()[-4000:]
    assert f"going on from out/{saved[0]} " in (tmp_path / "log").read_text()
    assert yaml.safe_load((tmp_path / "out/spin/plan.json").read_text())["completed_steps"] == 48


# a run that saves a checkpoint where it is asked for one, and goes on until the job is put back
RUN = """touch started
until [[ -e "my out/axolotl_checkpoint.save" || -e requeued ]]; do sleep 0.05; done
if [[ ! -e requeued ]]; then mkdir "my out/checkpoint-1"; echo '"complete": true' > "my out/checkpoint-1/spin.json"; fi
until [[ -e requeued ]]; do sleep 0.05; done"""


@pytest.mark.parametrize("there", [True, False])
def test_a_job_comes_back_however_its_folder_is_written(there: bool, tmp_path: Path) -> None:
    """In quotes, with a comment, and with the line ends of another system; also before the run has made its folder."""
    (tmp_path / "run.yml").write_bytes(b'rl: spin\r\noutput_dir: "my out" # on the large disk\r\n')
    if there:
        (tmp_path / "my out").mkdir()
    job = submit(tmp_path, RUN, SPIN_SAVE_SECONDS="20" if there else "1")
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "started").exists():
            assert job.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "my out" / "checkpoint-1").exists() == there
    assert not (tmp_path / "my out" / "axolotl_checkpoint.save").exists()


def test_a_job_without_a_folder_is_not_started(tmp_path: Path) -> None:
    (tmp_path / "run.yml").write_text("rl: spin\n")
    assert submit(tmp_path, RUN).wait(20) == 1
    assert "run.yml: set `output_dir`" in (tmp_path / "log").read_text() and not (tmp_path / "started").exists()
