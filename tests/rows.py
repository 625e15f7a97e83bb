"""Rows of data, and what the host's code and the plugin's make of them in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import host
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import yaml

TOKENIZER = tiny.tokenizer()

PAIR = {
    "prompt_ids": [4, 7, 8, 6, 5],
    "chosen_ids": [9, 6],
    "rejected_ids": [10, 11, 6],
    "finish_reason": "stop",
}


def load(folder: Path, **changes: Any):
    """Runs the host's `load_cfg` and the plugin's `load_datasets` in this process; no model is loaded."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager

    settings = {**host.config(folder), **changes}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(settings))
    cfg = load_cfg(str(path))
    plugins = PluginManager.get_instance().plugins
    plugin = next(p for p in plugins.values() if type(p).__name__ == "SpinPlugin")
    meta = plugin.load_datasets(cfg)
    return plugin.run, meta, cfg


def jsonl(path: Path, rows: list[dict]) -> dict[str, str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path), "ds_type": "json"}


def words(index: int) -> str:
    return f"w{index} w{index + 1}"


def ids_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
