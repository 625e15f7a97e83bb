"""Saved models as they are loaded, and benchmarks in a process of their own by a Python that need not have this package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluated
import host
import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from warm import Warm

from axolotl_spin.evals.results import collect
from axolotl_spin.evals.saved import SavedModel, ask_by_vllm, job_of, load
from axolotl_spin.evals.tasks import asked_benchmarks

pytestmark = [pytest.mark.once, pytest.mark.host]


def test_the_figures_are_lm_evals_own(tmp_path: Path, warm: Warm) -> None:
    """lm-eval's model over transformers stands in for that over vLLM: tasks, job and report are the same."""
    path = tiny.save(tmp_path / "model")
    tasks = evaluated.write_tasks(tmp_path / "tasks", path, evaluated.ANSWERS, evaluated.CHOICES, evaluated.TEXTS)
    asked = asked_benchmarks([str(tasks)], limit=4, chat_template=False, unsafe_code=False, key="--tasks").load()
    job, report = tmp_path / "job.json", tmp_path / "report.json"
    job.write_text(json.dumps(job_of("hf", {"pretrained": str(path), "device": "cpu"}, asked, report)))
    code, output = warm.run("axolotl_spin.evals.worker", str(job), env=host.environment(), cwd=tmp_path)
    assert code == 0, output[-4000:]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    value = collect(json.loads(report.read_text()), run=None, limit=4, chat_template=False)
    evaluated.same(value, evaluated.by_lm_eval(tasks, model, path, limit=4))
    assert value["tasks"]["tiny_choices"]["samples"] == 4


def start(folder: Path, adapter: Path | None = None) -> SavedModel:
    return SavedModel("start", None, str(folder), adapter, str(folder), folder / "evals.json", None)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("nf4", True)),  # as the host has it
        ({"bnb_4bit_quant_type": "fp4"}, ("fp4", True)),
        ({"bnb_4bit_use_double_quant": False}, ("nf4", False)),
    ],
)
def test_a_base_is_quantised_as_the_config_says(given: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    model, _ = load(start(tmp_path), {"load_in_4bit": True, "bnb_config_kwargs": given}, "cpu")
    states = [part.weight.quant_state for part in model.modules() if isinstance(part, Linear4bit)]
    assert states and {(state.quant_type, state.nested) for state in states} == {expected}


ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}


def test_a_base_is_read_as_the_config_says_and_what_a_run_saved_as_it_is(tmp_path: Path) -> None:
    base, other = tiny.save(tmp_path / "model"), tmp_path / "other"
    AutoConfig.from_pretrained(base, rope_parameters={**ROPE, "factor": 2.0}).save_pretrained(other)
    adapter, overrides = (
        tiny.adapter(base, tmp_path / "adapter"),
        {"overrides_of_model_config": {"rope_parameters": ROPE}},
    )
    trained = start(base, adapter)
    whole = replace(start(base), iteration=0)
    for saved, config, factor in (
        (start(base), {}, None),
        (start(base), overrides, 8.0),
        (replace(trained, iteration=0), overrides, 8.0),
        (trained, {"base_model_config": str(other)}, 2.0),
        (trained, {"base_model_config": str(other), **overrides}, 8.0),
        (whole, overrides, None),
    ):
        model, _ = load(saved, config, "cpu")
        assert model.config.rope_parameters.get("factor") == factor, (saved, config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what there is on a CPU")
def test_a_quantised_base_computes_as_in_training_and_where_it_is_told_to(tmp_path: Path) -> None:
    tiny.save(tmp_path)
    for written, expected in (
        ({}, torch.float16),  # `bf16: auto` where there is no GPU
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False, "bfloat16": True}, torch.bfloat16),
        ({"bf16": "auto", "fp16": True}, torch.float16),
        ({"bf16": False, "float16": True}, torch.float16),
        ({"bf16": False}, torch.float32),
    ):
        model, _ = load(start(tmp_path), {"load_in_4bit": True, **written}, None)
        assert {part.compute_dtype for part in model.modules() if isinstance(part, Linear4bit)} == {expected}, written
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        load(start(tmp_path), {"load_in_4bit": True}, "cuda:1")


@pytest.mark.parametrize(("ranks", "expected"), [({"r": 20}, 32), ({"r": 8, "rank_pattern": {"q_proj": 64}}, 64)])
def test_what_vllm_is_given(ranks: dict[str, Any], expected: int, tmp_path: Path) -> None:
    """Room for the largest rank, the revision of what is no folder, and the base's config. A Python that keeps its job and
    does nothing stands for one with vLLM and lm-eval."""
    LoraConfig(target_modules=["q_proj"], **ranks).save_pretrained(tmp_path / "adapter")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\n[ "$1" = -c ] || cp "$2" {tmp_path}/job.json\n')
    program.chmod(0o755)
    tasks = evaluated.write_tasks(tmp_path / "tasks", tiny.save(tmp_path / "model"), evaluated.CHOICES)
    asked = asked_benchmarks([str(tasks)], limit=4, chat_template=False, unsafe_code=False, key="--tasks").load()
    saved = replace(start(tmp_path / "model", tmp_path / "adapter"), model="someone/model")
    config = {
        "revision_of_model": "v2",
        "base_model_config": "a/b",
        "overrides_of_model_config": {"rope_parameters": ROPE},
    }
    with pytest.raises(ValueError, match=r"vllm in .* ended with status 0"):
        ask_by_vllm(config, str(program), {})(saved, asked)
    given = json.loads((tmp_path / "job.json").read_text())["model"]
    assert given["max_lora_rank"] == expected and given["lora_local_path"] == str(tmp_path / "adapter")
    assert given["revision"] == "v2" and "tokenizer_revision" not in given
    assert given["hf_config_path"] == "a/b" and given["hf_overrides"] == {"rope_parameters": ROPE}
