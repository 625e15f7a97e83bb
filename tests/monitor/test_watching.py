"""Watching a run: one run in a terminal, reporting to every tracker at once; what each of them got is read back.

Nothing leaves the machine: wandb is offline, trackio and mlflow write to folders of their own.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import mlflow
import pyarrow as pa
import pytest
import trackio

from axolotl_spin.disk.atomic import write_json
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.tables import iteration_table, print_wide
from axolotl_spin.monitor.terminal import log_line, show_table
from axolotl_spin.monitor.trackers import NAME, markdown, sample_rows, send_samples
from axolotl_spin.run.plan import make_plan

HELD_OUT = 10
STEPS = 21  # 27 pairs are left: 7 steps, and 14 with those of the iteration before
SAMPLES = 8
FIGURES = ("margin", "auc", "length", "human_length", "distinct_2", "seconds")

# the host's callback, from transformers 5.16 on, needs a trackio of 0.21 or later; axolotl 0.19.0 pins 0.19.0
TRACKIO = "bucket_id" in inspect.signature(trackio.init).parameters
needs_trackio = pytest.mark.skipif(not TRACKIO, reason="the host's callback does not work with the trackio it pins")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> host.Run:
    """A run in a terminal of 120 columns, as a process of its own: a fork would not end its trackers."""
    folder = tmp_path_factory.mktemp("watched")
    changes = {
        "val_set_size": HELD_OUT,
        "use_tensorboard": True,
        "wandb_project": "spin",
        "wandb_mode": "offline",
        "mlflow_experiment_name": "spin",
        "mlflow_tracking_uri": (folder / "mlflow").as_uri(),
        **({"trackio_project_name": "spin"} if TRACKIO else {}),
    }
    settings = {**host.config(folder), **changes}
    env = {
        "ACCELERATE_USE_CPU": "true",
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    path = host.write(settings)
    code, output = in_terminal(
        [sys.executable, "-m", "axolotl.cli.train", str(path)], host.environment(**env), path.parent
    )
    assert code == 0, output[-6000:]
    return host.Run(code, output, Path(settings["output_dir"]))


def in_terminal(command: list[str], env: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Runs a command whose output is a terminal; returns its exit code and all that it wrote there."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (50, 120))  # bars have no width in a terminal without one
    process = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed: the process has ended
            break
        if not part:
            break
        written += part
    os.close(master)
    return process.wait(timeout=60), written.decode(errors="replace")


def expected(run: host.Run, name: str) -> list[float]:
    """Returns a figure of the start model and after each iteration."""
    start = run.metrics(0)[name.replace("heldout_", "heldout_start_")]
    return [start, *(run.metrics(iteration)[name] for iteration in range(2))]


def check_samples(run: host.Run, tables: list[list[dict[str, Any]]]) -> None:
    """Checks the tables of the start model and of both iterations against what was written to disk."""
    assert [{row["model"] for row in table} for table in tables] == [{"start"}, {"iteration 0"}, {"iteration 1"}]
    first = [row["prompt"] for row in tables[0]]
    for table, iteration in zip(tables, (None, 0, 1), strict=True):
        assert len(table) == SAMPLES and [row["prompt"] for row in table] == first
        if iteration is not None:
            played = sample_rows(run.heldout(iteration), f"iteration {iteration}")
            assert [row["own"] for row in table] == [row["own"] for row in played]
            assert [row["human"] for row in table] == [row["human"] for row in played]
            assert [row["margin"] for row in table] == pytest.approx([row["margin"] for row in played], abs=1e-6)


# -- trackers ---------------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_wandb(run: host.Run) -> None:
    rows = list(wandb_history(next(run.out.parent.glob("wandb/offline-run-*/*.wandb"))))
    for name in FIGURES:
        found = [row[f"train/spin/heldout_{name}"] for row in rows if f"train/spin/heldout_{name}" in row]
        assert found == pytest.approx(expected(run, f"spin/heldout_{name}"))
    assert sum("train/rewards/margins" in row for row in rows) >= STEPS
    files = run.out.parent / "wandb" / "latest-run" / "files"
    tables = [json.loads((files / row[f"{NAME}/path"]).read_text()) for row in rows if f"{NAME}/path" in row]
    check_samples(run, [[dict(zip(t["columns"], row, strict=True)) for row in t["data"]] for t in tables])
    steps = [row["train/global_step"] for row in rows if f"{NAME}/path" in row]
    assert steps == sorted(steps) and steps[0] == 0 and len(set(steps)) == 3


def wandb_history(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the history rows of an offline run: records in blocks of 32 KiB, each part with a head of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            record = b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.host
def test_tensorboard(run: host.Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = (run.out / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in FIGURES:
        found = [event.value for event in events.Scalars(f"train/spin/heldout_{name}")]
        assert found == pytest.approx(expected(run, f"spin/heldout_{name}"), rel=1e-5)
    assert len(events.Scalars("train/rewards/margins")) >= STEPS
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"train/{NAME}/text_summary")]
    for text, iteration in zip(texts[1:], (0, 1), strict=True):
        assert text == markdown(sample_rows(run.heldout(iteration), f"iteration {iteration}"))
    assert texts[0].count("| start |") == SAMPLES


@pytest.mark.host
@needs_trackio
def test_trackio(run: host.Run) -> None:
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S;"
        "[project] = S.get_projects(); [name] = S.get_runs(project); print(json.dumps(S.get_logs(project, name)))"
    )
    env = host.environment(TRACKIO_DIR=str(run.out.parent / "trackio"))  # which trackio reads when it is imported
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    for name in FIGURES:
        found = [row[f"train/spin/heldout_{name}"] for row in rows if f"train/spin/heldout_{name}" in row]
        assert found == pytest.approx(expected(run, f"spin/heldout_{name}"))
    assert sum("train/rewards/margins" in row for row in rows) >= STEPS
    check_samples(run, [row[NAME]["_value"] for row in rows if NAME in row])


@pytest.mark.host
def test_mlflow(run: host.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((run.out.parent / "mlflow").as_uri())
    [made] = client.search_runs([client.get_experiment_by_name("spin").experiment_id])
    for name in FIGURES:
        found = sorted(client.get_metric_history(made.info.run_id, f"spin/heldout_{name}"), key=lambda m: m.step)
        assert [metric.value for metric in found] == pytest.approx(expected(run, f"spin/heldout_{name}"))
    assert len(client.get_metric_history(made.info.run_id, "rewards/margins")) >= STEPS
    table = json.loads(Path(client.download_artifacts(made.info.run_id, f"{NAME}.json")).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    check_samples(run, [rows[start : start + SAMPLES] for start in range(0, len(rows), SAMPLES)])


PLAYED = pa.table(
    {
        "prompt": ["a | b\n<b>*c*", "d"], "human": ["e", "f"], "own": ["g", "h"], "human_ids": [[1, 2], [1]],
        "own_ids": [[1], [1]], "human_logp": [-1.0, -2.0], "own_logp": [-1.0, -3.0],
    }
)  # fmt: skip


def test_a_tracker_that_fails_is_warned_of_and_the_next_one_gets_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """wandb has no run; mlflow has one, and gets the table after it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(report_to=["wandb", "none", "mlflow"]),
        accelerator=SimpleNamespace(is_main_process=True),
        state=SimpleNamespace(global_step=3),
    )
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    with mlflow.start_run() as made:
        send_samples(trainer, PLAYED, "iteration 0")
    [warning] = [record.getMessage() for record in caplog.records if record.name == "axolotl_spin.monitor.trackers"]
    assert warning == "the held-out samples of iteration 0 did not reach wandb: RuntimeError: there is no run"
    table = json.loads(Path(mlflow.MlflowClient().download_artifacts(made.info.run_id, f"{NAME}.json")).read_text())
    assert [row[table["columns"].index("margin")] for row in table["data"]] == [0.5, 1.0]


def watched(tracker: str, callbacks: Sequence[Any] = ()) -> Any:
    """A trainer on rank 0 at step 3 that reports to a tracker."""
    return SimpleNamespace(
        args=SimpleNamespace(report_to=[tracker]),
        accelerator=SimpleNamespace(is_main_process=True),
        state=SimpleNamespace(global_step=3),
        callback_handler=SimpleNamespace(callbacks=callbacks),
    )


def test_comet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The real package, offline: what it packs for an upload holds the table."""
    comet_ml = pytest.importorskip("comet_ml")
    send_samples(watched("comet_ml"), PLAYED, "start")
    assert "did not reach comet_ml: RuntimeError: there is no running experiment" in caplog.text
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    experiment = comet_ml.start(online=False, project_name="spin", api_key="none")
    send_samples(watched("comet_ml"), PLAYED, "iteration 0")
    experiment.end()
    [packed] = tmp_path.glob("*.zip")
    with zipfile.ZipFile(packed) as files:
        texts = [files.read(name).decode(errors="replace") for name in files.namelist()]
        names = [json.loads(line) for line in files.read("messages.json").splitlines()]
    [table] = {text for text in texts if text.startswith("model,prompt")}
    rows = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [row["prompt"] for row in rows] == PLAYED["prompt"].to_pylist() and rows[1]["margin"] == "1.0"
    assert f"{NAME}/step-000003.csv" in json.dumps(names)


class CustomSwanLabCallback:
    """Named as the host's, by which SwanLab is known: it does not stand in `report_to`."""


def test_swanlab(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The real package, offline: the text lies in the run's folder."""
    swanlab = pytest.importorskip("swanlab")
    trainer = watched("none", [CustomSwanLabCallback()])
    send_samples(trainer, PLAYED, "start")
    assert "did not reach swanlab: RuntimeError" in caplog.text
    swanlab.init(project="spin", mode="offline", logdir=str(tmp_path))
    send_samples(trainer, PLAYED, "iteration 0")
    swanlab.finish()
    [text] = tmp_path.rglob("media/text/*.txt")
    assert text.read_text() == markdown(sample_rows(PLAYED, "iteration 0")) and text.name.startswith("003-")


def test_an_own_answer_without_a_token_has_a_row() -> None:
    """An end token alone, taken off where the human answer has none either."""
    table = PLAYED.set_column(
        PLAYED.column_names.index("own_ids"), "own_ids", pa.array([[], [1]], pa.list_(pa.int64()))
    )
    assert [row["margin"] for row in sample_rows(table, "start")] == [0.5, 1.0]


def test_other_ranks_send_nothing() -> None:
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(report_to=["wandb"]), accelerator=SimpleNamespace(is_main_process=False)
    )
    send_samples(trainer, None, "start")  # type: ignore[arg-type]


def test_no_text_of_a_model_is_taken_for_markup() -> None:
    lines = markdown(sample_rows(PLAYED, "start")).splitlines()
    assert lines[0] == "| model | prompt | human | own | human_tokens | own_tokens | margin |"
    assert lines[2] == "| start | a &#124; b<br>&lt;b&gt;&#42;c&#42; | e | g | 2 | 1 | 0.500 |"
    assert len(lines) == 4


# -- the terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.host
def test_lines_of_the_log_do_not_run_into_bars(run: host.Run) -> None:
    """A record starts where a line starts, or where the bar was wiped off its line."""
    records = list(re.finditer(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] \[INFO\]", run.output))
    assert len(records) > 20
    before = [re.sub(r"\x1b\[[0-9;]*[mA-K]", "", run.output[max(0, r.start() - 40) : r.start()]) for r in records]
    assert [text for text in before if text[-1:] not in ("\n", "\r", "")] == []


@pytest.mark.host
def test_every_training_step_has_one_readable_line(run: host.Run) -> None:
    lines = re.findall(r"step +(\d+)/21  iter (\d)  loss ([\d.]+)  acc \S+  margin \S+  human", run.output)
    assert [int(step) for step, _, _ in lines] == list(range(1, STEPS + 1))
    assert {iteration for _, iteration, _ in lines} == {"0", "1"}
    assert [float(loss) for _, _, loss in lines] == pytest.approx(run.losses(), abs=1e-4)
    assert "'rewards/" not in run.output
    assert "held-out NLL" in run.output


@pytest.mark.host
def test_the_table_comes_after_each_iteration_and_at_the_end(run: host.Run) -> None:
    tables = run.output.split("Self-play iterations")[1:]
    assert len(tables) == 2
    shown = [
        re.findall(r"^ *(?:\* )?(start|\d+)  .*$", table.replace("\r", ""), flags=re.MULTILINE) for table in tables
    ]
    assert [rows[: 2 + i] for i, rows in enumerate(shown)] == [["start", "0"], ["start", "0", "1"]]
    assert f"{run.metrics(1)['spin/heldout_auc']:.3f}" in tables[1]


LOGGED = {
    "loss": 0.61284, "grad_norm": 4.0312, "learning_rate": 5e-7, "rewards/chosen": 0.0361, "rewards/rejected": -0.0042,
    "rewards/margins": 0.0403, "rewards/accuracies": 0.75, "logps/chosen": -20.0, "logps/rejected": -30.0,
    "spin/iteration": 1, "memory/max_active (GiB)": 0.0, "epoch": 1.2,
}  # fmt: skip


def test_a_training_line() -> None:
    line = "step   7/120  iter 1  loss 0.6128  acc 0.75  margin +0.040  human +0.036  own -0.004  lr 5.0e-07  grad 4.03"
    assert log_line(LOGGED, 7, 120) == line
    with_memory = log_line({**LOGGED, "memory/max_active (GiB)": 71.25}, 7, 120)
    assert with_memory == f"{line}  GiB 71.2" and len(with_memory) <= 120


def test_lines_of_other_rows() -> None:
    evaluated = {"eval_loss": 3.27891, "eval_runtime": 1.23, "eval_samples_per_second": 9.0, "epoch": 1.0}
    assert log_line(evaluated, 6, 12) == "step  6/12  held-out NLL 3.2789  seconds 1.2"
    assert log_line({"spin/generation_seconds": 1.0}, 0, 12) == ""  # the phase's own line says it
    assert log_line({"train_runtime": 3.0}, 12, 12) is None  # the host's


BUSY = {
    "spin/iteration": 11, "loss_first": 0.69314, "loss_last": 0.2, "rewards/accuracies": 1.0, "rewards/margins": -11.123,
    "spin/chosen_length": 1211.6, "spin/rejected_length": 1211.6, "spin/truncated": 1.0, "eval_loss": 3.2432,
    "eval_loss_stderr": 0.01534, "spin/heldout_wins": 0.625, "spin/start_eval_loss": 3.3,
    "spin/heldout_margin": -1.232, "spin/heldout_auc": 0.2323, "spin/heldout_start_margin": -2.5,
    "spin/heldout_start_auc": 0.0625, "spin/generation_seconds": 5221.4, "spin/scoring_seconds": 1221.4,
    "spin/training_seconds": 31221.4,
}  # fmt: skip


def test_the_table_stays_within_120_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_wide(iteration_table([BUSY, BUSY], {"best": 11}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 120
    start = next(line for line in lines if line.lstrip().startswith("start"))
    assert start.split()[-7:] == ["3.3000", "-2.500", "0.062", "-", "-", "-", "-"]
    assert lines[-1].split() == [
        "*", "11", "0.6931", "0.2000", "1.00", "-11.123", "1211.6", "1211.6", "100%", "3.2432", "-1.232", "0.232", "62%",
        "5221.4", "1221.4", "31221.4",
    ]  # fmt: skip


def test_a_table_between_iterations_has_the_first_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    directory = RunDirectory(tmp_path)
    plan = make_plan(4, global_batch=2, num_epochs=1, history=0, betas=[0.1] * 40, learning_rates=[1e-6] * 40)
    for iteration in range(30):
        write_json(directory.metrics(iteration), {"spin/iteration": iteration, "spin/loss_first": 0.5})
    for last, expected in ((3, [0, 1, 2, 3]), (29, [0, *range(21, 30)])):
        show_table(directory, plan, plan.iterations[last])
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [int(row[0]) for row in rows if row and row[0].isdigit()] == expected


def test_the_table_of_a_run_without_held_out_play(capsys: pytest.CaptureFixture[str]) -> None:
    print_wide(iteration_table([{name: value for name, value in BUSY.items() if not re.search("heldout|start", name)}]))
    out = capsys.readouterr().out
    assert "AUC" not in out and "start" not in out and "NLL" in out
