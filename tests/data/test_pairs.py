"""The pairs file, batches over ranks, and the collator."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axolotl_spin.data.pairs import SCHEMA, PairDataset, read_pairs, write_pairs
from axolotl_spin.disk.atomic import DamagedFileError, ForeignFileError, write_whole
from axolotl_spin.training.batches import MicroBatches, StepBatches, WeightedRows
from axolotl_spin.training.layouts import PairCollator


def table(count: int = 3) -> pa.Table:
    columns = {
        "prompt_ids": [[5, 6]] * count,
        "chosen_ids": [[7, index] for index in range(count)],
        "rejected_ids": [[8]] * count,
        "prompt": ["p"] * count,
        "chosen": ["c"] * count,
        "rejected": ["r"] * count,
        "finish_reason": ["stop"] * count,
        "generated_in": [0] * count,
        "opponent_chosen_logp": [-1.0 - index for index in range(count)],
        "opponent_rejected_logp": [-2.0] * count,
        "row": list(range(count)),
    }
    return pa.table(columns, schema=SCHEMA)


def test_opponent_logps_stay_in_double() -> None:
    batch = PairCollator(0)(
        [WeightedRows(PairDataset(table()))[(1, 0.0)], WeightedRows(PairDataset(table()))[(2, 1.0)]]
    )
    assert batch["opponent_logps"].tolist() == [-2.0, -3.0, -2.0, -2.0]
    assert str(batch["opponent_logps"].dtype) == "torch.float64"
    assert batch["weight"].tolist() == [0.0, 1.0]


def epoch_of(rows: int, ranks: int, micro: int, accumulation: int, **changes) -> list[list[list[tuple[int, float]]]]:
    """Returns each rank's micro-batches."""
    epoch = changes.pop("epoch", 1)
    composed = {"seed": 3, "first_epoch": 0, **changes}
    batches = MicroBatches(rows, micro_batch=micro, step=micro * accumulation * ranks, **composed)
    samplers = [StepBatches(batches, ranks=ranks, rank=rank, epoch=epoch) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert [len(made) for made in batches] == [len(sampler) for sampler in samplers]
    return batches


@pytest.mark.parametrize(
    ("rows", "ranks", "micro", "accumulation"), [(37, 2, 2, 2), (37, 3, 2, 1), (4, 2, 1, 2), (1, 4, 2, 2)]
)
def test_each_pair_counts_once_and_ranks_run_alike(rows: int, ranks: int, micro: int, accumulation: int) -> None:
    batches = epoch_of(rows, ranks, micro, accumulation)
    assert len({len(of_rank) for of_rank in batches}) == 1
    weights = np.zeros(rows)
    for of_rank in batches:
        for batch in of_rank:
            assert 0 < len(batch) <= micro
            for index, weight in batch:
                weights[index] += weight
    assert weights.tolist() == [1.0] * rows


def test_a_step_is_the_same_pairs_in_every_layout() -> None:
    """Global batch 8 as 1x8, 1x(4+4), 2x4, 2x(2+2): the same sets of pairs step by step."""

    def steps(ranks: int, micro: int, accumulation: int) -> list[set[int]]:
        batches = epoch_of(21, ranks, micro, accumulation)
        return [
            {i for of_rank in batches for b in of_rank[s : s + accumulation] for i, weight in b if weight}
            for s in range(0, len(batches[0]), accumulation)
        ]

    expected = steps(1, 8, 1)
    assert [len(step) for step in expected] == [8, 8, 5]
    for layout in ((1, 4, 2), (2, 4, 1), (2, 2, 2), (4, 1, 2)):
        assert steps(*layout) == expected


def test_lengths_group_the_pairs_of_a_step_and_no_others() -> None:
    """Two ranks, micro-batches of 2, two of them a step: within each step the longest first, over both ranks."""
    lengths = np.array([3, 50, 4, 49, 2, 48, 1, 51, 9, 8, 7])
    grouped = epoch_of(11, 2, 2, 2, shuffle=False, lengths=lengths)
    assert [[[i for i, _ in b] for b in rank] for rank in grouped] == [
        [[7, 1], [2, 0], [8, 9]],
        [[3, 5], [4, 6], [10]],
    ]
    mixed = epoch_of(11, 2, 2, 2)
    grouped = epoch_of(11, 2, 2, 2, lengths=lengths)
    for step in (slice(0, 2), slice(2, 3)):
        pairs = [sorted(i for rank in e for b in rank[step] for i, w in b if w) for e in (mixed, grouped)]
        assert pairs[0] == pairs[1]


def test_epochs_are_shuffled_differently_and_curriculum_not_at_all() -> None:
    def order(**changes) -> list[int]:
        return [i for b in epoch_of(16, 1, 4, 1, **changes)[0] for i, _ in b]

    assert order(epoch=0) != order(epoch=1) != order(epoch=2)
    assert order(epoch=1) == order(epoch=1)
    assert order(epoch=0, first_epoch=0) != order(epoch=2, first_epoch=2)
    assert order(seed=4) != order(seed=5)
    assert order(shuffle=False) == order(shuffle=False, epoch=2) == list(range(16))


@pytest.mark.parametrize("lengths", [None, np.arange(37) % 5])
def test_epochs_take_the_micro_batches_as_they_were_composed(lengths: np.ndarray | None) -> None:
    """Whatever the epoch and the number of ranks, the same pairs stand together: what the opponent has scored them with."""

    def together(ranks: int, accumulation: int, epoch: int) -> set[tuple[int, ...]]:
        batches = epoch_of(37, ranks, 2, accumulation, epoch=epoch, lengths=lengths)
        return {tuple(i for i, _ in b) for of_rank in batches for b in of_rank if b[0][1]}

    scored = MicroBatches(37, micro_batch=2, step=8, seed=3, first_epoch=0, lengths=lengths)
    expected = {tuple(rows.tolist()) for rows in scored}
    assert len(expected) == 19
    for ranks, accumulation in ((1, 4), (2, 2), (4, 1)):
        for epoch in range(3):
            assert together(ranks, accumulation, epoch) == expected


def test_file_round_trip(tmp_path) -> None:
    path = tmp_path / "iteration-0" / "pairs.parquet"
    write_pairs(path, table().to_batches(), "abc")
    assert read_pairs(path, "abc", 3).to_pydict() == table().to_pydict()
    assert [p.name for p in path.parent.iterdir()] == ["pairs.parquet"]
    dataset = PairDataset(read_pairs(path, "abc", 3))
    assert dataset[2]["chosen_ids"].tolist() == [7, 2]
    assert dataset[2]["opponent_chosen_logp"] == -3.0
    assert dataset.lengths("rejected_ids").tolist() == [1, 1, 1]


def test_foreign_and_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "pairs.parquet"
    write_pairs(path, table().to_batches(), "abc")
    with pytest.raises(ForeignFileError, match="another run"):
        read_pairs(path, "xyz", 3)
    with pytest.raises(DamagedFileError, match="has 3 pairs instead of 4"):
        read_pairs(path, "abc", 4)
    whole = path.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFileError, match="damaged"):
            read_pairs(path, "abc", 3)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DamagedFileError, match="columns"):
        read_pairs(path, "abc", 3)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_pairs(tmp_path / "none.parquet", "abc", 3)


def test_a_flipped_bit_that_decodes_is_found_by_its_checksum(tmp_path) -> None:
    """Somewhere a single bit gives other values and no error: only the pages' checksums see that."""
    path = tmp_path / "pairs.parquet"
    write_pairs(path, table().to_batches(), "abc")
    whole = path.read_bytes()
    silent = 0
    for place in range(4, len(whole) - 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            changed = pq.read_table(path).to_pydict() != table().to_pydict()
        except (pa.ArrowException, OSError):
            continue
        if changed and pq.read_schema(path).equals(SCHEMA):
            silent += 1
            with pytest.raises((DamagedFileError, ForeignFileError)):
                read_pairs(path, "abc", 3)
    assert silent > 20


def test_log_probs_that_are_no_numbers_are_damage(tmp_path) -> None:
    pairs = table()
    column = pairs.schema.get_field_index("opponent_chosen_logp")
    pairs = pairs.set_column(column, pairs.schema.field(column), pa.array([-1.0, float("nan"), -3.0]))
    write_pairs(tmp_path / "pairs.parquet", pairs.to_batches(), "abc")
    with pytest.raises(DamagedFileError, match="no numbers"):
        read_pairs(tmp_path / "pairs.parquet", "abc", 3)


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(aside) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
