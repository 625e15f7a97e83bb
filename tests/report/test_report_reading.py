"""What a report makes of a folder that is new, running, damaged, another run's or old; and the samples that it shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import finished
import host
import plotly.graph_objects
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from axolotl_spin.cli import spin
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.lock import hold_directory
from axolotl_spin.monitor.log import restart_log
from axolotl_spin.report.answers import Sample, _fit, choose, read_answers, sample
from axolotl_spin.report.charts import POINTS, curves
from axolotl_spin.report.page import render
from axolotl_spin.report.reading import read_run
from axolotl_spin.report.summaries import iterations

pytestmark = pytest.mark.once


def test_folders_without_a_run_are_refused(tmp_path: Path) -> None:
    finished.make(tmp_path / "run")
    for arguments, message in (
        (["run"], "holds no SPIN run: there is no"),
        ([str(tmp_path / "run"), str(tmp_path)], "holds no SPIN run: there is no"),
        ([], "Missing argument 'OUTPUT_DIR...'"),
        (
            [str(tmp_path / "run"), "--output", str(tmp_path / "run" / "spin" / "plan.json" / "x.html")],
            "name another place",
        ),
    ):
        done = CliRunner().invoke(spin, ["report", *arguments])
        assert done.exit_code != 0 and message in done.output, done.output
    os.mkfifo(pipe := tmp_path / "pipe")
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "run"), "--output", str(pipe)])
    assert done.exit_code == 1 and "pipe is no plain file: name another place" in done.output and pipe.is_fifo()
    RunDirectory(tmp_path / "run").log.unlink()
    RunDirectory(tmp_path / "run").log.mkdir()
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "run")])
    assert done.exit_code == 1 and "a file of the run cannot be read" in done.output
    RunDirectory(tmp_path / "run").plan.write_text('{"iterations": [{}]}')
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "run")])
    assert done.exit_code == 1 and "plan.json is damaged" in done.output


def test_a_run_that_has_not_answered_yet(tmp_path: Path) -> None:
    finished.make(tmp_path, begun=0)
    run = read_run(tmp_path)
    assert (run.state, run.step, run.metrics) == ("stopped", 0, {})
    text = render([run]).decode()
    assert "No iteration has begun yet" in text and "There are no pairs yet" in text


HOLDER = """
import os, sys, time
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.lock import hold_directory

directory = RunDirectory(sys.argv[1])
if sys.argv[2] == "elsewhere":
    sys.platform = "another"
hold_directory(directory)
if sys.argv[2] == "here":
    directory.lock.read_bytes()  # as the host reads all files of a folder that it uploads
if os.fork() == 0:
    sys.stdin.read()  # a worker that outlives the run
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_run_that_another_process_holds_is_running(where: str, tmp_path: Path) -> None:
    """And no second one may write there. Systems without locks of an open file have POSIX locks."""
    finished.make(tmp_path, begun=1)
    directory, pipe = RunDirectory(tmp_path), subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, str(tmp_path), where]
    holder = subprocess.Popen(command, env=host.environment(), stdin=pipe, stdout=pipe, text=True)
    try:
        assert holder.stdin is not None and holder.stdout is not None and "held" in holder.stdout.readline()
        assert read_run(tmp_path).state == "running"
        assert read_run(tmp_path).state == "running"  # looking took nothing from it
        with pytest.raises(RuntimeError, match=f'another run is writing to .*"pid": {holder.pid}'):
            hold_directory(directory)
        holder.kill()
        holder.wait()
        limit = time.monotonic() + 10
        while read_run(tmp_path).state != "stopped" and time.monotonic() < limit:
            time.sleep(0.05)
        assert read_run(tmp_path).state == "stopped" and directory.lock.exists()
    finally:
        holder.kill()
        holder.communicate()


def test_damaged_and_foreign_files_are_left_out_and_named(tmp_path: Path) -> None:
    finished.make(tmp_path / "one", seed=1)
    finished.make(tmp_path / "other", seed=2)
    one, other = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "other")
    shutil.copy(other.pairs(0), one.pairs(0))
    one.pairs(1).write_bytes(one.pairs(1).read_bytes()[:900])
    one.metrics(0).write_text("{")
    one.about.write_text("[]")
    with one.log.open("a") as file:
        file.write('{"loss": 0.1, "st')
    run = read_run(tmp_path / "one")
    assert read_answers(run) == [] and list(run.metrics) == [1]
    for message in (
        f"{one.pairs(0)} belongs to another run",
        f"{one.pairs(1)} is damaged",
        "metrics.json",
        "about.json",
    ):
        assert any(message in note for note in run.notes), message
    assert "belongs to another run" in render([run]).decode()


def test_damaged_texts_cost_no_more_than_themselves(tmp_path: Path) -> None:
    """A byte of a page of texts: the figures stay, and so does the page."""
    finished.make(tmp_path, prompts=30, iterations=2)
    path = RunDirectory(tmp_path).pairs(1)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "rejected")
        end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    damaged = bytearray(path.read_bytes())
    damaged[end - 5] ^= 0xFF
    path.write_bytes(damaged)
    run = read_run(tmp_path)
    text = render([run]).decode()
    assert any(f"Texts in {path} are damaged" in note for note in run.notes) and "Texts in" in text
    shown = sample([read_answers(run)])
    assert all(prompt["answers"][0] and not prompt["answers"][1] for prompt in shown.prompts)


def test_a_lock_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    finished.make(tmp_path, begun=1)
    RunDirectory(tmp_path).lock.unlink(missing_ok=True)
    RunDirectory(tmp_path).lock.mkdir()
    assert read_run(tmp_path).state == "unknown" and "not complete" in read_run(tmp_path).standing


def test_with_a_part_of_sft_the_loss_has_no_level(tmp_path: Path) -> None:
    finished.make(tmp_path / "without")
    finished.make(tmp_path / "with", **{"spin.sft_weight": 0.1})
    charts = [curves([read_run(tmp_path / name)])[0] for name in ("without", "with")]
    levels = [[shape for shape in chart.layout["shapes"] if shape["line"]["dash"] == "dash"] for chart in charts]
    assert [len(found) for found in levels] == [1, 0]
    assert ["spin.sft_weight" in chart.note for chart in charts] == [False, True]


def test_a_run_without_a_log_shows_its_last_checkpoints(tmp_path: Path) -> None:
    finished.make(tmp_path)
    rows = read_run(tmp_path).rows
    for step in (9, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        kept = [row for row in rows if row["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": kept}))
    RunDirectory(tmp_path).log.unlink()
    run = read_run(tmp_path)
    assert run.step == 20 and any("checkpoint-20" in note for note in run.notes)


def test_answers_are_those_of_the_file(tmp_path: Path) -> None:
    """Lengths, margins and texts against the rows of the file itself; kept pairs are no answers of the iteration."""
    finished.make(tmp_path, prompts=30, iterations=2)
    run = read_run(tmp_path)
    found = read_answers(run)
    shown = sample([found])
    assert (len(shown.prompts), shown.total) == (30, 30)
    for column, answers in enumerate(found):
        rows = [row for row in pq.read_table(answers.path).to_pylist() if row["generated_in"] == column]
        assert len(rows) == 30
        for prompt, row in zip(shown.prompts, rows, strict=True):
            answer = prompt["answers"][column]
            assert (prompt["prompt"], prompt["human"], answer["text"]) == (
                row["prompt"],
                row["chosen"],
                row["rejected"],
            )
            assert (answer["tokens"], answer["cut"]) == (len(row["rejected_ids"]), row["finish_reason"] == "length")
            human = row["opponent_chosen_logp"] / len(row["chosen_ids"])
            own = row["opponent_rejected_logp"] / len(row["rejected_ids"])
            assert answer["margin"] == pytest.approx(human - own, abs=1e-4)


def test_a_sample_is_the_same_each_time_and_spread_over_the_data(tmp_path: Path) -> None:
    finished.make(tmp_path, prompts=20_000, iterations=1)
    [answers] = read_answers(read_run(tmp_path))
    picked = choose([answers])
    assert picked == choose([answers]) and 240 <= len(picked) <= 240 + 36
    assert (picked[0], picked[-1]) == (0, 19_999)
    assert max(later - earlier for earlier, later in pairwise(picked)) <= 84
    assert {int(answers.margin.argmax()), int(answers.margin.argmin()), int(answers.rejected_length.argmax())} <= set(
        picked
    )


def test_iterations_that_answer_different_prompts(tmp_path: Path) -> None:
    """Each prompt stands once, with the answers that it has, found by itself and not by its place."""
    finished.make(tmp_path, prompts=12, iterations=3, **{"spin.prompts_per_iteration": 12})
    run = read_run(tmp_path)
    for iteration, rows in ((0, [0, 1, 2, 3, 4, 5]), (1, [11, 10, 9, 8, 4])):
        path = run.directory.pairs(iteration)
        pq.write_table(pq.read_table(path).take(rows), path)
    shown = sample([read_answers(run)])
    assert (len(shown.prompts), shown.total) == (12, 6 + 5 + 12)
    found = [{prompt["prompt"]: prompt["answers"][column] for prompt in shown.prompts} for column in range(3)]
    assert [sum(answer is not None for answer in column.values()) for column in found] == [6, 5, 12]
    for iteration, column in enumerate(found):
        table = pq.read_table(run.directory.pairs(iteration)).to_pylist()
        texts = {row["prompt"]: row["rejected"] for row in table if row["generated_in"] == iteration}
        assert {prompt: answer["text"] for prompt, answer in column.items() if answer} == texts
    assert len({prompt["n"] for prompt in shown.prompts}) == 12


def test_texts_are_cut_until_they_fit() -> None:
    """240 prompts of five texts of 20 thousand bytes: cut, and of a prompt the end is kept."""
    text = "x" * 19_999 + "é"
    prompts = [
        {"n": i, "prompt": text, "human": text, "answers": [{"text": text}, None, {"text": text}, {"text": text}]}
        for i in range(240)
    ]
    made = Sample([], prompts, 240)
    _fit(made)
    assert (made.cut_at, len(made.prompts)) == (1000, 240)
    first = made.prompts[0]
    assert first["prompt"].endswith("é") and len(first["prompt"]) == 1000 and first["prompt_characters"] == 20_000
    assert first["answers"][2]["text"] == "x" * 1000 and first["answers"][1] is None


def test_charts_are_valid_figures_of_what_was_logged(tmp_path: Path) -> None:
    """Plotly's own validation takes every chart; the loss is the logged one, iterations apart."""
    finished.make(tmp_path, prompts=40, iterations=2)
    run = read_run(tmp_path)
    answers = [read_answers(run)]
    made = [*curves([run]), *iterations([run], answers)]
    assert len({chart.name for chart in made}) == len(made) >= 10
    for chart in made:
        text = re.sub(r'"@\w+"', '"#123456"', json.dumps(chart.to_json()))
        figure = json.loads(text)
        figure["layout"].pop("xaxis_range", None)
        plotly.graph_objects.Figure(figure["data"], figure["layout"])
    loss = next(chart for chart in made if chart.name == "curve-loss").data[0]
    rows = [row for row in run.rows if "loss" in row]
    first = run.iterations[0].steps
    assert loss["x"] == [*range(1, first + 1), None, *range(first + 1, run.total_steps + 1)]
    assert [y for y in loss["y"] if y is not None] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    lengths = next(chart for chart in made if chart.name == "iteration-lengths")
    assert all(sum(trace["y"]) == pytest.approx(1.0, abs=1e-4) for trace in lengths.data)


@pytest.mark.parametrize(
    ("kind", "level", "text"), [("sigmoid", 0.693147, "ln 2"), ("hinge", 1.0, "1"), ("space", 1.386294, "2 ln 2")]
)
def test_the_level_at_which_the_loss_starts(tmp_path: Path, kind: str, level: float, text: str) -> None:
    finished.make(tmp_path, **{"spin.loss": kind})
    layout = curves([read_run(tmp_path)])[0].layout
    assert [shape["y0"] for shape in layout["shapes"] if shape.get("y0") == shape.get("y1")] == [pytest.approx(level)]
    assert text in [label["text"] for label in layout["annotations"]]


def test_long_logs_are_averaged_and_the_page_says_so(tmp_path: Path) -> None:
    plan = finished.make(tmp_path, prompts=40, iterations=1)
    directory = RunDirectory(tmp_path)
    steps = 10 * POINTS
    entry = json.loads(directory.plan.read_text())
    entry["iterations"][0]["steps"] = steps
    directory.plan.write_text(json.dumps(entry))
    restart_log(
        directory.log,
        ({"loss": float(step % 10), "rewards/margins": 0.0, "step": step} for step in range(1, steps + 1)),
    )
    chart = curves([read_run(tmp_path)])[0]
    assert plan.total_steps < steps
    assert len(chart.data[0]["x"]) == POINTS and set(chart.data[0]["y"]) == {4.5}
    assert "mean of up to 10 logged rows" in chart.note
