"""`axolotl spin eval`: the models that a run left on disk, adapters with their base, each asked once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import architectures
import evaluated
import host
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from warm import Warm

from axolotl_spin.cli import spin
from axolotl_spin.commands.eval import saved_models
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.report.reading import read_run

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("eval")
    model = tiny.save(made / "model")
    tiny.conversations(made / "data.jsonl", 12)
    evaluated.write_tasks(made / "tasks", model, evaluated.ANSWERS, evaluated.CHOICES, evaluated.TEXTS)
    return made


@pytest.fixture(scope="module")
def run(folder: Path, warm: Warm) -> host.Run:
    """LoRA, two iterations, no benchmarks in training."""
    block = {"iterations": 2, "generation": {"max_new_tokens": 10}}
    return host.train({**host.config(folder, spin=block), **host.LORA, "learning_rate": 2e-2}, by=warm)


def command(run: host.Run, *options: Any) -> Result:
    return CliRunner().invoke(spin, ["eval", str(run.out), *map(str, options)])


def test_adapters_and_the_start_model_as_lm_eval_sees_them(
    folder: Path, run: host.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--tasks", folder / "tasks", "--limit", 6)
    done = command(run, *asked)
    assert done.exit_code == 0, done.output
    directory = RunDirectory(run.out)
    paths = [directory.start_evals, directory.evals(0), directory.evals(1)]
    found = [json.loads(path.read_text()) for path in paths]
    for value, saved in zip(found, (folder / "model", directory.model(0), directory.model(1)), strict=True):
        loader = AutoPeftModelForCausalLM if (saved / "adapter_config.json").exists() else AutoModelForCausalLM
        model = loader.from_pretrained(saved, dtype=torch.float32)
        evaluated.same(value, evaluated.by_lm_eval(folder / "tasks", model, run.out, limit=6))
        assert value["limit"] == 6 and value["weights"] is None and len(value["run"]) == 64
    assert len({json.dumps(value["tasks"]) for value in found}) == 3
    # into the table, with the start model
    first, second = run.metrics(0), run.metrics(1)
    for figures, prefix, value in (
        (first, "eval_start", found[0]),
        (first, "eval", found[1]),
        (second, "eval", found[2]),
    ):
        acc = value["tasks"]["tiny_choices"]["metrics"]["acc"]
        assert figures[f"spin/{prefix}/tiny_choices/acc"] == acc["value"]
        assert f"{acc['value']:.3f}±{acc['stderr']:.3f}" in done.stdout
    assert "loss_last" in first and "Self-play iterations" in done.stdout and "start " in done.stdout

    # what is there is not asked again; what is missing is
    changed = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again = command(run, *asked)
    assert again.exit_code == 0 and again.stdout.count(": as in ") == 2
    assert json.loads(paths[1].read_text()) == found[1]
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, changed, strict=True)] == [True, False, True]
    monkeypatch.setattr("axolotl_spin.evals.saved.load", lambda *_: pytest.fail("a model was loaded"))
    assert command(run, "--tasks", folder / "tasks" / "tiny_texts.yaml", "--limit", 6).stdout.count(": as in ") == 3


def test_what_cannot_be_asked_is_left_out_and_said(folder: Path, run: host.Run, tmp_path: Path) -> None:
    shutil.copytree(run.out / "spin", tmp_path / "spin")
    directory = RunDirectory(tmp_path)
    shutil.rmtree(directory.model(0))
    figures = json.loads(directory.metrics(1).read_text())
    del figures["spin/training_seconds"]  # as while it is trained
    directory.metrics(1).write_text(json.dumps(figures))
    plan = json.loads(directory.plan.read_text())
    directory.plan.write_text(json.dumps({**plan, "completed_steps": None}))
    options = ["eval", str(tmp_path), "--tasks", str(folder / "tasks" / "tiny_choices.yaml")]
    done = CliRunner().invoke(spin, options)
    assert done.exit_code == 0, done.output
    assert "start: tiny_choices acc" in done.stdout and "iteration 0: " not in done.stdout
    assert f"iteration 0 left no {directory.model(0)} (`spin.save_iterations: false`): left out" in done.stdout
    assert "iteration 1 is not over: left out" in done.stdout
    directory.plan.write_text(json.dumps(plan))  # as where `spin.patience` ended it
    done = CliRunner().invoke(spin, options)
    assert "iteration 1 was not run, and the run is complete: left out" in done.stdout, done.output


@pytest.mark.once
def test_what_the_run_measured_itself_is_not_replaced(
    folder: Path, run: host.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.out / "spin", tmp_path / "spin")
    directory, mark = RunDirectory(tmp_path), saved_models(read_run(tmp_path))[1].mark
    measured = {"run": mark, "weights": "1f", "limit": 3, "chat_template": True, "tasks": {}}
    directory.evals(0).write_text(json.dumps(measured))
    monkeypatch.setattr("axolotl_spin.evals.saved.load", lambda *_: pytest.fail("a model was loaded"))
    options = ["eval", str(tmp_path), "--tasks", str(folder / "tasks" / "tiny_choices.yaml"), "--limit", "2"]
    done = CliRunner().invoke(spin, options)
    assert done.exit_code == 1, done.output
    assert "holds what the run measured with `--limit 3` and with `--apply-chat-template`" in done.output
    assert json.loads(directory.evals(0).read_text()) == measured


@pytest.mark.once
def test_a_model_that_does_not_load_is_named(folder: Path, run: host.Run, tmp_path: Path) -> None:
    """PEFT raises a RuntimeError for an adapter of other sizes."""
    shutil.copytree(run.out / "spin", tmp_path / "spin")
    directory = RunDirectory(tmp_path)
    path = directory.model(0) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    options = ["eval", str(tmp_path), "--tasks", str(folder / "tasks" / "tiny_choices.yaml"), "--limit", "2"]
    done = CliRunner().invoke(spin, options)
    assert done.exit_code == 1 and f"Error: iteration 0 ({directory.model(0)}): " in done.output, done.output
    assert "size mismatch" in done.output


@pytest.mark.parametrize("kind", ["qlora", "qwen2_5_vl"])
def test_quantised_and_multimodal_models_as_training_asked_them(
    folder: Path, tmp_path: Path, warm: Warm, kind: str
) -> None:
    """In training the policy in memory is asked, after it the files: over a base in 4 bits and with other
    frequencies, or of a class of its own."""
    made = tmp_path
    if kind == "qlora":
        tiny.save(made / "model")
        changes = {**host.LORA, "adapter": "qlora", "load_in_4bit": True, "learning_rate": 2e-2}
        # the host's second name for `overrides_of_model_config`
        changes["model_config"] = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}
    else:
        architectures.save(kind, made / "model")
        changes = {"tokenizer_type": "PreTrainedTokenizerFast", "learning_rate": 5e-3}
    tiny.conversations(made / "data.jsonl", 12)
    block = {"iterations": 1, "generation": {"max_new_tokens": 10}, "eval_tasks": [str(folder / "tasks")]}
    run = host.train({**host.config(made, spin=block), **changes}, by=warm)
    directory = RunDirectory(run.out)
    paths = [directory.start_evals, directory.evals(0)]
    trained = [json.loads(path.read_text())["tasks"] for path in paths]
    assert trained[0] != trained[1]
    for path in paths:
        path.unlink()
    done = command(run, "--tasks", folder / "tasks")
    assert done.exit_code == 0, done.output
    for path, known in zip(paths, trained, strict=True):
        found = json.loads(path.read_text())["tasks"]
        for task, entry in known.items():
            for metric, figure in entry["metrics"].items():
                value = found[task]["metrics"][metric]["value"]
                assert value == pytest.approx(figure["value"], rel=1e-4, abs=1e-4), (task, metric)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "./nowhere.yaml"], "`--tasks`: ./nowhere.yaml does not exist"),
        (
            ["--tasks", "gsm8k", "--backend", "vllm"],
            "cannot import lm-eval's vLLM model (ModuleNotFoundError: No module named 'vllm')",
        ),
        (["--tasks", "./task.yml", "--backend", "vllm"], "rename it to task.yaml"),
        (["--tasks", "gsm8k", "--backend", "vllm", "--python", "/no/python"], "/no/python did not run"),
    ],
)
def test_what_is_refused(
    run: host.Run, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task.yml").touch()
    done = command(run, *options)
    assert done.exit_code == 1 and message in done.output, done.output


@pytest.mark.once
@pytest.mark.parametrize("trusted", [False, True])
def test_the_folder_of_a_run_cannot_have_its_own_code_trusted(
    trusted: bool, folder: Path, run: host.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config said `trust_remote_code: true`, which whoever sends the folder can write; the user alone decides."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(folder / "model", model)
    mark = tmp_path / "executed"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**shape, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    shutil.copytree(run.out / "spin", out / "spin")
    directory = RunDirectory(out)
    for path, key in ((directory.plan, "fixed"), (directory.about, "config")):
        value = json.loads(path.read_text())
        value[key] |= {"base_model": str(model), "trust_remote_code": True}
        path.write_text(json.dumps(value))
    options = ["--tasks", str(folder / "tasks" / "tiny_choices.yaml"), *(["--trust-remote-code"] if trusted else [])]
    done = CliRunner().invoke(spin, ["eval", str(out), *options])
    assert done.exit_code == 1 and mark.exists() == trusted, done.output
    assert ("if you trust that code as well, add --trust-remote-code" in done.output) != trusted


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(spin, ["eval", str(tmp_path), "--tasks", "gsm8k"])
    assert done.exit_code == 1 and "holds no SPIN run" in done.output
