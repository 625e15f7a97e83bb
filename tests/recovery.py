"""A small run to stop, damage and start again, and what must be equal at its end, bit for bit.

It has two iterations of two epochs, a checkpoint every three steps of which two are kept, held-out data, and a log every
second step, so that logging intervals lie across checkpoints and iterations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import host
import torch
import yaml
from safetensors.torch import load_file

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


def settings_in(folder: Path, shared: Path) -> dict[str, Any]:
    """Returns the config of a run in `folder` over the model and data in `shared`."""
    made = {**host.config(shared, rows=19), **CHANGES, "output_dir": str(folder / "out")}
    (folder / "run.yml").write_text(yaml.safe_dump(made))
    return made


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not any(clock in name for clock in CLOCKS)}


def outcome(out: Path, weights: str = "model.safetensors") -> dict[str, Any]:
    """Reads all that a run leaves and that must be equal, whatever stopped it on the way.

    Args:
        out: The run's `output_dir`.
        weights: The file of the model or adapter.
    """
    spin = out / "spin"
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((checkpoints[-1] / "trainer_state.json").read_text())
    names = [str(path.relative_to(spin)) for path in spin.rglob("*") if path.is_file()]
    found: dict[str, Any] = {
        "files": sorted(name for name in names if not name.startswith("replaced-")),
        "checkpoints": [path.name for path in checkpoints],
        "logs": [without_clocks(row) for row in state["log_history"]],
        "log": [without_clocks(json.loads(line)) for line in (spin / "log.jsonl").read_text().splitlines()],
        "plan": json.loads((spin / "plan.json").read_text()),
        "weights": load_file(out / weights),
    }
    for iteration in range(2):
        folder = spin / f"iteration-{iteration}"
        found[f"pairs {iteration}"] = host.Run(0, "", out).pairs(iteration).to_pydict()
        found[f"heldout {iteration}"] = host.Run(0, "", out).heldout(iteration).to_pydict()
        found[f"metrics {iteration}"] = without_clocks(json.loads((folder / "metrics.json").read_text()))
        found[f"weights {iteration}"] = load_file(folder / "model" / weights)
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns the names of what differs; floats and tensors are compared bit for bit."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, dict) and one and isinstance(next(iter(one.values())), torch.Tensor):
            return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        return bool(one == other)

    return [name for name in expected if not equal(found[name], expected[name])]
