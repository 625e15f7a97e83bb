"""Benchmarks of the policy in memory: what lm-eval says of the saved model, and training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluated
import host
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from warm import Ranks, Warm

from axolotl_spin.evals.harness import PolicyLM, _Asked, cut_into_batches
from axolotl_spin.ranks import main as ranks_main

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evals")
    model = tiny.save(made / "model")
    tiny.conversations(made / "data.jsonl", 24)
    evaluated.write_tasks(made / "tasks", model, evaluated.ANSWERS, evaluated.CHOICES, evaluated.TEXTS)
    return made


def settings(folder: Path, name: str, asked: bool = True, spin: dict[str, Any] | None = None, **changes: Any) -> dict:
    generation = {"max_new_tokens": 10, "batch_size": 4}
    block = {"iterations": 2, "generation": generation, **(spin or {})}
    if asked:
        block = {"eval_tasks": [str(folder / "tasks")], **block}
    return {**host.config(folder), "output_dir": str(folder / name), "spin": block, **changes}


@pytest.fixture(scope="module")
def asked(folder: Path, warm: Warm) -> host.Run:
    return host.train(settings(folder, "asked", spin={"select": "tiny_answers/exact_match,word"}), by=warm)


def evals(run: host.Run, model: str) -> dict[str, Any]:
    return json.loads((run.out / "spin" / model / "evals.json").read_text())


def test_the_figures_are_lm_evals_own_of_the_saved_models(folder: Path, asked: host.Run) -> None:
    values = []
    for name, path in (
        ("start", folder / "model"),
        *((f"iteration-{i}", asked.out / f"spin/iteration-{i}/model") for i in (0, 1)),
    ):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found = evals(asked, name)
        evaluated.same(found, evaluated.by_lm_eval(folder / "tasks", model, path))
        assert found["limit"] is None and len(found["run"]) == 64
        answers, choices = (found["tasks"][task] for task in ("tiny_answers", "tiny_choices"))
        assert (answers["version"], answers["samples"]) == (1.5, evaluated.SAMPLES)
        assert (
            not choices["metrics"]["brier_score"]["higher_is_better"] and choices["metrics"]["acc"]["higher_is_better"]
        )
        values.append(answers["metrics"]["exact_match"]["value"] + answers["metrics"]["exact_match,word"]["value"])
    assert values[0] > 0.3  # the start model's own answers are among the right ones
    assert len({json.dumps(evals(asked, name)["tasks"]) for name in ("start", "iteration-0", "iteration-1")}) == 3


def test_training_does_not_notice(folder: Path, asked: host.Run, warm: Warm) -> None:
    """With benchmarks and without: the same answers, losses, weights and random state, bit for bit."""
    without = host.train(settings(folder, "without", asked=False), by=warm)
    for iteration in range(2):
        assert asked.pairs(iteration).equals(without.pairs(iteration))
    assert asked.losses() == without.losses()
    weights, others = (load_file(run.out / "model.safetensors") for run in (asked, without))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    last = sorted(path.name for path in without.out.glob("checkpoint-*"))[-1]
    states = [torch.load(run.out / last / "rng_state.pth", weights_only=False) for run in (asked, without)]
    assert torch.equal(states[0]["cpu"], states[1]["cpu"]) and states[0]["python"] == states[1]["python"]
    assert all(np.array_equal(a, b) for a, b in zip(states[0]["numpy"], states[1]["numpy"], strict=True))
    assert not list(without.out.rglob("evals.json"))
    assert not [name for name in without.metrics(0) if "eval" in name]


def test_figures_are_logged_and_stand_in_metrics_and_table(asked: host.Run) -> None:
    logged = [row for row in asked.logs() if "spin/eval/tiny_choices/acc" in row]
    assert [row["step"] for row in logged] == [0, 6]  # the last checkpoint is older than the last benchmarks
    first, second = asked.metrics(0), asked.metrics(1)
    for row, model, prefix in ((logged[0], "start", "spin/eval_start"), (logged[1], "iteration-0", "spin/eval")):
        metrics = evals(asked, model)["tasks"]["tiny_answers"]["metrics"]
        for name, figure in metrics.items():
            for end, value in (("", figure["value"]), ("_stderr", figure["stderr"])):
                assert (
                    first[f"{prefix}/tiny_answers/{name}{end}"] == row[f"spin/eval/tiny_answers/{name}{end}"] == value
                )
    assert not [name for name in second if name.startswith("spin/eval_start")] and "spin/eval_seconds" in second
    acc = evals(asked, "start")["tasks"]["tiny_choices"]["metrics"]["acc"]
    start = next(line for line in asked.output.splitlines() if line.strip().startswith("start "))
    assert f"{acc['value']:.3f}±{acc['stderr']:.3f}" in start
    assert "iteration 1: benchmarks in" in asked.output and "Running loglikelihood" not in asked.output
    page = (asked.out / "spin" / "report.html").read_text()
    assert "Benchmark: tiny_answers" in page and '"error_y"' in page


def test_a_tasks_metric_selects_the_best_iteration(asked: host.Run) -> None:
    """More is better; with eleven samples every difference here may be noise, but each figure is the task's."""
    best = json.loads((asked.out / "spin" / "best.json").read_text())
    assert best["select"] == "tiny_answers/exact_match,word"
    for entry, model in zip(best["iterations"], ("iteration-0", "iteration-1"), strict=True):
        figure = evals(asked, model)["tasks"]["tiny_answers"]["metrics"]["exact_match,word"]
        assert (entry["value"], entry["stderr"]) == (figure["value"], figure["stderr"])
        assert entry["verdict"] in ("first", "better", "noise", "worse")
    assert (
        best["start"]["value"] == evals(asked, "start")["tasks"]["tiny_answers"]["metrics"]["exact_match,word"]["value"]
    )


def test_an_iterations_end_that_runs_again_reads_what_it_has_measured(
    folder: Path, asked: host.Run, warm: Warm
) -> None:
    """A run stopped in its last iteration's end: results of the same weights are taken, of others measured anew."""
    again = settings(folder, "again")
    shutil.copytree(asked.out, folder / "again")
    plan = folder / "again" / "spin" / "plan.json"
    path = folder / "again" / "spin" / "iteration-1" / "evals.json"
    measured = json.loads(path.read_text())
    for change, reused in (({}, True), ({"weights": "0"}, False)):
        plan.write_text(json.dumps({**json.loads(plan.read_text()), "completed_steps": None}))
        marked = json.loads(json.dumps(measured))
        marked["tasks"]["tiny_choices"]["metrics"]["acc"]["value"] = 0.125
        path.write_text(json.dumps({**marked, **change}))
        run = host.train(again, by=warm)
        assert json.loads(path.read_text()) == (marked if reused else measured)
        assert ("benchmarks as in" in run.output) == reused and "going on from" in run.output
        right = measured["tasks"]["tiny_choices"]["metrics"]["acc"]["value"]
        assert run.metrics(1)["spin/eval/tiny_choices/acc"] == (0.125 if reused else right)


def test_an_adapter_is_asked_with_its_base_in_the_chat_template(folder: Path, warm: Warm) -> None:
    spin = {"iterations": 1, "eval_limit": 5, "eval_chat_template": True}
    run = host.train(settings(folder, "lora", spin=spin, **host.LORA, learning_rate=2e-2), by=warm)
    saved = run.out / "spin" / "iteration-0" / "model"
    model = AutoPeftModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    expected = evaluated.by_lm_eval(
        folder / "tasks", model, saved, limit=5, apply_chat_template=True, fewshot_as_multiturn=True
    )
    found = evals(run, "iteration-0")
    evaluated.same(found, expected)
    assert found["limit"] == 5 and found["tasks"]["tiny_texts"]["samples"] == 5
    assert found["tasks"] != evals(run, "start")["tasks"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "gather"),
    [
        pytest.param("ddp", "auto", marks=pytest.mark.once),
        ("zero3", True),
        ("fsdp2", False),
        pytest.param("zero3-lora", False, marks=pytest.mark.once),
    ],
)
def test_two_ranks_share_the_work(folder: Path, asked: host.Run, warm_ranks: Ranks, layout: str, gather: Any) -> None:
    """The same figures of the start model, and of what the ranks train those of lm-eval; losses stay a single rank's."""
    generation = {"max_new_tokens": 10, "batch_size": 4, "gather_weights": gather}
    changes = settings(folder, layout, spin={"iterations": 1, "generation": generation}) | host.layout(layout, folder)
    run = host.train(changes, layout, by=warm_ranks)
    for task, entry in evals(asked, "start")["tasks"].items():
        for metric, figure in entry["metrics"].items():
            other = evals(run, "start")["tasks"][task]["metrics"][metric]
            assert other["value"] == pytest.approx(figure["value"], rel=1e-5)
    saved = run.out / "spin" / "iteration-0" / "model"
    kind = AutoPeftModelForCausalLM if layout.endswith("lora") else AutoModelForCausalLM
    model = kind.from_pretrained(saved, dtype=torch.float32)
    evaluated.same(evals(run, "iteration-0"), evaluated.by_lm_eval(folder / "tasks", model, saved))
    if kind is AutoModelForCausalLM:
        assert run.losses() == pytest.approx(asked.losses()[: len(run.losses())], abs=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
@torch.no_grad()
def test_other_ranks_are_told_of_every_forward(adapter: bool) -> None:
    """Where weights stay sharded each waits for theirs. PEFT 0.20 calls no base model, and so none of its hooks."""
    policy: Any = tiny.model(len(tiny.tokenizer()))
    if adapter:
        policy = get_peft_model(policy, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    told: list[int] = []
    ranks: Any = SimpleNamespace(check=lambda: told.append(1), device=torch.device("cpu"))
    asked, ids = _Asked(policy.eval(), ranks, False, 0), torch.tensor([[8, 9]])
    asked(ids)
    assert len(told) == 1
    asked.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(told) == 1 + 3


@torch.no_grad()
def test_the_windows_of_a_long_text_are_scored_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty tokens in a context of eight are five windows: four and one by `eval_batch_size`, not eight; fewer where memory
    runs out."""
    tokenizer, rows, most = tiny.tokenizer(), list[int](), 99
    policy = tiny.model(len(tokenizer), max_position_embeddings=8).eval()

    def look(_: Any, __: Any, given: dict[str, Any]) -> None:
        rows.append(len(given["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("planted")

    policy.register_forward_pre_hook(look, with_kwargs=True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    asked = _Asked(policy, ranks_main.Ranks(Accelerator(cpu=True)), False, 0)
    lm = PolicyLM(asked, tokenizer, answers=8, sequences=4, bar=tqdm(disable=True))
    job = "loglikelihood_rolling", [(" ".join(tiny.WORDS),)]
    found = lm.answer(*job)
    assert rows == [4, 1]
    rows.clear()
    most = 1
    assert lm.answer(*job) == pytest.approx(found, rel=1e-5)
    assert rows == [4, 2, 1, 1, 1, 1, 1]


def test_batches_do_not_depend_on_who_answers() -> None:
    """Alike requests stand together, the longest first, and each is in one batch."""
    greedy, sampled = {"do_sample": False}, {"do_sample": True}
    arguments = [("aa", greedy), ("a", sampled), ("aaaa", greedy), ("aaa", sampled), ("aaa", greedy)]
    assert cut_into_batches(arguments, 2) == [[2, 4], [0, 3], [1]]
    assert cut_into_batches([("ab", " x"), ("abc", " y"), ("ab", " y")], 8) == [[1, 0, 2]]
