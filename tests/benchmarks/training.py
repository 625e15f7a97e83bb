"""Training on ready pairs: SPIN's layouts against the newest TRL, the host's `rl: dpo` and the host's SFT, and its floor.

Every contestant is a process of its own, in turn, so that what else the machine does hits all of them. SPIN answers the
prompts once, before, in at most 32 tokens, about what the human answers have; its runs then find the pairs on disk, and
TRL (`rival.py`, left out where $SPIN_RIVAL_PYTHON names no environment with it) reads the very token ids. The host's DPO
reads them as text. SFT trains on rows that have as many tokens a step as the largest step of the shared layout, none of
them padding. The floor (`floor.py`) is of the machine's matrix speed in the same run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import floor
import pyarrow.parquet as pq
import workload

# against the best of the others: by layout, and in the shared one by pairs in a step
TARGETS = {"packed": ">= 1.8"}
SFT_LENGTH = 128  # the host pads rows to a multiple of 64
RIVAL, FLOOR = (Path(__file__).with_name(name) for name in ("rival.py", "floor.py"))
SHARED = {8: ">= 2.5", 16: ">= 3"}
RIVALS = ("rival", "dpo")  # TRL's newest, the host's `rl: dpo`


def measure(
    folder: Path,
    model: str,
    *,
    batch: int,
    steps: int,
    repeats: int,
    layouts: tuple[str, ...] = ("shared", "packed"),
    rivals: Sequence[str] = RIVALS,
) -> list[dict[str, Any]]:
    """Returns rows of the table: speed against TRL, memory against TRL and against SFT by the host.

    Args:
        folder: Of `workload.prepare`.
        model: One of `workload.MODELS`.
        batch: Pairs in a step, which is one forward and backward pass.
        steps: In a run; the first one is left out.
        repeats: Of each contestant; medians count.
        layouts: SPIN's; "shared" among them.
        rivals: Of `RIVALS`, those that are measured.

    Raises:
        ValueError: None of the rivals can be measured here.
    """
    python = os.environ.get("SPIN_RIVAL_PYTHON")
    rivals = [name for name in rivals if name != "rival" or python]
    if not rivals:
        raise ValueError(
            "SPIN_RIVAL_PYTHON names no environment with TRL, and there is nothing else to measure against"
        )
    work = folder / "training" / model
    shutil.rmtree(work, ignore_errors=True)
    config, ready = workload.with_pairs(work, folder, model, pairs=batch * steps, most=32, batch=batch)
    file = ready / "spin" / "iteration-0" / "pairs.parquet"
    rows = pq.read_table(file, columns=["prompt_ids", "chosen_ids", "rejected_ids"]).to_pylist()
    dpo = _host_dpo(folder, model, work, ready) if "dpo" in rivals else {}
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for layout in layouts:
            shutil.rmtree(work / "out", ignore_errors=True)
            shutil.copytree(ready, work / "out")
            found.setdefault(layout, []).append(workload.run(work, config, BENCH_LAYOUT=layout))
        command = [str(RIVAL), str(file), str(folder / model), str(batch)]
        if "rival" in rivals:
            found.setdefault("rival", []).append(workload.measured(command, work / "rival.json", python=python))
        if "dpo" in rivals:
            found.setdefault("dpo", []).append(workload.run(work / "dpo", {**dpo, "micro_batch_size": batch}))
        found.setdefault("sft", []).append(_sft(folder, model, work, rows, found["shared"][0]["most_tokens"]))
        speeds = workload.measured([str(FLOOR), str(work / "speed.json")], work / "speed.json")
        found.setdefault("floor", []).append(speeds)
    machine = median(run["speed"] for run in found.pop("floor"))
    names = {}
    if "dpo" in found:
        names["dpo"] = f"the host's `rl: dpo` (TRL {version('trl')})"
    if "rival" in found:
        names["rival"] = f"TRL {found['rival'][0]['versions']['trl']}, reference precomputed, head fused"
    seconds = {name: median(run["step_seconds"] for run in runs) for name, runs in found.items()}
    gib = {name: median(run["peak_bytes"] for run in runs) / 2**30 for name, runs in found.items()}
    about = f"{model}, {' / '.join(f'{count:.0f}' for count in token_counts(rows))} tokens a pair, batch {batch}"
    best = min(names, key=lambda name: seconds[name])
    table = []
    for layout in layouts:
        for other, name in names.items():
            target = (SHARED.get(batch, "") if layout == "shared" else TARGETS.get(layout, "")) if other == best else ""
            table.append(
                _row(
                    f"training, pairs/s, {layout}", about, batch / seconds[layout], name, batch / seconds[other], target
                )
            )
    for other, name in names.items():
        target = "<= 0.9" if other == min(names, key=lambda name: gib[name]) else ""
        table.append(_row("peak memory of a step, GiB, shared", about, gib["shared"], name, gib[other], target))
    ours, theirs = found["shared"][0]["most_tokens"], found["sft"][0]["most_tokens"]
    table.append(
        _row(
            "peak memory of a step per token, MiB, shared",
            f"{model}, {ours} and {theirs} tokens a step",
            1024 * gib["shared"] / ours,
            "SFT by the host",
            1024 * gib["sft"] / theirs,
            "<= 1.1",
        )
    )
    least = floor.operations(folder / model, floor.of_pairs(rows)) / steps / machine
    length = SFT_LENGTH
    sft = floor.operations(folder / model, floor.of_rows(theirs // length, length)) / machine / seconds["sft"]
    for layout in layouts:
        table.append(_row(f"share of the floor, {layout}", about, least / seconds[layout], "SFT by the host", sft, ""))
    return table


def _row(figure: str, about: str, value: float, against: str, other: float, target: str) -> dict[str, Any]:
    return {
        "figure": figure,
        "workload": about,
        "value": value,
        "against": against,
        "other": other,
        "ratio": value / other,
        "target": target,
    }


def token_counts(pairs: Sequence[dict[str, Sequence[int]]]) -> list[float]:
    """Returns the mean tokens of prompts, human answers and the opponent's."""
    return [mean(len(pair[f"{name}_ids"]) for pair in pairs) for name in ("prompt", "chosen", "rejected")]


def _host_dpo(folder: Path, model: str, work: Path, ready: Path) -> dict[str, Any]:
    """Returns the host's config of `rl: dpo` on the same pairs as text; where an answer was cut, it has an end more."""
    export = [sys.executable, "-m", "axolotl_spin", "export", str(ready), "--format", "dpo-text", "--inexact", "keep"]
    where = [*export, "--iteration", "0", "--output", str(work / "dpo" / "pairs")]
    done = subprocess.run(where, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the export ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    changes = {
        "rl": "dpo",
        "spin": None,
        "dpo_beta": 0.1,
        "plugins": ["bench_plugin.BenchPlugin"],
        "datasets": [{"path": str(work / "dpo" / "pairs" / "train.parquet"), "ds_type": "parquet"}],
        "dataset_prepared_path": str(work / "dpo" / "prepared"),
        "remove_unused_columns": False,
        "output_dir": str(work / "dpo" / "out"),
    }
    return workload.settings(folder, model, **changes)


def _sft(folder: Path, model: str, work: Path, pairs: Sequence[dict[str, list[int]]], tokens: int) -> dict[str, Any]:
    """Trains by the host on human answers cut into rows of one length, `tokens` in a step."""
    steps, length = 3, SFT_LENGTH
    batch = max(1, round(tokens / length))
    stream = cycle(chain.from_iterable(pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs))
    rows = [list(islice(stream, length)) for _ in range(steps * batch)]
    data = work / "sft" / "data.jsonl"
    shutil.rmtree(data.parent, ignore_errors=True)
    data.parent.mkdir(parents=True)
    lines = [json.dumps({"input_ids": ids, "attention_mask": [1] * length, "labels": ids}) for ids in rows]
    data.write_text("\n".join(lines) + "\n")
    changes = {
        "rl": None,
        "spin": None,
        "plugins": ["bench_plugin.BenchPlugin"],
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(data.parent / "prepared"),
        "sample_packing": False,
        "micro_batch_size": batch,
        "output_dir": str(data.parent / "out"),
    }
    return workload.run(data.parent, workload.settings(folder, model, **changes))
