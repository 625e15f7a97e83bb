"""`eval_loss` through the host's command: the sum of the NLL over the sum of tokens, on any batch size and rank."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import host
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from rows import jsonl
from transformers import AutoModelForCausalLM
from warm import Ranks, Warm

from axolotl_spin.data.spread import nll_per_token


def uneven(folder: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Seven conversations, four with an answer of one word and three with long ones: no batch size divides them."""
    draw = random.Random(0)
    talks = [(f"w{i}", "w9" if i < 4 else " ".join(draw.choices(tiny.WORDS, k=20))) for i in range(7)]
    said = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in talks]
    return {**jsonl(folder / "heldout.jsonl", [{"messages": turns} for turns in said]), "type": "chat_template"}, talks


def rows_of(model: Path, talks: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Each row's NLL and tokens, one sequence at a time."""
    tokenizer, loaded, rows = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(model), []
    for question, answer in talks:
        prompt, ids = (tokenizer(text)["input_ids"] for text in (f"<|user|> {question} <|end|> <|assistant|>", answer))
        ids.append(tokenizer.eos_token_id)
        logps = loaded(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        nll = -sum(logps[len(prompt) + at - 1, token].item() for at, token in enumerate(ids))
        rows.append((nll, len(ids)))
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows])


def jackknifed(nll: np.ndarray, tokens: np.ndarray) -> float:
    """The standard error of the ratio, by leaving out one row after the other."""
    count = len(nll)
    without = (nll.sum() - nll) / (tokens.sum() - tokens)
    return math.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())


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
        nll, tokens = rows_of(model, talks)
        expected = nll.sum() / tokens.sum()
        assert row["eval_loss"] == pytest.approx(expected, abs=1e-4)
        assert row["eval_ppl"] == pytest.approx(math.exp(expected), rel=1e-3)
        assert row["eval_loss_stderr"] == pytest.approx(jackknifed(nll, tokens), rel=0.3)  # of seven rows
        spread = nll_per_token(nll, tokens, np.arange(len(nll)))
        assert row["eval_loss_stderr"] == pytest.approx(spread.stderr, rel=1e-3)
        name = "start" if model != run.out else "iteration-0"
        kept = pq.read_table(run.out / "spin" / name / "eval_rows.parquet")
        assert sorted(kept["nll"].to_pylist()) == pytest.approx(sorted(nll), abs=1e-4)
        assert len(set(kept["key"].to_pylist())) == len(nll)
    first, last = (pq.read_table(run.out / "spin" / name / "eval_rows.parquet") for name in ("start", "iteration-0"))
    assert sorted(first["key"].to_pylist()) == sorted(last["key"].to_pylist())  # known again, whatever the batches
