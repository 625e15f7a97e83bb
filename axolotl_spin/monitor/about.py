"""`spin/about.json`: what ran and on what: the config as the user wrote it, versions, hardware, and each start.

It describes a run and decides nothing: a resume on another machine adds a start to the list.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import DamagedFileError, read_json, write_json

LOG = get_logger(__name__)

_PACKAGES = ("axolotl-spin", "axolotl", "transformers", "torch", "accelerate", "peft", "datasets", "deepspeed", "vllm")

LEFT_OUT = "(left out)"
# keys of credentials; the tokens of a tokenizer are called `bos_token`, `eos_tokens`, `max_new_tokens`, ...
_SECRET_KEY = re.compile(
    r"(^|_)(secret|password|passwd|credentials?)($|_)|(^|_)(api|access|account|private|secret)_?key|"
    r"(^|_)(auth|access|hub|hf|api|session|wandb|sas|bearer)_?token|^token$|^key$|connection_string|webhook"
)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(value: Any, key: str = "") -> Any:
    """Returns a config without tokens, passwords and keys.

    Args:
        value: Plain JSON.
        key: The key that it stands under.
    """
    secret = bool(_SECRET_KEY.search(key.lower()))
    if secret and value and isinstance(value, (dict, int, float)) and value is not True:
        return LEFT_OUT
    if isinstance(value, dict):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, key) for item in value]
    if isinstance(value, str) and value:
        if secret:
            return LEFT_OUT
        return _CREDENTIALS_IN_URL.sub(f"{LEFT_OUT}@", _SECRET_VALUE.sub(LEFT_OUT, value))
    return value


def plain_config(cfg: Any) -> dict[str, Any]:
    """Returns a config as plain JSON: what the user set, without secrets.

    Args:
        cfg: The host's, as it is before validation.
    """
    # YAML allows keys that are no strings, and dates
    known = {str(key): value for key, value in cfg.items() if value is not None and key != "axolotl_config_path"}
    return without_secrets(json.loads(json.dumps(known, default=str)))


def note_start(path: Path, *, config: dict[str, Any], file: str, step: int, ranks: int, sharding: str | None) -> None:
    """Adds a start of the run. Call it on one rank.

    Args:
        path: `about.json`.
        config: Of this start, from `plain_config`.
        file: How the user names the config.
        step: Optimizer steps before this start.
        ranks: Processes.
        sharding: See `Launch`.
    """
    kept = _read(path)
    before = kept.get("config") or config
    changed = {
        key: [before.get(key), config.get(key)]
        for key in sorted({*before, *config})
        if before.get(key) != config.get(key)
    }
    start = {
        "time": _now(),
        "step": step,
        "config_file": file,
        "changed": changed,
        "ranks": ranks,
        "sharding": sharding,
        "versions": versions(),
        "hardware": hardware(),
    }
    ends = dict.fromkeys(("completed", "stopped", "ended"))
    write_json(path, {"config": config, "starts": [*kept.get("starts", []), start], **ends})


def note_end(path: Path, step: int, complete: bool, why: str | None = None) -> None:
    """Notes when the run was complete, or when and where the host ended it before its last step. Call it on one rank.

    Args:
        path: `about.json`.
        step: Optimizer steps of the run by now.
        complete: It took its last step, or `spin.patience` ended it.
        why: In the latter case, what it ended by.
    """
    stopped = None if complete else {"time": _now(), "step": step}
    ended = {"step": step, "why": why} if why else None
    completed = _now() if complete else None
    write_json(path, {**_read(path), "completed": completed, "stopped": stopped, "ended": ended})


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those packages that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Returns what this process runs on; memory in GiB. Call it where the host has already set up its devices."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [],
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found["gpus"].append({"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1)})
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def _cpu() -> str:
    try:
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        LOG.warning(f"{error}: it is written anew")
        return {}
