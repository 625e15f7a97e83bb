"""Measures SPIN against what its users would do otherwise, and prints a table; every figure is a ratio inside one run.

    python tests/benchmarks/run.py [--figures training generation ...] [--models smollm2 llama] [--repeats N] [--quick]
        [--rivals rival dpo] [--folder FOLDER] [--json FILE] [--results FILE] [--section TITLE]

`--quick` is for seeing that everything runs: its figures mean nothing. Models and data are made in `--folder` and kept
there. `--results` replaces one section of a Markdown file and leaves the others, which may be another machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # where the tests' `host` is

import data_plane
import generation
import iteration
import memory
import sharded
import startup
import training
import vllm_engine
import workload

Rows = list[dict[str, Any]]

# name -> (measures with (arguments, model), once for every model or once only)
FIGURES: dict[str, tuple[Callable[[argparse.Namespace, str], Rows], bool]] = {
    "training": (
        lambda given, model: [
            row
            for batch in ([8] if given.quick else [8, 16])
            for row in training.measure(
                given.folder,
                model,
                batch=batch,
                steps=2 if given.quick else 3,
                repeats=given.repeats,
                rivals=given.rivals,
            )
        ],
        True,
    ),
    "memory": (
        lambda given, _: memory.measure(
            given.folder / "memory",
            vocabularies=(4096,) if given.quick else (131_072, 262_144),
            tokens=128 if given.quick else 4096,
            prompt=64,
            repeats=given.repeats,
        ),
        False,
    ),
    "iteration": (
        lambda given, model: iteration.measure(
            given.folder, model, pairs=8 if given.quick else 24, most=8 if given.quick else 48, repeats=given.repeats
        ),
        True,
    ),
    "generation": (
        lambda given, model: generation.measure(
            given.folder,
            model,
            prompts=8 if given.quick else 64,
            batch=4 if given.quick else 8,
            most=8 if given.quick else 320,
            repeats=given.repeats,
        ),
        True,
    ),
    "vllm": (
        lambda given, model: vllm_engine.measure(
            given.folder,
            model,
            prompts=16 if given.quick else 192,
            most=8 if given.quick else 64,
            repeats=min(given.repeats, 3),
        ),
        False,
    ),
    "sharded": (
        lambda given, model: sharded.measure(
            given.folder,
            model,
            prompts=16 if given.quick else 64,
            few=16,
            most=8 if given.quick else 32,
            repeats=min(given.repeats, 2),
        ),
        False,
    ),
    "data": (
        lambda given, _: data_plane.measure(
            given.folder, sizes=(1_000, 10_000) if given.quick else (10_000, 100_000, 1_000_000)
        ),
        False,
    ),
    "startup": (lambda given, _: startup.measure(given.folder, repeats=given.repeats), False),
}
ONCE = {"vllm": "smollm2"}  # the model of figures that are measured once only; else the last
PACKAGES = ("axolotl", "torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "axolotl-spin")


def main() -> None:
    """Measures what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--models", nargs="+", choices=workload.MODELS, default=list(workload.MODELS))
    parser.add_argument(
        "--rivals", nargs="+", choices=training.RIVALS, default=list(training.RIVALS), help="of training"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each contestant; medians count (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat of the smallest sizes, of the first model only"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "axolotl-spin-bench")
    parser.add_argument("--json", type=Path, help="file to write, with the machine's description")
    parser.add_argument("--results", type=Path, help="Markdown file of which a section is written")
    parser.add_argument("--section", help="its title (default: the GPU's name, or CPU)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    workload.prepare(arguments.folder)
    if arguments.quick:
        arguments.repeats = 1
    models = arguments.models[:1] if arguments.quick else arguments.models
    rows: Rows = []
    started = time.monotonic()
    for name in arguments.figures:
        measure, every_model = FIGURES[name]
        for model in models if every_model else [ONCE.get(name, "llama")]:
            begun = time.monotonic()
            rows += measure(arguments, model)
            print(f"{name}, {model}: {time.monotonic() - begun:.0f} s\n{table(rows)}", file=sys.stderr, flush=True)
    report = {
        "date": date.today().isoformat(),
        "command": command(arguments),
        "minutes": round((time.monotonic() - started) / 60),
        "quick": arguments.quick,
        "repeats": arguments.repeats,
        **machine(),
        "rows": rows,
    }
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.results:
        known = arguments.results.read_text() if arguments.results.exists() else ""
        arguments.results.write_text(with_section(known, arguments.section or report["gpu"] or "CPU", report))


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on and with."""
    import psutil
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    described = subprocess.run(
        ["git", "-C", str(workload.ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": names[0].partition(": ")[2] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": described.stdout.strip(),
    }


def command(arguments: argparse.Namespace) -> str:
    """Returns how this was called, without paths of this machine."""
    parts = ["python tests/benchmarks/run.py"]
    for name, every in (
        ("figures", list(FIGURES)),
        ("models", list(workload.MODELS)),
        ("rivals", list(training.RIVALS)),
    ):
        if getattr(arguments, name) != every:
            parts += [f"--{name}", *getattr(arguments, name)]
    if arguments.quick:
        parts.append("--quick")
    elif arguments.repeats != 3:
        parts.append(f"--repeats {arguments.repeats}")
    return " ".join(parts)


def table(rows: Rows) -> str:
    """Returns the figures as a Markdown table."""
    head = "| figure | workload | SPIN | against | | ratio | to reach |\n|---|---|---|---|---|---|---|"
    lines = []
    for row in rows:
        ratio = f"{row['difference']:+.3f} s" if "difference" in row else f"{row['ratio']:.2f} x"
        cells = [row["figure"], row["workload"], f"{row['value']:.3g}", row["against"], f"{row['other']:.3g}"]
        lines.append("| " + " | ".join([*cells, ratio, row["target"]]) + " |")
    return "\n".join([head, *lines])


HEAD = """# Benchmark results

`make bench` measures these figures again. Each is a ratio inside one run: the contestants take turns, and medians of the
repeats count. What a figure is and how it is measured, the scripts beside this file say.
"""


def with_section(known: str, title: str, report: dict[str, Any]) -> str:
    """Returns a results file with one section written anew, or added at the end.

    Args:
        known: The file as it is; may be empty.
        title: The section's.
        report: What was measured.
    """
    sections = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", known, flags=re.MULTILINE))
    sections[title] = section(report)
    return "\n".join([HEAD, *(f"## {name}\n\n{text.strip()}\n" for name, text in sections.items())])


def section(report: dict[str, Any]) -> str:
    """Returns when, with what and how the figures were measured, and the figures."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    on = f"{report['gpu']}; " if report["gpu"] else ""
    smoke = "**A smoke run: these figures mean nothing.**\n\n" if report["quick"] else ""
    run = f"commit {report['commit']}, {report['repeats']} repeat(s), {report['minutes']} minutes"
    return f"""{smoke}- {report["date"]}, {run}: `{report["command"]}`
- {on}{report["cpu"]}, {report["cores"]} cores, {report["memory_gib"]} GiB
- Python {report["python"]}, {versions}

{table(report["rows"])}
"""


if __name__ == "__main__":
    main()
