"""The plan's arithmetic, against the paper's recipe and figures worked out by hand."""

from __future__ import annotations

import pytest

from axolotl_spin.run.plan import Position, make_plan, warmup_steps


def plan(prompts: int = 10, **changes):
    settings = dict(global_batch=4, num_epochs=2, history=1, betas=[0.1] * 3, learning_rates=[1e-3] * 3)
    return make_plan(prompts, **{**settings, **changes})


def test_paper_recipe() -> None:
    """50k prompts, batch 64, 2 epochs: 50k pairs at first, then 100k with the previous iteration's."""
    paper = plan(
        50_000, global_batch=64, betas=[0.1, 0.1, 0.1, 5.0], learning_rates=[5e-7, 5e-7, 1e-7, 1e-7],
        warmup={"warmup_steps": None, "warmup_ratio": 0.1},
    )  # fmt: skip
    assert [entry.rows for entry in paper.iterations] == [50_000, 100_000, 100_000, 100_000]
    assert [entry.kept_rows for entry in paper.iterations] == [0, 50_000, 50_000, 50_000]
    # ceil(50000/64) = 782, ceil(100000/64) = 1563
    assert [entry.steps for entry in paper.iterations] == [1564, 3126, 3126, 3126]
    assert [entry.warmup_steps for entry in paper.iterations] == [156, 312, 312, 312]
    assert [entry.beta for entry in paper.iterations] == [0.1, 0.1, 0.1, 5.0]
    assert [entry.learning_rate for entry in paper.iterations] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [entry.first_step for entry in paper.iterations] == [0, 1564, 4690, 7816]
    assert (paper.total_steps, paper.total_epochs) == (10_942, 8)


@pytest.mark.parametrize(("history", "rows"), [(0, [10, 10, 10]), (1, [10, 20, 20]), (2, [10, 20, 30])])
def test_history_keeps_so_many_earlier_generations(history: int, rows: list[int]) -> None:
    assert [entry.rows for entry in plan(history=history).iterations] == rows


def test_every_global_step_has_one_place() -> None:
    """10 prompts, batch 4: epochs of 3, then 5 and 5 steps, two of each."""
    laid_out = plan()
    places = [laid_out.locate(step) for step in range(laid_out.total_steps)]
    expected = [
        Position(iteration, 2 * iteration + epoch, step)
        for iteration, steps in enumerate([3, 5, 5])
        for epoch in range(2)
        for step in range(steps)
    ]
    assert places == expected
    assert laid_out.locate(laid_out.total_steps) == Position(3, 6, 0)
    assert [laid_out.of_epoch(epoch).iteration for epoch in range(6)] == [0, 0, 1, 1, 2, 2]


def test_max_steps_ends_the_run_in_mid_iteration() -> None:
    short = plan(max_steps=8)
    assert [(entry.steps, entry.epochs) for entry in short.iterations] == [(6, 2), (2, 1)]
    assert (short.total_steps, short.total_epochs) == (8, 3)
    for no_cap in (1000, -1, 0, None):
        assert [entry.steps for entry in plan(max_steps=no_cap).iterations] == [6, 10, 10]


def test_warmup_by_the_hosts_rule() -> None:
    assert warmup_steps(1000, warmup_steps=7, warmup_ratio=0.5) == 7
    assert warmup_steps(5, warmup_steps=7, warmup_ratio=None) == 5
    assert warmup_steps(1000, warmup_steps=None, warmup_ratio=0.1) == 100
    assert warmup_steps(10, warmup_steps=None, warmup_ratio=0.1) == 2  # never one step
    assert warmup_steps(1000, warmup_steps=None, warmup_ratio=None) == 30
    assert warmup_steps(100_000, warmup_steps=None, warmup_ratio=None) == 100


def test_a_schedule_longer_than_what_is_run() -> None:
    """The authors': 6 epochs laid out and 2 run. 10 prompts, batch 4: epochs of 3, 5 and 5 steps."""
    long = plan(schedule_epochs=6, warmup={"warmup_steps": None, "warmup_ratio": 0.2})
    assert [(entry.steps, entry.schedule_steps) for entry in long.iterations] == [(6, 18), (10, 30), (10, 30)]
    # 20% of what is laid out: int(3.6) and 6
    assert [entry.warmup_steps for entry in long.iterations] == [3, 6, 6]
    assert [entry.first_step for entry in long.iterations] == [0, 6, 16]
    assert plan(schedule_epochs=6, warmup={"warmup_steps": 8, "warmup_ratio": None}).iterations[0].warmup_steps == 8


def test_a_schedule_as_long_as_what_is_run_is_the_plan_without_it() -> None:
    """So that a run begun before the key was there is the same run."""
    assert plan(schedule_epochs=2) == plan()
    assert "schedule" not in plan().iterations[0].to_json()
    assert plan(schedule_epochs=3).iterations[0].to_json()["schedule"] == 9


def test_max_steps_cuts_a_longer_schedule_in_proportion() -> None:
    """The last iteration takes 1 of its 10 steps: of 3/2 as many, 1.5, rounded up."""
    short = plan(max_steps=17, schedule_epochs=3)
    assert [(entry.steps, entry.schedule_steps) for entry in short.iterations] == [(6, 9), (10, 15), (1, 2)]


def test_a_schedule_shorter_than_what_is_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"`spin\.schedule_epochs: 1` is less than `num_epochs: 2`"):
        plan(schedule_epochs=1)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="datasets"):
        plan(0)
