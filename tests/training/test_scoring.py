"""The opponent's pass: batches by tokens, every pair once, and going on where memory runs out."""

from __future__ import annotations

import inspect

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from accelerate import Accelerator

from axolotl_spin.data.pairs import SCHEMA, PairDataset
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.scoring import Scorer, cut_by_tokens


def test_batches_are_cut_by_the_tokens_of_their_longest() -> None:
    tokens = np.array([9, 2, 5, 3, 4, 30])
    order = np.argsort(-tokens, kind="stable")
    batches = [batch.tolist() for batch in cut_by_tokens(order, tokens, 12)]
    assert batches == [[5], [0], [2, 4], [3, 1]]  # 30 > 12; 9; 5 + 4 in two rows of 5; up to four of 3


def dataset(rows: int) -> PairDataset:
    draw = np.random.default_rng(0)

    def ids() -> list[list[int]]:
        return [draw.integers(7, 20, draw.integers(1, 9)).tolist() for _ in range(rows)]

    columns = {field.name: [""] * rows if field.type == pa.string() else [0] * rows for field in SCHEMA}
    columns |= {name: ids() for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    return PairDataset(pa.table(columns, schema=SCHEMA))


@torch.no_grad()
def by_the_chain_rule(model, prompt, answer) -> float:
    logps = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(answer))


def scored(model, pairs: PairDataset, layout: str) -> np.ndarray:
    scorer = Scorer(Accelerator(cpu=True), PairCollator(0, layout), micro_batch=2, gather="auto", pulse=lambda: None)
    return scorer.logps(model, pairs).numpy()


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_every_pair_gets_its_own_log_probs(layout: str) -> None:
    model, pairs = tiny.model(20).eval(), dataset(23)
    found = scored(model, pairs, layout)
    for index in range(len(pairs)):
        row = pairs[index]
        expected = [by_the_chain_rule(model, row["prompt_ids"], row[kind]) for kind in ("chosen_ids", "rejected_ids")]
        assert found[index] == pytest.approx(expected, abs=1e-4)


def test_a_batch_that_does_not_fit_is_cut_and_smaller_ones_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = tiny.model(20).eval(), dataset(23)
    expected = scored(model, pairs, "padded")
    whole = type(model).forward
    tried: list[int] = []

    def of_60_at_most(self, *args, **inputs):
        tried.append(inputs["input_ids"].numel())
        if tried[-1] > 60:
            raise torch.OutOfMemoryError("planted")
        return whole(self, *args, **inputs)

    of_60_at_most.__signature__ = inspect.signature(whole)
    monkeypatch.setattr(type(model), "forward", of_60_at_most)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    assert scored(model, pairs, "padded") == pytest.approx(expected, abs=1e-4)
    failed = [size for size in tried if size > 60]
    assert 1 <= len(failed) <= 3  # what did not fit once is not tried again

    def never(self, *args, **inputs):
        raise torch.OutOfMemoryError("planted")

    never.__signature__ = inspect.signature(whole)
    monkeypatch.setattr(type(model), "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        scored(model, pairs, "padded")
