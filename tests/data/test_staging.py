"""AnswerStore in the order of their prompts, and pairs that every rank maps: nothing of a run's size is held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.data.prompts import token_counts
from axolotl_spin.data.staging import STAGED, AnswerStore, read_staged, write_staged
from axolotl_spin.generation.chunks import Chunks, Finished, chunk_rows


def answers_of(rows: list[int], ids: list[list[int]], reasons: list[str]) -> pa.Table:
    return pa.table({"row": rows, "ids": pa.array(ids, type=pa.list_(pa.int32())), "finish_reason": reasons})


def test_answers_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    answers = AnswerStore(tmp_path / "iteration-0", 5)
    answers.add(answers_of([3, 0], [[31, 32, 33], [1]], ["stop", "length"]))
    assert answers.missing().tolist() == [1, 2, 4]
    answers.add(answers_of([4, 1, 2], [[], [11, 12], [21]], ["length", "stop", "stop"]))
    assert not len(answers.missing())
    ids, reasons = answers.between(0, 5)
    assert ids.to_pylist() == [[1], [11, 12], [21], [31, 32, 33], []]
    assert reasons.to_pylist() == ["length", "stop", "stop", "stop", "length"]
    ids, reasons = answers.between(2, 4)
    assert ids.to_pylist() == [[21], [31, 32, 33]] and reasons.to_pylist() == ["stop", "stop"]
    assert answers.between(4, 5)[0].to_pylist() == [[]]
    assert list((tmp_path / "iteration-0").iterdir()) == []  # its file has no name: nothing is left behind


def batch(start: int, count: int, width: int = 3) -> pa.RecordBatch:
    columns = [
        pa.array([[row] * (1 + row % 2) for row in range(start, start + count)], type=STAGED.field(0).type),
        pa.array([[row] * width for row in range(start, start + count)], type=STAGED.field(1).type),
        pa.array([[-row] for row in range(start, start + count)], type=STAGED.field(2).type),
        pa.array(["stop"] * count),
        pa.array([0] * count, type=pa.int32()),
        pa.array(range(start, start + count), type=pa.int64()),
    ]
    return pa.record_batch(columns, schema=STAGED)


def test_pairs_are_read_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "iteration-0" / ".pairs.arrow"
    write_staged(path, [batch(0, 4), batch(4, 0), batch(4, 3)])
    logps = np.arange(14.0).reshape(7, 2)
    pairs = PairDataset(read_staged(path), logps)
    assert len(pairs) == 7
    for index in (0, 3, 4, 6):
        row = pairs[index]
        assert row["chosen_ids"].tolist() == [index] * 3 and row["rejected_ids"].tolist() == [-index]
        assert (row["opponent_chosen_logp"], row["opponent_rejected_logp"]) == tuple(logps[index])
    assert pairs.lengths("prompt_ids").tolist() == [1, 2, 1, 2, 1, 2, 1]
    assert pairs.padded_lengths().tolist() == [4, 5, 4, 5, 4, 5, 4]
    assert "opponent_chosen_logp" not in PairDataset(read_staged(path))[0]  # not scored yet


def test_staged_pairs_take_no_memory_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / ".pairs.arrow"
    write_staged(path, [batch(start, 2000, width=300) for start in range(0, 10_000, 2000)])
    before = pa.total_allocated_bytes()
    pairs = PairDataset(read_staged(path))
    assert pairs[9_999]["chosen_ids"].tolist() == [9_999] * 300
    assert pa.total_allocated_bytes() - before < 0.01 * path.stat().st_size


def test_a_rank_that_does_not_see_the_file_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is its filesystem still mounted on this node"):
        read_staged(tmp_path / ".pairs.arrow")


def test_chunks_are_made_when_they_are_asked_for() -> None:
    prompts = Dataset.from_dict({"prompt_ids": [[1], [2, 2, 2], [3, 3], [4], [5] * 4]})
    lengths = token_counts(prompts, "prompt_ids")
    assert lengths.tolist() == [1, 3, 2, 1, 4]
    chunks = Chunks(prompts, chunk_rows(lengths, 2), limit=lambda tokens: 10 - tokens, seed=5)
    assert [(index, rows.tolist()) for index, rows in chunks.rows()] == [(0, [4, 1]), (1, [2, 0]), (2, [3])]
    assert chunks.left(Finished(np.zeros(5, dtype=bool), frozenset())) is chunks
    left = chunks.left(Finished(np.array([True, False, True, False, False]), frozenset({1})))  # rows 2 and 0
    assert len(left) == 2 and left[1].index == 2
    first = left[0]
    assert (first.index, first.rows, first.limits, first.seed) == (0, (4, 1), (6, 7), 5)
    assert [list(ids) for ids in first.prompts] == [[5] * 4, [2] * 3]
    assert [chunk.index for chunk in left] == [0, 2]
    # cut to three a chunk, two of which an earlier start had made: what is left is the same, longest prompts first
    wider = Chunks(prompts, chunk_rows(lengths, 3), limit=lambda tokens: 10 - tokens, seed=5)
    again = wider.left(Finished(np.array([True, False, True, False, False]), frozenset({1})))
    assert [(index, rows.tolist()) for index, rows in again.rows()] == [(0, [4, 1, 3])]
    assert again[0].limits == (6, 7, 9) and again[0].seed == 5
