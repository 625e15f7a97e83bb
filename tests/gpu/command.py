"""Runs what a CPU cannot show, on this machine's GPUs, and writes what was seen: `make test-gpu`.

    python tests/gpu/command.py [--pieces WORD ...] [--folder FOLDER] [--json FILE] [--results FILE]

Each piece is a process of its own. Its figures are in the JSON file when it ends, or the last lines of its error; the
others go on. `--results` is a page made of that file, which is written where a GPU has run. `--pieces` takes those whose
names have one of the words. Exits with 1 where a piece failed. Without a GPU the pieces run small, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.extend([str(Path(__file__).parents[1] / folder) for folder in ("..", ".", "benchmarks")])

from machine import Machine
from pieces import PIECES, Piece

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEARCH = [str(path) for path in (ROOT, HERE.parent, HERE.parent / "benchmarks", HERE)]
# seconds that a piece may take
LIMIT = 300
PACKAGES = (
    "axolotl",
    "torch",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "flash-attn",
    "vllm",
)
_LINES = 12  # of an error


def main(arguments: list[str] | None = None) -> int:
    """Runs the pieces; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", help="words of the names of those that are run (default: all)")
    parser.add_argument("--folder", type=Path, help="where runs are (default: a new one, removed at the end)")
    parser.add_argument("--json", type=Path, help="figures, as they come (default: in the folder for temporary files)")
    parser.add_argument("--results", type=Path, help="page to write where a GPU has run")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a piece's own process
    asked = parser.parse_args(arguments)
    # found by the runs, too
    os.environ["PYTHONPATH"] = os.pathsep.join([*SEARCH, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if asked.one:
        piece = next(piece for piece in PIECES if piece.name == asked.one)
        asked.json.write_text(json.dumps(played(piece, asked.folder, Machine.here())))
        return 0
    machine = Machine.here()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="axolotl-spin-gpu-"))
    path = asked.json or Path(tempfile.gettempdir()) / "axolotl-spin-gpu.json"
    chosen = [piece for piece in PIECES if not asked.pieces or any(word in piece.name for word in asked.pieces)]
    report: dict[str, Any] = {"date": date.today().isoformat(), "gpus": machine.gpus, "commit": commit(), "pieces": []}
    begun = time.monotonic()
    print(f"{len(chosen)} pieces, {machine.gpus} GPU(s); figures in {path}", flush=True)
    for piece in chosen:
        report["pieces"].append(apart(piece, folder, machine, report))
        report["minutes"] = round((time.monotonic() - begun) / 60, 1)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(line(report["pieces"][-1]), flush=True)
        if asked.results and machine.gpus:
            asked.results.write_text(page(report))  # GPU only: the page is what a GPU has shown
    if asked.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return int(any(piece["status"] == "failed" for piece in report["pieces"]))


def apart(piece: Piece, folder: Path, machine: Machine, report: dict[str, Any]) -> dict[str, Any]:
    """Plays a piece in a process of its own; returns its row of the report, to which it adds what it runs on."""
    if lacking := piece.lacks(machine):
        return {"name": piece.name, "status": "skipped", "reason": lacking}
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "result.json", folder / f"{slug(piece)}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--one", piece.name, "--folder", str(folder), "--json", str(result)]
    begun = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            output.write(f"\nno end after {LIMIT} s\n")
        finally:
            end(process)
    row = {"name": piece.name, "status": "failed", "seconds": round(time.monotonic() - begun, 1)}
    shutil.rmtree(folder / slug(piece), ignore_errors=True)
    if process.returncode == 0 and result.exists():
        found = json.loads(result.read_text())
        report["machine"] = found["machine"]
        return {**row, "status": "passed", "figures": found["figures"]}
    lines = [text for text in log.read_text(errors="replace").splitlines() if text.strip()]
    return {**row, "error": [text[:400] for text in lines[-_LINES:]]}


def end(process: subprocess.Popen) -> None:
    """Kills what is left of a piece: its runs are in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def played(piece: Piece, folder: Path, machine: Machine) -> dict[str, Any]:
    """Plays a piece in this process."""
    own = folder / slug(piece)
    own.mkdir(parents=True)
    return {"figures": piece.play(machine, own), "machine": about(machine)}


def slug(piece: Piece) -> str:
    return re.sub(r"\W+", "-", piece.name)


def about(machine: Machine) -> dict[str, Any]:
    """Returns what figures were measured on and with."""
    import psutil
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(machine.gpus)],
        "cuda": torch.version.cuda,
        "cpu": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "memory, GiB": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str:
    described = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip()


# -- what people read ---------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    """Returns a piece's line for the terminal."""
    if row["status"] == "skipped":
        return f"skipped  {row['name']}: {row['reason']}"
    what = "\n".join(["", *(f"    {text}" for text in row["error"])]) if row["status"] == "failed" else ""
    return f"{row['status']:8} {row['name']}, {row['seconds']:.0f} s{what}"


def page(report: dict[str, Any]) -> str:
    """Returns the page of a report."""
    on = report.get("machine", {"gpus": [], "cuda": None, "cpu": "", "memory, GiB": 0, "python": "", "versions": {}})
    packages = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    parts = [
        "# What was seen on a GPU",
        "`make test-gpu` writes this page, of the JSON file beside it. What a piece is, `tests/gpu/pieces.py` says.",
        f"- {report['date']}, commit {report['commit']}, {report['minutes']} minutes\n"
        f"- {', '.join(on['gpus']) or 'no GPU: the figures say nothing'}; CUDA {on['cuda']}\n"
        f"- {on['cpu']}, {on['memory, GiB']} GiB\n"
        f"- Python {on['python']}, {packages}",
        "\n".join(["| piece | | seconds |", "|---|---|---|", *map(summary, report["pieces"])]),
        *(section(row) for row in report["pieces"] if row["status"] != "skipped"),
    ]
    return "\n\n".join(parts) + "\n"


def summary(row: dict[str, Any]) -> str:
    """Returns a piece's line of the page's table."""
    why = f": {row['reason']}" if "reason" in row else ""
    return f"| {row['name']} | {row['status']}{why} | {row.get('seconds', '')} |"


def section(row: dict[str, Any]) -> str:
    """Returns a piece's figures, or its error."""
    if row["status"] == "failed":
        return f"## {row['name']}\n\n```text\n" + "\n".join(row["error"]) + "\n```"
    figures = row["figures"]
    if all(isinstance(value, dict) for value in figures.values()):
        names = list(next(iter(figures.values())))
        rows = [
            f"| {name} | " + " | ".join(shown(part.get(of)) for of in names) + " |" for name, part in figures.items()
        ]
        table = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows]
    else:
        table = ["| figure | |", "|---|---|", *(f"| {name} | {shown(value)} |" for name, value in figures.items())]
    return f"## {row['name']}\n\n" + "\n".join(table)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(shown, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
