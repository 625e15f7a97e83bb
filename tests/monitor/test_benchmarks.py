"""Figures of benchmarks in tables."""

from __future__ import annotations

import pytest

from axolotl_spin.monitor.benchmarks import eval_columns, of_the_start, terminal_columns
from axolotl_spin.monitor.tables import iteration_table, print_wide

pytestmark = pytest.mark.once

ROWS = [
    {"spin/eval/b/acc": 0.5, "spin/eval/b/acc_stderr": 0.1, "spin/eval/b/acc_norm": 0.75, "spin/eval_seconds": 2.0},
    {"spin/eval/a/exact_match,strict": 1.0, "spin/eval_start/a/exact_match,strict": 0.0, "eval_loss": 2.0},
]


def test_columns_in_the_order_of_tasks() -> None:
    names = [(column.task, column.metric) for column in eval_columns(ROWS)]
    assert names == [("a", "exact_match,strict"), ("b", "acc"), ("b", "acc_norm")]
    assert [column.cell(ROWS[0]) for column in eval_columns(ROWS)] == ["-", "0.500±0.100", "0.750"]
    assert eval_columns(ROWS)[0].heading == "a\nexact_match\nstrict"
    assert eval_columns([{"eval_loss": 1.0, "spin/eval_seconds": 2.0}]) == []


def test_of_many_metrics_a_terminal_has_the_first_of_each_task() -> None:
    assert len(terminal_columns(ROWS)) == 3
    many = {f"spin/eval/{task}/{metric}": 1.0 for task in "ab" for metric in ("m1", "m2", "m3")}
    assert [(column.task, column.metric) for column in terminal_columns([many])] == [("a", "m1"), ("b", "m1")]


def test_the_start_models_row_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert of_the_start(ROWS[1]) == {"spin/eval/a/exact_match,strict": 0.0}
    first = {"spin/iteration": 0, "spin/eval_start/a/acc": 0.25, "spin/eval/a/acc": 0.5, "spin/eval/a/acc_stderr": 0.1}
    print_wide(iteration_table([first]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[-1] for line in lines if line and line[0] in ("start", "0")}
    assert rows == {"start": "0.250", "0": "0.500±0.100"}
