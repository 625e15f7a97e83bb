"""Benchmarks in a process of their own, by a Python that need not have this package."""

from __future__ import annotations

import json
from pathlib import Path

import evaluated
import host
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from warm import Warm

from axolotl_spin.evals.results import collect
from axolotl_spin.evals.saved import job_of
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
