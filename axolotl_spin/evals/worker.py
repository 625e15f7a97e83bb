"""Benchmarks in a process of their own: run as a script by a Python that has lm-eval, and vLLM where that is to answer.

    python worker.py JOB

JOB is a JSON file: `asked` has the arguments of `tasks.asked_benchmarks`, `kind` is lm-eval's name of a kind of model
(`vllm`), `model` has the arguments of that. What lm-eval found goes, as JSON, to the job's `report`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))
# a script's own folder is searched first: the files beside this one would stand for the libraries of their names
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

_KEPT = ("results", "versions", "n-samples", "higher_is_better", "group_subtasks")


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    benchmarks = _tasks().asked_benchmarks(**job["asked"]).load()
    import lm_eval.models  # noqa: F401 - which registers them
    from lm_eval.api.registry import get_model

    found = benchmarks.run(get_model(job["kind"])(**job["model"]))
    with open(job["report"], "w", encoding="utf-8") as file:
        json.dump({key: found[key] for key in _KEPT if key in found}, file, default=float)


def _tasks() -> ModuleType:
    """Returns `tasks.py`: this package need not be installed here."""
    spec = importlib.util.spec_from_file_location("axolotl_spin_tasks", os.path.join(_HERE, "tasks.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
