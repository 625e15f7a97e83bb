"""`eval_loss` through the host's command: the sum of the NLL over the sum of tokens, on any batch size and rank."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import host
import pytest
import tiny
import torch
from rows import jsonl
from transformers import AutoModelForCausalLM
from warm import Ranks, Warm


def uneven(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Seven conversations, four with an answer of one word and three with long ones: no batch size divides them."""
    draw = random.Random(0)
    talks = [(f"w{i}", "w9" if i < 4 else " ".join(draw.choices(tiny.WORDS, k=20))) for i in range(7)]
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in talks]
    return {**jsonl(folder / "heldout.jsonl", [{"messages": turns} for turns in said]), "type": "chat_template"}, talks


def nll_per_token(model: Path, talks: list[tuple[str, str]]) -> float:
    tokenizer, loaded, nll, tokens = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(model), 0.0, 0
    for question, answer in talks:
        prompt, ids = (tokenizer(text)["input_ids"] for text in (f"<|user|> {question} <|end|> <|assistant|>", answer))
        ids.append(tokenizer.eos_token_id)
        logps = loaded(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        nll -= sum(logps[len(prompt) + at - 1, token].item() for at, token in enumerate(ids))
        tokens += len(ids)
    return nll / tokens


@pytest.mark.parametrize(
    ("kind", "batch"), [("single", 1), ("single", 4), pytest.param("ddp", 2, marks=pytest.mark.ranks)]
)
def test_eval_loss_is_nll_per_token(tmp_path: Path, kind: str, batch: int, request: pytest.FixtureRequest) -> None:
    heldout, talks = uneven(tmp_path)
    settings = host.config(
        tmp_path, rows=8, test_datasets=[heldout], eval_batch_size=batch, eval_on_start=True,
        spin={"iterations": 1, "eval_prompts": 0}, val_set_size=None, num_epochs=1, **host.layout(kind, tmp_path),
    )  # fmt: skip
    by: Warm | Ranks = request.getfixturevalue("warm" if kind == "single" else "warm_ranks")
    run = host.train(settings, kind, by=by)
    logged = [json.loads(line) for line in (run.out / "spin" / "log.jsonl").read_text().splitlines()]
    found = [row for row in logged if "eval_loss" in row]
    for row, model in zip([found[0], found[-1]], [tmp_path / "model", run.out], strict=True):
        expected = nll_per_token(model, talks)
        assert row["eval_loss"] == pytest.approx(expected, abs=1e-4)
        assert row["eval_ppl"] == pytest.approx(math.exp(expected), rel=1e-3)
