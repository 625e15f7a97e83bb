"""Benchmarks of lm-eval that need no network: tasks in YAML over a file of rows, which the tiny model can answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLES = 11
# generated; the second filter looks at the first word alone
ANSWERS: dict[str, Any] = {
    "task": "tiny_answers",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"max_gen_toks": 3, "until": ["w7"], "do_sample": False},
    "filter_list": [
        {"name": "none", "filter": [{"function": "take_first"}]},
        {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(w\d+)"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.5},
}
# by the log-probs of four words, after two examples
CHOICES: dict[str, Any] = {
    "task": "tiny_choices",
    "output_type": "multiple_choice",
    "fewshot_split": "test",
    "num_fewshot": 2,
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{words}}",
    "doc_to_target": "{{right}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
    ],
    "metadata": {"version": 2},
}
TEXTS: dict[str, Any] = {
    "task": "tiny_texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{prompt}}",
    "metric_list": [{"metric": "word_perplexity"}],
    "metadata": {"version": 0},
}


def rows(model: Path) -> list[dict[str, Any]]:
    """Returns questions, of which the given model answers some rightly: with its words, or with the first alone."""
    generator, tokenizer = random.Random(3), AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    made = []
    for index in range(SAMPLES):
        prompt = " ".join(generator.choices(tiny.WORDS, k=generator.randint(2, 9)))
        ids = torch.tensor([tokenizer.encode(prompt)])
        answer = loaded.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0, eos_token_id=6)
        own = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).split("w7")[0]
        words = generator.sample(tiny.WORDS, 4)
        other = generator.choice(tiny.WORDS)
        right = (own, own.split(" ")[0], other)[index % 3]
        made.append({"prompt": prompt, "answer": right, "words": words, "right": generator.randrange(4)})
    return made


def write_tasks(folder: Path, model: Path, *tasks: dict[str, Any]) -> Path:
    """Writes tasks with their data.

    Args:
        folder: Where.
        model: Whose answers some of the right ones are.
        tasks: Of this module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(model)))
    for task in tasks:
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **where}))
    return folder


TASKS = ("tiny_answers", "tiny_choices", "tiny_texts")


def by_lm_eval(tasks: Path, model: Any, tokenizer: Path, **how: Any) -> dict[str, Any]:
    """Returns what lm-eval's own `simple_evaluate` says of a model, one request at a time.

    Args:
        tasks: Folder of all three.
        model: Loaded.
        tokenizer: Where its tokenizer is.
        how: Of `simple_evaluate`.
    """
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tokenizer), batch_size=1)
    with mock.patch("lm_eval.evaluator.add_env_info"):  # it asks the machine about itself for seconds
        found = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=100, **how)
    assert found is not None
    return found["results"]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares the content of an `evals.json` with lm-eval's results, standard errors too."""
    assert sorted(found["tasks"]) == sorted(TASKS)
    for task in TASKS:
        metrics = found["tasks"][task]["metrics"]
        names = [key for key in expected[task] if "," in key and "_stderr" not in key]
        assert sorted(metrics) == sorted(key.removesuffix(",none") for key in names)
        for key in names:
            metric, _, kind = key.partition(",")
            figure, error = metrics[key.removesuffix(",none")], expected[task][f"{metric}_stderr,{kind}"]
            assert figure["value"] == pytest.approx(expected[task][key], abs=1e-5, rel=1e-5), (task, key)
            assert figure["stderr"] == (None if error == "N/A" else pytest.approx(error, abs=1e-5))
