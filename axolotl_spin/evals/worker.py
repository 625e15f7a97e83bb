"""Benchmarks in a process of their own: run as a script by a Python that has lm-eval, and vLLM where that is to answer.

    python worker.py JOB

JOB is a JSON file, whose keys `saved.job_of` describes. It asks lm-eval for no more than its public `simple_evaluate`: the
lm-eval that fits a vLLM may be another than the host's.
"""

from __future__ import annotations

import json
import os
import sys

# a script's own folder is searched first: the files beside this one would stand for the libraries of their names
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

_KEPT = ("results", "versions", "n-samples", "higher_is_better", "group_subtasks")


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=job["folders"] or None)
    found = simple_evaluate(
        model=job["kind"],
        model_args=job["model"],
        tasks=job["tasks"],
        task_manager=manager,
        log_samples=False,
        **job["how"],
    )
    assert found is not None
    with open(job["report"], "w", encoding="utf-8") as file:
        json.dump({key: found[key] for key in _KEPT if key in found}, file, default=float)


if __name__ == "__main__":
    main(sys.argv[1])
