"""The loss that the host logs is the one that the settings ask for, worked out from the pairs on disk."""

from __future__ import annotations

from pathlib import Path

import host
import pytest
from warm import Warm

from axolotl_spin.training.batches import MicroBatches

pytestmark = pytest.mark.host


def test_hinge_and_sft_weight_at_the_first_step(tmp_path: Path, warm: Warm) -> None:
    """Hinge starts at 1; `sft_weight` adds 0.5 times the human answers' NLL per token, each pair weighted the same."""
    spin = {
        "iterations": 2,
        "history": 0,
        "loss": "hinge",
        "sft_weight": 0.5,
        "generation": {"max_new_tokens": 6, "batch_size": 16},
    }
    run = host.train({**host.config(tmp_path), "spin": spin}, by=warm)
    losses = run.losses()
    assert len(losses) == 2 * 10
    for iteration in range(2):
        rows = run.pairs(iteration).to_pylist()
        batches = MicroBatches(len(rows), micro_batch=2, step=4, seed=7, first_epoch=iteration)
        first = [index for batch in list(batches)[:2] for index in batch.tolist()]
        per_token = [-rows[i]["opponent_chosen_logp"] / len(rows[i]["chosen_ids"]) for i in first]
        assert losses[10 * iteration] == pytest.approx(1 + 0.5 * sum(per_token) / 4, abs=1e-5)
        assert run.metrics(iteration)["loss_first"] == pytest.approx(1.0, abs=1e-6)
    assert "is off by" not in run.output
