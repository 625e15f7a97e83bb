"""What a run keeps for its report: every logged row, the config as written, versions, hardware; and a report at its end."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import finished
import host
import pytest
import yaml
from click.testing import CliRunner
from recovery import settings_in
from warm import Ranks, Warm

from axolotl_spin.cli import spin
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.monitor.about import LEFT_OUT, note_end, note_start, without_secrets
from axolotl_spin.monitor.iteration import IterationRecord
from axolotl_spin.monitor.log import append_row, read_log, restart_log
from axolotl_spin.report import page, report_at_end
from axolotl_spin.report.reading import read_run
from axolotl_spin.run.plan import make_plan

ENV = host.environment(ACCELERATE_USE_CPU="true")


def test_rows_are_there_at_once_and_a_half_written_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "spin" / "log.jsonl"
    assert read_log(path) == []
    restart_log(path, [{"loss": 0.5, "step": 1}])
    append_row(path, {"loss": float("nan"), "grad_norm": float("inf"), "step": 2})
    assert path.read_text() == '{"loss": 0.5, "step": 1}\n{"loss": null, "grad_norm": null, "step": 2}\n'
    with path.open("a") as file:
        file.write('{"loss": 0.4, "st')
    assert [row["step"] for row in read_log(path)] == [1, 2]
    restart_log(path, [])
    assert path.read_text() == "" and [file.name for file in path.parent.iterdir()] == ["log.jsonl"]


def test_secrets_are_left_out_and_nothing_else() -> None:
    config = {
        "hub_token": "abc", "wandb_api_key": "abc",
        "datasets": [{"path": "https://me:pw@host/x", "storage_options": {"key": "a", "secret": "b", "anon": False}}],
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"}, "eot_tokens": ["<e>"],
        "tokens": ["<a>"], "hf_use_auth_token": True, "spin": {"generation": {"max_new_tokens": 9}}, "mlflow_password": "x",
        "swanlab_lark_webhook_url": "https://hook/abc", "mlflow_credentials": {"pass": 1}, "db_password": 123456,
        "comment": "use hf_AbCdEfGhIjKlMnOpQr here", "lora_qkv_kernel": False, "token": "abc", "base_model": "a/key-model",
    }  # fmt: skip
    assert without_secrets(config) == {
        **config,
        "hub_token": LEFT_OUT, "wandb_api_key": LEFT_OUT, "mlflow_password": LEFT_OUT, "token": LEFT_OUT,
        "swanlab_lark_webhook_url": LEFT_OUT, "mlflow_credentials": LEFT_OUT, "db_password": LEFT_OUT,
        "datasets": [{"path": f"https://{LEFT_OUT}@host/x",
                      "storage_options": {"key": LEFT_OUT, "secret": LEFT_OUT, "anon": False}}],
        "comment": f"use {LEFT_OUT} here",
    }  # fmt: skip


def test_figures_that_are_not_finite_are_left_out() -> None:
    """JSON has no NaN, and readers in other languages refuse it."""
    plan = make_plan(4, global_batch=2, num_epochs=1, history=0, betas=[0.1], learning_rates=[1e-5])
    record = IterationRecord(plan.iterations[0], {"loss_last": math.inf, "spin/beta": 0.1, "spin/empty": None})
    record.note({"eval_loss": math.nan, "eval_loss_stderr": 0.5}, step=2)
    assert record.to_json() == {"eval_loss_stderr": 0.5, "spin/beta": 0.1}


def test_starts_are_listed_with_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    path.write_text("damaged")
    about: dict[str, Any] = {"file": "a.yml", "ranks": 2, "sharding": "FSDP2"}
    note_start(path, config={"seed": 1, "logging_steps": 1}, step=0, **about)
    note_start(path, config={"seed": 1, "logging_steps": 5, "save_steps": 9}, step=7, **about)
    note_end(path, 9, complete=False)
    stopped = json.loads(path.read_text())
    assert stopped["completed"] is None and stopped["stopped"]["step"] == 9
    note_end(path, 12, complete=True)
    found = json.loads(path.read_text())
    assert [start["changed"] for start in found["starts"]] == [{}, {"logging_steps": [1, 5], "save_steps": [None, 9]}]
    assert [start["step"] for start in found["starts"]] == [0, 7]
    assert found["config"] == {"seed": 1, "logging_steps": 5, "save_steps": 9}
    assert found["completed"].endswith("+00:00") and found["stopped"] is None


@pytest.mark.once
@pytest.mark.host
def test_a_killed_run_has_a_page_and_its_resume_one_log(shared: Path, whole: dict, warm: Warm, tmp_path: Path) -> None:
    """Killed in mid-iteration the log goes to the last step that was logged; resumed it holds no row twice."""
    settings = {**settings_in(tmp_path, shared), "hub_token": "not-for-the-page"}
    (tmp_path / "run.yml").write_text(yaml.safe_dump(settings))
    code, output = warm.run(
        "axolotl.cli.train", "run.yml", env={**ENV, "SPIN_KILL": "iteration 1/first epoch"}, cwd=tmp_path
    )
    assert code == -signal.SIGKILL, output[-4000:]
    run = read_run(tmp_path / "out")
    assert (run.state, run.step) == ("stopped", 10)
    done = CliRunner().invoke(spin, ["report", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    page = tmp_path / "out" / "spin" / "report.html"
    assert "stopped: step 10 of 24" in page.read_text()
    code, output = warm.run("axolotl.cli.train", "run.yml", "--logging-steps=3", env=ENV, cwd=tmp_path)
    assert code == 0, output[-4000:]
    text = page.read_text()
    assert "complete: 24 steps" in text and "not-for-the-page" not in text and LEFT_OUT in text
    resumed = read_run(tmp_path / "out")
    history = json.loads((tmp_path / "out/checkpoint-24/trainer_state.json").read_text())["log_history"]
    assert resumed.rows[: len(history)] == history and "train_runtime" in resumed.rows[-1]
    steps = [row["step"] for row in resumed.rows if "loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 24
    starts = resumed.about["starts"]
    assert [(start["step"], start["changed"]) for start in starts] == [(0, {}), (9, {"logging_steps": [2, 3]})]
    assert resumed.about["config"]["spin"] == settings["spin"] and resumed.about["config"]["hub_token"] == LEFT_OUT


@pytest.mark.once
@pytest.mark.host
@pytest.mark.ranks
def test_two_ranks_keep_one_record(tmp_path: Path, warm_ranks: Ranks) -> None:
    settings = {**host.config(tmp_path), **host.layout("ddp", tmp_path)}
    run = host.train(settings, "ddp", by=warm_ranks)
    rows = read_log(run.out / "spin" / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 30))
    assert sum("train_runtime" in row for row in rows) == 1
    [start] = json.loads((run.out / "spin" / "about.json").read_text())["starts"]
    assert start["ranks"] == 2
    assert "2 ranks" in (run.out / "spin" / "report.html").read_text()


def test_a_report_that_fails_leaves_the_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("a bug of ours")

    finished.make(tmp_path)
    directory = RunDirectory(tmp_path)
    monkeypatch.setattr(page, "render", broken)
    report_at_end(directory, complete=True)
    assert not directory.report.exists()
    assert "ZeroDivisionError: a bug of ours" in caplog.text and "axolotl spin report" in caplog.text
    monkeypatch.undo()
    report_at_end(directory, complete=True)
    assert directory.report.exists()


@pytest.mark.host
def test_a_run_without_what_makes_its_report_says_so_at_its_start_and_ends_well(warm: Warm, tmp_path: Path) -> None:
    """As after an upgrade that took the package away, or left one that does not fit."""
    (tmp_path / "path" / "plotly").mkdir(parents=True)
    (tmp_path / "path" / "plotly" / "__init__.py").write_text("raise ImportError('no plotly here')")
    env = {"PYTHONPATH": str(tmp_path / "path")}
    settings = host.config(tmp_path, rows=8, spin={"iterations": 1, "generation": {"max_new_tokens": 4}})
    run = host.train(settings, by=warm, env=env)
    said = (
        f"this run will leave no {run.out}/spin/report.html (ImportError: no plotly here): install what makes it with"
    )
    log = (run.out / "debug.log").read_text()
    assert run.output.count(said) == 1 and log.index(said) < log.index("Loading model")
    assert "could not be made (ImportError" in run.output and "report, for a browser" not in run.output
    assert "Self-play iterations" in run.output and not (run.out / "spin" / "report.html").exists()
    assert read_run(run.out).state == "complete"
