"""What SPIN adds to the host's own start: with `rl: spin`, and in a config without it.

On: from a process's start until it asks for the first answer, the trial of the layout included, against the same config
without SPIN until its first epoch, in turn. Off: what the host's process spends on a listed plugin, in CPU time and once
everything of the host is imported, since that is less than a start varies by. For any plugin that adds a key the host
builds its config's classes anew; `BarePlugin` shows how much of the time that is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import workload
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel


def measure(folder: Path, *, repeats: int) -> list[dict[str, Any]]:
    """Returns the rows of the table.

    Args:
        folder: Of `workload.prepare`.
        repeats: Of each start; medians count.
    """
    spin = {"iterations": 1, "save_iterations": False, "max_prompts": 64}
    sft = {"rl": None, "spin": None, "plugins": ["bench_plugin.BenchPlugin"]}
    found: dict[str, list[dict[str, float]]] = {"on": [], "without": [], "off": [], "bare": []}
    for _ in range(repeats):
        for name, changes in (("on", {"spin": spin}), ("without", sft)):
            work = folder / "startup" / name
            shutil.rmtree(work, ignore_errors=True)
            config = workload.settings(folder, "llama", **changes, max_steps=1, output_dir=str(work / "out"))
            found[name].append(workload.run(work, config, BENCH_STOP="begin"))
        for name, plugin in (("off", workload.OURS[0]), ("bare", "startup.BarePlugin")):
            found[name].append(workload.measured([__file__, "--plugin", plugin], folder / "startup" / "plugin.json"))
    rows = []
    for field, unit, target in (("start_seconds", "s", "< 2 s more"), ("start_cpu_seconds", "CPU s", "")):
        on, without = (median(run[field] for run in found[name]) for name in ("on", "without"))
        rows.append(_row(f"start-up with SPIN on, {unit}", "llama, 64 prompts", on, without, target))
    off, bare = (median(run["seconds"] for run in found[name]) for name in ("off", "bare"))
    listed = "the package listed as a plugin, no `rl: spin`"
    rows.append(_row("start-up with SPIN off, CPU s", listed, without + off, without, "< 0.05 s more"))
    against = "the host with a plugin that adds a key and does nothing"
    rows.append(_row("start-up with SPIN off, CPU s", listed, without + off, without + bare, "", against))
    return rows


def _row(
    figure: str, workload: str, value: float, other: float, target: str, against: str = "the host's own"
) -> dict[str, Any]:
    return {
        "figure": figure,
        "workload": workload,
        "value": value,
        "against": against,
        "other": other,
        "ratio": value / other,
        "difference": value - other,
        "target": target,
    }


class BareArgs(BaseModel):
    """A plugin's key."""

    bare: bool = False


class BarePlugin(BasePlugin):
    """Adds a key and does nothing."""

    def get_input_args(self) -> str:
        return "startup.BareArgs"


def plugin_share(name: str) -> dict[str, float]:
    """Returns the CPU seconds that a plugin takes of a host start without `rl: spin`, once the host is imported.

    Args:
        name: As `plugins:` lists it.
    """
    import time

    import axolotl.cli.main
    import axolotl.core.builders
    import axolotl.train  # noqa: F401
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    cfg = DictDefault({"base_model": "x", "datasets": []})
    started = time.process_time()
    manager.register(name)
    manager.plugins[name].register(cfg)
    merge_input_args()
    manager.cfg = cfg
    manager.load_datasets(cfg, preprocess=False)
    manager.get_trainer_cls(cfg)
    manager.get_collator_cls_and_kwargs(cfg)
    manager.add_callbacks_pre_trainer(cfg, None)
    return {"seconds": time.process_time() - started}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugin", required=True, help="measure what this plugin takes of a start without SPIN")
    Path(os.environ["BENCH_RESULT"]).write_text(json.dumps(plugin_share(parser.parse_args().plugin)))
