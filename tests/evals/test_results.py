"""What is kept of lm-eval's results, and when it is taken for those of a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.evals.in_training import PolicyBenchmarks
from axolotl_spin.evals.results import collect, figures, holds, note_in_metrics, read_evals, same_model, write_evals
from axolotl_spin.monitor.benchmarks import EVAL_START

pytestmark = pytest.mark.once

FOUND: dict[str, Any] = {
    "results": {
        "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "choices": {
            "alias": " - choices",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "ppl,none": 7,
            "ppl_stderr,none": "N/A",
        },
        "answers": {"alias": "answers", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.05},
        "broken": {"alias": "broken", "acc,none": float("nan")},
        "tag": {" ": " ", "alias": "tag"},
    },
    "group_subtasks": {"group": ["choices"], "answers": []},
    "versions": {"choices": 2, "answers": 3.0, "group": None},
    "n-samples": {
        "choices": {"original": 90, "effective": 11},
        "answers": {"original": 90, "effective": 7},
        "broken": {"original": 1, "effective": 1},
    },
    "higher_is_better": {
        "choices": {"acc": True, "ppl": False},
        "answers": {"exact_match": True},
        "group": {"acc": None},
    },
}


def test_what_is_kept_by_hand() -> None:
    acc = {"value": 0.5, "stderr": 0.1, "higher_is_better": True}
    value = collect(FOUND, run="abc", limit=11, chat_template=False)
    assert value == {
        "run": "abc",
        "weights": None,
        "limit": 11,
        "chat_template": False,
        "tasks": {
            "group": {"version": None, "samples": 11, "metrics": {"acc": acc}},
            "choices": {
                "version": 2,
                "samples": 11,
                "metrics": {"acc": acc, "ppl": {"value": 7.0, "stderr": None, "higher_is_better": False}},
            },
            "answers": {
                "version": 3.0,
                "samples": 7,
                "metrics": {"exact_match,strict-match": {"value": 0.25, "stderr": 0.05, "higher_is_better": True}},
            },
        },
    }
    json.dumps(value, allow_nan=False)
    assert figures({"tasks": {"answers": value["tasks"]["answers"]}}) == {
        "spin/eval/answers/exact_match,strict-match": 0.25,
        "spin/eval/answers/exact_match,strict-match_stderr": 0.05,
    }
    assert figures(value, EVAL_START)["spin/eval_start/choices/ppl"] == 7.0
    assert "spin/eval/choices/ppl_stderr" not in figures(value)


def results(task: str, version: Any = 1, **how: Any) -> dict[str, Any]:
    entry = {
        "version": version,
        "samples": 1,
        "metrics": {"acc": {"value": 1.0, "stderr": None, "higher_is_better": True}},
    }
    return {"run": "a", "weights": None, "limit": None, "chat_template": False, "tasks": {task: entry}, **how}


def test_results_of_the_same_model_are_added_up(tmp_path: Path) -> None:
    path = tmp_path / "evals.json"
    assert read_evals(path) is None
    for value, tasks, weights in (
        (results("x", weights="1f"), ["x"], "1f"),
        (results("y"), ["x", "y"], "1f"),  # asked on disk, where weights have no digest
        (results("y", version=2, weights="1f"), ["x", "y"], "1f"),
        (results("z", weights="2f"), ["z"], "2f"),
        (results("x", weights="2f", limit=5), ["x"], "2f"),
        (results("y", weights="2f", limit=5, chat_template=True), ["y"], "2f"),
        (results("x", run="b"), ["x"], None),
    ):
        write_evals(path, value)
        found = read_evals(path)
        assert found is not None and sorted(found["tasks"]) == tasks and found["weights"] == weights
    path.write_text("{")
    assert read_evals(path) is None


def test_results_hold_a_task_in_its_version() -> None:
    known = results("x", version=2)
    assert holds(known, {"x": 2}) and not holds(known, {"x": 3}) and not holds(known, {"x": 2, "y": 1})
    assert same_model(known, {"run": "a", "limit": None})
    assert not same_model(known, {"run": "a", "limit": 5}) and not same_model(None, {})


def test_later_results_replace_those_in_metrics(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    note_in_metrics(directory, 0, results("x"))  # there is none, and none is made
    assert not directory.metrics(0).exists()
    write_json(directory.metrics(0), {"loss_last": 0.5, "spin/eval/old/acc": 0.1, "spin/eval_seconds": 3.0})
    note_in_metrics(directory, 0, results("x"))
    note_in_metrics(directory, None, results("y"))
    assert json.loads(directory.metrics(0).read_text()) == {
        "loss_last": 0.5,
        "spin/eval/x/acc": 1.0,
        "spin/eval_seconds": 3.0,
        "spin/eval_start/y/acc": 1.0,
    }


def test_a_run_that_goes_on_keeps_what_was_asked_of_its_models_meanwhile(tmp_path: Path) -> None:
    """By `axolotl spin eval`: an iteration's end writes `metrics.json` anew, and may come again."""
    directory = RunDirectory(tmp_path)
    identity = SimpleNamespace(before=lambda i: f"before {i}", through=lambda i: f"through {i}")
    run: Any = SimpleNamespace(directory=directory, identity=identity, benchmarks=None)
    ranks: Any = SimpleNamespace(on_main=lambda work: work())
    benchmarks = PolicyBenchmarks(run, None, ranks)
    first, second = (SimpleNamespace(iteration=iteration) for iteration in (0, 1))
    assert benchmarks.after(first) == {}
    write_evals(directory.start_evals, results("x", run="before 0"))
    write_evals(directory.evals(0), results("y", run="through 0"))
    write_evals(directory.evals(1), results("y", run="another's"))
    assert benchmarks.after(first) == {"spin/eval/y/acc": 1.0, "spin/eval_start/x/acc": 1.0}
    assert benchmarks.after(second) == {}
    write_evals(directory.evals(1), results("y", run="through 1"))
    assert benchmarks.after(second) == {"spin/eval/y/acc": 1.0}


@pytest.mark.parametrize(
    ("value", "error", "text"), [(0.5123, 0.03, "0.512±0.030"), (12345.6, None, "1.235e+04"), (7, None, "7.000")]
)
def test_a_figure_as_text(value: float, error: float | None, text: str) -> None:
    from axolotl_spin.monitor.benchmarks import written

    assert written(value, error) == text
