"""Pairs of a human answer and the opponent's: their file, and the dataset over them.

Files are written and read a batch of rows at a time, so that memory does not grow with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import Dataset

from axolotl_spin.data.images import ImageRows
from axolotl_spin.data.texts import Decode, answer_texts
from axolotl_spin.disk.atomic import MARK, WEIGHTS, DamagedFileError, ForeignFileError, StaleFileError, write_whole

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
# of a run on pictures: the hash of each picture of the prompt, in order
PICTURED = SCHEMA.append(pa.field("images", pa.list_(pa.string())))
LOGPS = ("opponent_chosen_logp", "opponent_rejected_logp")

# rows that are held in memory at once while pairs are made, written or read; a row group of the file
BATCH_ROWS = 8192


def record_batch(columns: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """Returns columns (Arrow, numpy or lists) as a batch of a schema."""

    def as_array(values: Any, kind: pa.DataType) -> pa.Array:
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, type=kind)

    return pa.record_batch([as_array(columns[field.name], field.type) for field in schema], schema=schema)


def with_texts(pairs: PairDataset, decode: Decode) -> Iterator[pa.RecordBatch]:
    """Yields scored pairs with their texts, batches of `SCHEMA` for `write_pairs`.

    Args:
        pairs: With log-probs.
        decode: Returns the texts of lists of ids.
    """
    assert pairs.logps is not None
    images, start = pairs.images, 0
    for batch in pairs.table.to_batches(max_chunksize=BATCH_ROWS):
        logps = pairs.logps[start : start + len(batch)]
        start += len(batch)
        prompts = batch["prompt_ids"].to_pylist()
        columns = {
            **{name: batch[name] for name in batch.schema.names},
            **{name: logps[:, column] for column, name in enumerate(LOGPS)},
            "prompt": decode(prompts),
            **{
                name: answer_texts(prompts, batch[f"{name}_ids"].to_pylist(), decode) for name in ("chosen", "rejected")
            },
        }
        if images is not None:
            columns["images"] = [images.hashes(row) for row in batch["row"].to_pylist()]
        yield record_batch(columns, schema_of(images))


def schema_of(images: ImageRows | None) -> pa.Schema:
    """Returns the columns of pairs whose prompts have pictures, or none."""
    return SCHEMA if images is None else PICTURED


def write_pairs(
    path: Path, batches: Iterable[pa.RecordBatch], mark: str, weights: str = "", schema: pa.Schema = SCHEMA
) -> None:
    """Writes `pairs.parquet` as a whole file, each page with a checksum.

    Args:
        path: Destination.
        batches: Of the schema, one row per pair trained on, in order; a row group each.
        mark: What the pairs depend on (`Identity.before`), kept in the file's metadata.
        weights: Digest of the opponent's weights, likewise.
        schema: See `schema_of`.
    """

    def write(aside: Path) -> None:
        marked = schema.with_metadata({MARK: mark.encode(), WEIGHTS: weights.encode()})
        with pq.ParquetWriter(aside, marked, write_page_checksum=True) as file:
            for batch in batches:
                file.write_batch(batch.replace_schema_metadata(marked.metadata))

    write_whole(path, write)


def check_pairs(path: Path, mark: str, rows: int, weights: str = "") -> None:
    """Checks by its footer alone that a file holds an iteration's pairs.

    Args:
        path: The file.
        mark: What the pairs must depend on.
        rows: How many there must be.
        weights: Digest of the weights that must have made them; empty where they may be gone.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: It is cut, corrupt, or has other columns or another number of rows.
        StaleFileError: Other weights made them.
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
    if schema not in (SCHEMA, PICTURED):
        raise DamagedFileError(f"{path} does not hold the columns of a pairs file")
    found = (schema.metadata or {}).get(MARK, b"").decode()
    if found != mark:
        raise ForeignFileError(
            f"{path} belongs to another run or iteration (it is marked {found[:12] or 'not at all'})"
        )
    if found_rows != rows:
        raise DamagedFileError(f"{path} has {found_rows} pairs instead of {rows}")
    made_by = (schema.metadata or {}).get(WEIGHTS, b"").decode()
    if weights and made_by and made_by != weights:
        raise StaleFileError(f"{path} was made by other weights than the model has at this start")


def read_batches(
    path: Path, mark: str, rows: int, columns: Sequence[str] = tuple(SCHEMA.names), weights: str = ""
) -> Iterator[pa.RecordBatch]:
    """Reads `pairs.parquet` a batch of rows at a time, verifying the checksums of what it reads.

    Args:
        path: The file.
        mark: What the pairs must depend on.
        rows: How many there must be.
        columns: Which of them; the others are not looked at.
        weights: See `check_pairs`.

    Raises:
        FileNotFoundError, DamagedFileError, StaleFileError, ForeignFileError: See `check_pairs`.
    """
    check_pairs(path, mark, rows, weights)
    try:
        # with `pre_buffer`, the default, what has been read stays in memory until the end
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
                if not all(np.isfinite(batch[name].to_numpy()).all() for name in LOGPS if name in columns):
                    raise DamagedFileError(f"{path} is damaged (it has log-probs that are no numbers)")
                yield batch.replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from error


def read_pairs(path: Path, mark: str, rows: int, columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
    """Reads columns of `pairs.parquet` into memory; see `read_batches`."""
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    return pa.Table.from_batches(read_batches(path, mark, rows, columns), schema)


class PairDataset(Dataset):
    """Pairs as a map-style dataset over Arrow memory; nothing is held as Python objects.

    Args:
        pairs: A table with `prompt_ids`, `chosen_ids` and `rejected_ids`, in one piece or several; mapped or in memory.
        logps: (pairs, 2) the opponent's log-probs of the human's and of its own answers, in nats. None while they are
            still to be computed; where the table has them, they are taken from it.
        images: Where the prompts' pictures are, by the table's `row`; None where all is text.
    """

    def __init__(self, pairs: pa.Table, logps: np.ndarray | None = None, images: ImageRows | None = None):
        self.table, self.images = pairs, images
        self._sources = pairs["row"].to_numpy() if images is not None else None
        batches = [batch for batch in pairs.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._ids = {
            name: [(batch[name].offsets.to_numpy(), batch[name].values.to_numpy()) for batch in batches]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
        if logps is None and LOGPS[0] in pairs.column_names:
            logps = np.stack([pairs[name].to_numpy() for name in LOGPS], axis=1)
        self.logps = logps

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a pair.

        Returns:
            `prompt_ids`, `chosen_ids` and `rejected_ids`, each (tokens,) int32 in the file's own memory; and, where they
            are known, `opponent_chosen_logp` and `opponent_rejected_logp`, float64 in nats; and, where prompts have
            pictures, `images` and the `row` there.
        """
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        at = index - self._starts[batch]
        row: dict[str, Any] = {}
        for name, parts in self._ids.items():
            offsets, values = parts[batch]
            row[name] = values[offsets[at] : offsets[at + 1]]
        if self.logps is not None:
            row.update(zip(LOGPS, self.logps[index], strict=True))
        if self._sources is not None:
            row |= {"images": self.images, "row": int(self._sources[index])}
        return row

    def lengths(self, name: str) -> np.ndarray:
        """Returns the number of tokens of each row's `prompt_ids`, `chosen_ids` or `rejected_ids`."""
        return np.concatenate([np.zeros(0, dtype=np.int32), *(np.diff(offsets) for offsets, _ in self._ids[name])])

    def padded_lengths(self) -> np.ndarray:
        """Returns the tokens of each row's prompt with its longer answer."""
        return self.lengths("prompt_ids") + np.maximum(self.lengths("chosen_ids"), self.lengths("rejected_ids"))
