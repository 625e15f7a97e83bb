"""Benchmarks of lm-eval that need no network: tasks in YAML over a file of rows, which the tiny model can answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
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
    """Returns questions, of which the given model answers some rightly: half of the answers are its own."""
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
        right = own if index % 2 else other
        made.append({"prompt": prompt, "answer": right, "words": words, "right": generator.randrange(4)})
    return made


def write_tasks(folder: Path, model: Path, *tasks: dict[str, Any]) -> Path:
    """Writes tasks with their data.

    Args:
        folder: Where.
        model: Whose answers half of the right ones are.
        tasks: Of this module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(model)))
    for task in tasks:
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **where}))
    return folder
