"""Both answers of a pair end alike, through the host's command: on disk, in training, in held-out play, after a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import host
import pytest
import tiny
from warm import Warm

# four tokens end an answer, so that a model of random weights often ends one, and sometimes at once
ENDS = ["<|end|>", "<pad>", "<unk>", "<s>"]
STOPS = {6, 0, 1, 2}
LIMIT = 10  # tokens that the opponent may draw
ANSWERS = ("chosen", "rejected")


def settings(folder: Path) -> dict[str, Any]:
    """Half of the answers have their end among their labels."""
    tiny.conversations(folder / "open.jsonl", 40, seed=1)
    made = host.config(folder, rows=24)
    ended = made["datasets"][0]
    left_open = {**ended, "path": str(folder / "open.jsonl"), "train_on_eos": "none", "train_on_eot": "none"}
    return {
        **made, "datasets": [ended, left_open], "eot_tokens": ENDS, "val_set_size": 12, "saves_per_epoch": None,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1,
    }  # fmt: skip


def test_both_answers_of_a_pair_end_alike(tmp_path: Path, warm: Warm) -> None:
    run = host.train(settings(tmp_path), by=warm)
    for iteration in (0, 1):
        pairs = run.pairs(iteration).to_pylist()
        human = [pair["chosen_ids"][-1] in STOPS for pair in pairs]
        assert 0 < sum(human) < len(pairs)
        stopped = [pair for pair, ended in zip(pairs, human, strict=True) if ended and pair["finish_reason"] == "stop"]
        assert stopped and all(pair["rejected_ids"][-1] in STOPS for pair in stopped)
        left_open = [pair for pair, ended in zip(pairs, human, strict=True) if not ended]
        assert not any(STOPS & set(pair["rejected_ids"]) for pair in left_open)
        assert {pair["finish_reason"] for pair in left_open} == {"stop", "length"}
        empty = [pair for pair in left_open if not pair["rejected_ids"]]
        assert all(pair["opponent_rejected_logp"] == 0 for pair in empty) and empty
        texts = [
            (pair["prompt"] + pair[name], pair["prompt_ids"] + pair[f"{name}_ids"])
            for pair in pairs
            for name in ANSWERS
        ]
        assert [text for text, _ in texts] == tiny.tokenizer().batch_decode([ids for _, ids in texts])
    heldout = run.heldout(0).to_pylist()
    assert all(
        row["prompt"] + row["human"] == tiny.tokenizer().decode(row["prompt_ids"] + row["human_ids"]) for row in heldout
    )
    assert all(
        not row["own_ids"] or row["own_ids"][-1] not in STOPS or row["human_ids"][-1] in STOPS for row in heldout
    )
    assert {"spin/heldout_margin", "spin/heldout_auc"} <= set(run.metrics(0))
    assert run.metrics(0)["spin/empty"] > 0
    assert run.losses()[0] == pytest.approx(math.log(2), abs=1e-4) and "step 0" not in run.output
    assert run.output.count("human answers have no end token among their labels") == 1


def test_answers_stay_as_drawn_where_the_humans_are_cut_at_the_same_limit(tmp_path: Path, warm: Warm) -> None:
    """Human answers of `max_new_tokens` tokens are cut as the opponent's are, which may keep an end."""
    made = settings(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "open.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"] = " ".join(tiny.WORDS[:LIMIT])
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spin = {"iterations": 1, "generation": {"max_new_tokens": LIMIT, "batch_size": 8}}
    run = host.train({**made, "datasets": made["datasets"][1:], "spin": spin}, by=warm)
    for table, human, own in ((run.pairs(0), "chosen_ids", "rejected_ids"), (run.heldout(0), "human_ids", "own_ids")):
        drawn = table.to_pylist()
        assert {len(row[human]) for row in drawn} == {LIMIT}
        ended = [bool(STOPS.intersection(row[own][-1:])) for row in drawn]
        assert ended == [row["finish_reason"] == "stop" for row in drawn] and any(ended)


def test_answers_that_are_given_end_alike_too(tmp_path: Path, warm: Warm) -> None:
    """Pairs of a run before this rule, whose opponent's answers have ends that the human's lack."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt_ids": [4, 7, 6, 5], "chosen_ids": [8, 9], "rejected_ids": [10 + i, 11, 6], "finish_reason": "stop"}
        for i in range(8)
    ]
    rows[7]["chosen_ids"] = [8] * LIMIT  # cut as the opponent's are
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "given.parquet")
    generation = {"max_new_tokens": LIMIT}
    spin = {"iterations": 1, "initial_pairs": str(tmp_path / "given.parquet"), "generation": generation}
    run = host.train({**settings(tmp_path), "spin": spin, "val_set_size": 0}, by=warm)
    assert run.pairs(0)["rejected_ids"].to_pylist() == [*([10 + i, 11] for i in range(7)), [17, 11, 6]]
    assert json.loads((run.out / "spin" / "iteration-0" / "metrics.json").read_text())["spin/empty"] == 0
