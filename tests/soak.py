"""Many iterations of a tiny model with kills at random: does anything grow? `make soak`.

A run is started, killed with SIGKILL after a random time, and started again until it is complete. Its memory, open files,
threads, temporary files and disk are looked at again and again. Exits with 1 where one of them has grown, or the last
iterations take longer than the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import host

# steps in a row of the log: the host keeps every row, in memory and in each checkpoint: one a step would be what grows
LOGGED = 25
# growth beyond which a figure counts as such, as a share; and files or threads that may come and go
SHARE, FEW = 0.10, 3
# iterations at a start's begin in which caches fill, and how many are compared
WARM, COMPARED = 5, 20


@dataclass
class Sample:
    """What a run held at one moment.

    Attributes:
        start: Which start of the run.
        iteration: How many iterations were complete.
        memory: Bytes of the process that are resident.
        files: Its open files.
        threads: Its threads.
        seconds: Of the CPU, that it has used: what else the machine does takes none of them.
    """

    start: int
    iteration: int
    memory: int
    files: int
    threads: int
    seconds: float


def sample(process: int, start: int, iteration: int) -> Sample:
    """Looks at a process; raises OSError where it is gone."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
    memory = int(status["VmRSS"].split()[0]) * 1024 if "VmRSS" in status else 0
    files = len(os.listdir(folder / "fd"))
    used = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    seconds = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    return Sample(start, iteration, memory, files, int(status["Threads"]), seconds)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def settings_in(folder: Path, iterations: int, rows: int) -> dict:
    """Returns a config of few steps an iteration, with held-out play and the previous iteration's pairs."""
    spin = {"iterations": iterations, "save_iterations": False, "generation": {"max_new_tokens": 8, "batch_size": 8}}
    changes = {"val_set_size": 3, "save_total_limit": 2, "learning_rate": 1e-6, "warmup_steps": 0, "spin": spin}
    changes["logging_steps"] = LOGGED
    return host.config(folder, rows=rows, **changes)


def soak(folder: Path, iterations: int, rows: int, every: float, seed: int) -> dict:
    """Has a run be killed until it is complete.

    Args:
        folder: For the run and its temporary files.
        iterations: Of the run.
        rows: Of its data, three of which are held out.
        every: Seconds between kills on average.
        seed: Of their times.

    Returns:
        The samples, the CPU seconds of each iteration that no kill has touched, what lies on disk, and what is left behind.
    """
    draw, settings = random.Random(seed), settings_in(folder, iterations, rows)
    path, spin = host.write(settings), Path(settings["output_dir"]) / "spin"
    temporary = folder / "t"
    temporary.mkdir()
    env = host.environment(ACCELERATE_USE_CPU="true", TMPDIR=str(temporary))
    samples: list[Sample] = []
    ended: dict[int, tuple[int, float]] = {}  # of each iteration the start in which it ended, and its seconds by then
    left, starts, done, began = [], 0, 0, time.monotonic()
    with open(folder / "log.txt", "ab") as log:
        while True:
            run = subprocess.Popen(
                [sys.executable, "-m", "axolotl.cli.train", str(path)],
                **{"env": env, "cwd": folder, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True},
            )
            until = time.monotonic() + max(45.0, draw.expovariate(1 / every))
            while run.poll() is None and time.monotonic() < until:
                try:
                    seen = sample(run.pid, starts, done)
                except OSError:
                    break
                while (spin / f"iteration-{done}" / "metrics.json").exists():
                    ended[done] = (starts, seen.seconds)
                    done += 1
                seen.iteration = done
                samples.append(seen)
                time.sleep(0.1)
            killed = run.poll() is None
            if killed:
                os.killpg(run.pid, signal.SIGKILL)
            code = run.wait()
            starts += 1
            left.append(sum(1 for _ in temporary.rglob("*")))
            print(f"{time.monotonic() - began:6.0f} s, start {starts}: {done} of {iterations} iterations", flush=True)
            if not killed and code:
                raise SystemExit(f"the run failed by itself; see {folder / 'log.txt'}")
            if not killed:
                break
    seconds = {
        index: at - ended[index - 1][1]
        for index, (start, at) in ended.items()
        if index and ended[index - 1][0] == start and index > 1 and ended.get(index - 2, (None,))[0] == start
    }
    folders = {index: size_of(spin / f"iteration-{index}") for index in range(iterations)}
    return {
        "iterations": iterations,
        "starts": starts,
        "seconds": time.monotonic() - began,
        "samples": [asdict(one) for one in samples],
        "iteration_seconds": seconds,
        "iteration_bytes": folders,
        "other_bytes": size_of(Path(settings["output_dir"])) - sum(folders.values()),
        "temporary_files": left,
    }


def judged(found: dict) -> tuple[list[str], list[str]]:
    """Returns a table's rows, of the first and the last, and what has grown."""
    rows, grown = [], []

    def compare(what: str, first: float, last: float, unit: float = 1.0, most: float | None = None) -> None:
        rows.append(f"| {what} | {first / unit:.4g} | {last / unit:.4g} |")
        if last > (first * (1 + SHARE) if most is None else first + most):
            grown.append(what)

    seconds = [found["iteration_seconds"][index] for index in sorted(found["iteration_seconds"])]
    compare(
        "CPU seconds of an iteration, median",
        *(statistics.median(part) for part in (seconds[:COMPARED], seconds[-COMPARED:])),
    )
    starts: dict[int, list[dict]] = {}
    for one in found["samples"]:
        starts.setdefault(one["start"], []).append(one)
    longest = max(starts.values(), key=lambda part: part[-1]["iteration"] - part[0]["iteration"])
    warm = [one for one in longest if one["iteration"] >= longest[0]["iteration"] + WARM]
    span = f"{warm[-1]['iteration'] - warm[0]['iteration']} iterations of one start" if warm else ""
    tenth = len(warm) // 10
    if warm and warm[-1]["iteration"] - warm[0]["iteration"] < COMPARED:
        raise SystemExit("no start lasted long enough to tell: kill less often")
    for name, what, unit, most in (
        ("memory", "resident memory, MiB", 2.0**20, None),
        ("files", "open files", 1, FEW),
        ("threads", "threads", 1, FEW),
    ):
        first, last = (statistics.median(one[name] for one in part) for part in (warm[:tenth], warm[-tenth:]))
        compare(f"{what}, over {span}", first, last, unit, most)
    sizes = [found["iteration_bytes"][index] for index in sorted(found["iteration_bytes"])]
    compare(
        "KiB of an iteration on disk",
        *(statistics.median(part) for part in (sizes[1:COMPARED], sizes[-COMPARED:])),
        1024,
    )
    # what a killed process had open stays; it must not be more with each iteration
    left = found["temporary_files"]
    compare("temporary files after a start", max(left[:2]), left[-1], 1, FEW * found["starts"])
    return rows, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--rows", type=int, default=11, help="of the data: an iteration takes the longer, the more")
    parser.add_argument("--kill-every", type=float, default=240.0, help="seconds, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="spin-soak-"))
    found = soak(folder, asked.iterations, asked.rows, asked.kill_every, asked.seed)
    if asked.json:
        asked.json.write_text(json.dumps(found))
    rows, grown = judged(found)
    print(f"\n{asked.iterations} iterations, {found['starts']} starts, {found['seconds'] / 60:.0f} minutes")
    print("\n".join(["| | first | last |", "|---|---|---|", *rows]))
    print(f"the rest of the output folder: {found['other_bytes'] / 1024:.0f} KiB")
    shutil.rmtree(folder)
    if grown:
        raise SystemExit(f"grown: {', '.join(grown)}")


if __name__ == "__main__":
    main()
