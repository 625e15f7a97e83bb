"""Pairs of a human answer and the opponent's: their file, the dataset over it, batches and the collator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset, Sampler

from axolotl_spin.artifacts import DamagedFileError, ForeignFileError, write_whole

_IDS = pa.list_(pa.int32())

SCHEMA = pa.schema(
    [
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("finish_reason", pa.string()),  # "stop": ended by itself; "length": cut at the limit
        ("generated_in", pa.int32()),  # iteration whose opponent gave the rejected answer
        ("opponent_chosen_logp", pa.float64()),  # sums over the answer's tokens, in nats
        ("opponent_rejected_logp", pa.float64()),
        ("row", pa.int64()),  # index of the source row
    ]
)

_MARK = b"axolotl_spin"


def write_pairs(path: Path, pairs: pa.Table, mark: str) -> None:
    """Writes `pairs.parquet` as a whole file, each page with a checksum.

    Args:
        path: Destination.
        pairs: A table of `SCHEMA`, one row per pair trained on, in order.
        mark: What the pairs depend on (`Identity.before`), kept in the file's metadata.
    """
    pairs = pairs.cast(SCHEMA).replace_schema_metadata({_MARK: mark.encode()})
    write_whole(path, lambda aside: pq.write_table(pairs, aside, write_page_checksum=True))


def check_pairs(path: Path, mark: str, rows: int) -> None:
    """Checks by its footer alone that a file holds an iteration's pairs.

    Args:
        path: The file.
        mark: What the pairs must depend on.
        rows: How many there must be.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is cut, corrupt, or has other columns or another number of rows.
        ForeignFileError: It belongs to another run.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    with file:
        schema, found_rows = file.schema_arrow, file.metadata.num_rows
    if not schema.equals(SCHEMA):
        raise DamagedFileError(f"{path} does not hold the columns of a pairs file")
    found = (schema.metadata or {}).get(_MARK, b"").decode()
    if found != mark:
        raise ForeignFileError(
            f"{path} belongs to another run or iteration (it is marked {found[:12] or 'not at all'})"
        )
    if found_rows != rows:
        raise DamagedFileError(f"{path} has {found_rows} pairs instead of {rows}")


def read_pairs(path: Path, mark: str, rows: int) -> pa.Table:
    """Reads `pairs.parquet`, verifying the checksums.

    Args:
        path: The file.
        mark: What the pairs must depend on.
        rows: How many there must be.

    Raises:
        FileNotFoundError, DamagedFileError, ForeignFileError: See `check_pairs`.
    """
    check_pairs(path, mark, rows)
    try:
        pairs = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error
    logps = (pairs["opponent_chosen_logp"].to_numpy(), pairs["opponent_rejected_logp"].to_numpy())
    if not all(np.isfinite(column).all() for column in logps):
        raise DamagedFileError(f"{path} is damaged (it has log-probs that are no numbers)")
    return pairs


class PairDataset(Dataset):
    """Pairs as a map-style dataset over Arrow memory; nothing is held as Python objects.

    Args:
        pairs: A table of `SCHEMA` with the opponent's log-probs.
    """

    def __init__(self, pairs: pa.Table):
        self.table = pairs.combine_chunks()
        self._ids = {}
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            column = self._column(name)
            self._ids[name] = (column.offsets.to_numpy(), column.values.to_numpy())
        self._logps = {name: self.table[name].to_numpy() for name in ("opponent_chosen_logp", "opponent_rejected_logp")}

    def _column(self, name: str) -> pa.ListArray:
        column = self.table[name]
        return column.chunk(0) if column.num_chunks else pa.array([], type=column.type)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, (offsets, values) in self._ids.items():
            row[name] = values[offsets[index] : offsets[index + 1]]
        for name, logps in self._logps.items():
            row[name] = logps[index]
        return row

    def lengths(self, name: str) -> np.ndarray:
        """Returns the number of tokens of each row's `prompt_ids`, `chosen_ids` or `rejected_ids`."""
        return np.diff(self._ids[name][0])

    def padded_lengths(self) -> np.ndarray:
        """Returns the tokens of each row's prompt with its longer answer."""
        return self.lengths("prompt_ids") + np.maximum(self.lengths("chosen_ids"), self.lengths("rejected_ids"))


class StepBatches(Sampler[list[tuple[int, float]]]):
    """Which pairs a rank takes in each micro-batch of an epoch.

    A step takes the next `micro_batch * accumulation * ranks` pairs of the epoch's order, whatever the layout, so one
    process and several train on the same batches. The last step takes what is left; a rank without a pair in it gets
    one of weight 0, so that every rank runs the same forwards. Each pair has weight 1 once an epoch.

    Args:
        rows: Pairs in the epoch.
        micro_batch: Pairs in one rank's micro-batch.
        accumulation: Micro-batches in a step.
        ranks: Number of ranks.
        rank: This rank.
        seed: Seed of the shuffle.
        epoch: The run's epoch, mixed into the seed.
        shuffle: False keeps the order of the rows (the host's `curriculum_sampling`).
        lengths: (rows,) by which a step's pairs are sorted before micro-batches are cut, so that a padded micro-batch
            holds pairs of similar length. None leaves them mixed, which bounds the tokens of a micro-batch without
            padding. A step has the same pairs either way.
    """

    def __init__(
        self,
        rows: int,
        *,
        micro_batch: int,
        accumulation: int,
        ranks: int,
        rank: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
    ):
        self.lengths = lengths
        self.rows, self.ranks, self.rank = rows, ranks, rank
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        self.wide = micro_batch * ranks  # pairs of all ranks in one micro-batch
        self.step = self.wide * accumulation

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.step)
        return whole * (self.step // self.wide) + math.ceil(rest / self.wide)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
        order = shuffled.numpy()
        for start in range(0, self.rows, self.step):
            step = order[start : start + self.step]
            if self.lengths is not None:
                step = step[np.argsort(-self.lengths[step], kind="stable")]
            for at in range(0, len(step), self.wide):
                wide = step[at : at + self.wide].tolist()
                mine = wide[self.rank :: self.ranks]
                yield [(index, 1.0) for index in mine] or [(wide[0], 0.0)]


class WeightedRows(Dataset):
    """Rows of a `PairDataset` addressed by `StepBatches`' (index, weight)."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, float]) -> dict[str, Any]:
        index, weight = key
        return {**self.pairs[index], "weight": weight}
