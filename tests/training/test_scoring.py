"""The opponent's pass: every pair gets its own log-probs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from accelerate import Accelerator

from axolotl_spin.data.pairs import SCHEMA, PairDataset
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.batches import MicroBatches
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.scoring import Scorer


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
    scorer = Scorer(Ranks(Accelerator(cpu=True)), PairCollator(0, layout), gather="auto")
    batches = MicroBatches(len(pairs), micro_batch=2, step=8, seed=3, first_epoch=0)
    return scorer.logps(model, pairs, batches).numpy()


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_every_pair_gets_its_own_log_probs(layout: str) -> None:
    model, pairs = tiny.model(20).eval(), dataset(23)
    found = scored(model, pairs, layout)
    for index in range(len(pairs)):
        row = pairs[index]
        expected = [by_the_chain_rule(model, row["prompt_ids"], row[kind]) for kind in ("chosen_ids", "rejected_ids")]
        assert found[index] == pytest.approx(expected, abs=1e-4)
