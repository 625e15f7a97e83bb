"""Benchmarks on the page: a chart for each task, the start model first, with standard errors."""

from __future__ import annotations

import json
from pathlib import Path

import finished
import pytest

from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.report.benchmarks import benchmarks
from axolotl_spin.report.page import _table, render
from axolotl_spin.report.reading import RunData, read_run

pytestmark = pytest.mark.once


def measured(folder: Path) -> RunData:
    """Returns a run of three iterations, the last without benchmarks."""
    finished.make(folder, iterations=3)
    directory = RunDirectory(folder)
    for iteration, figures in (
        (0, {"spin/eval_start/a/acc": 0.25, "spin/eval_start/a/acc_stderr": 0.03, "spin/eval/a/acc": 0.5}),
        (
            1,
            {
                "spin/eval/a/acc": 0.75,
                "spin/eval/a/acc_stderr": 0.04,
                "spin/eval/a/f1,<b>": 0.1,
                "spin/eval/b/ppl": 9.0,
            },
        ),
    ):
        path = directory.metrics(iteration)
        write_json(path, {**json.loads(path.read_text()), **figures})
    return read_run(folder)


def test_each_task_over_iterations(tmp_path: Path) -> None:
    first, second = benchmarks([measured(tmp_path)])
    assert (first.title, second.title) == ("Benchmark: a", "Benchmark: b")
    assert first.layout["xaxis"]["categoryarray"] == ["start", "0", "1", "2"]
    acc, f1 = first.data
    assert (acc["x"], acc["y"], acc["error_y"]["array"]) == (["start", "0", "1"], [0.25, 0.5, 0.75], [0.03, None, 0.04])
    assert (f1["x"], f1["y"], f1["name"]) == (["1"], [0.1], "f1,&lt;b&gt;") and "error_y" not in f1
    assert acc["line"]["color"] != f1["line"]["color"] and first.layout["showlegend"]
    assert (second.data[0]["x"], second.data[0]["y"]) == (["1"], [9.0])


def test_runs_side_by_side(tmp_path: Path) -> None:
    runs = [measured(tmp_path / name) for name in ("one", "two")]
    [acc, *_] = benchmarks(runs)
    assert len({trace["line"]["color"] for trace in acc.data}) == 2 and len(acc.data) == 4
    assert b"Benchmark: b" in render(runs)


def test_the_pages_table(tmp_path: Path) -> None:
    columns, rows = _table([measured(tmp_path)])
    assert [column["heading"] for column in columns[-3:]] == ["a acc", "a f1,<b>", "b ppl"]
    assert [(row[0], *row[-3:]) for row in rows] == [
        ("start", "0.250±0.030", "-", "-"),
        ("0 ★", "0.500", "-", "-"),  # the best by `eval_loss`
        ("1", "0.750±0.040", "0.100", "9.000"),
        ("2", "-", "-", "-"),
    ]


def test_a_run_without_benchmarks_has_no_chart(tmp_path: Path) -> None:
    finished.make(tmp_path)
    assert benchmarks([read_run(tmp_path)]) == []
