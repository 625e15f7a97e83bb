"""Pairs that a run is given for iteration 0 (`spin.initial_pairs`): a published set, or what another run has made.

    pairs.parquet (ids, as they are)            -> checked against vocabulary and `sequence_len` -> GivenPairs
    the authors' `real`/`generated` message lists -> tokenised as training data is (`conversations.py`) -> GivenPairs

They are read and checked before a model loads. Iteration 0 then generates nothing: it scores them under the start model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from axolotl_spin.data.answers import flat, identical
from axolotl_spin.data.endings import last_ids
from axolotl_spin.data.pairs import BATCH_ROWS, SCHEMA
from axolotl_spin.data.staging import STAGED
from axolotl_spin.disk.printable import printable

PAIRS_FILE = "pairs.parquet"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_COLUMNS = (*IDS, "finish_reason")


class GivenPairs:
    """Pairs with an opponent's answers that another program drew.

    Args:
        source: The `spin.initial_pairs`.
        read: Starts anew at each call and yields tables or batches with the ids of prompts and answers, and the
            `finish_reason`.

    Attributes:
        rows: How many pairs there are.
        tokens: Of all prompts and answers.
        digest: SHA-256 of their tokens and finish reasons; where it differs, it is another run.
    """

    def __init__(self, source: str, read: Callable[[], Iterable[Any]]):
        self.source = source
        self._read = read
        self.rows, self.tokens, self.digest = 0, 0, ""

    def check(self, *, vocabulary: int, sequence_len: int) -> None:
        """Reads all pairs once: checks them, counts them and takes their digest.

        Args:
            vocabulary: Ids are below it.
            sequence_len: Most tokens in a prompt with an answer.

        Raises:
            ValueError: A row cannot be trained on, or nothing can be learnt from any; names `spin.initial_pairs`.
        """
        digest, rows, tokens = hashlib.sha256(), 0, 0
        learnable = answered = False
        with naming(self.source):
            for batch in self._batches():
                _check_rows(batch, rows, vocabulary, sequence_len)
                chosen, rejected = (flat(batch[name]) for name in ("chosen_ids", "rejected_ids"))
                learnable |= not identical(chosen, rejected).all()
                # one token is an empty answer's end where the human's ends with it too
                alone = last_ids(batch["rejected_ids"]) == last_ids(batch["chosen_ids"])
                answered |= bool((rejected[1] > alone).any())
                _add(digest, batch)
                tokens += sum(len(batch[name].flatten()) for name in IDS)
                rows += len(batch)
            if not rows:
                raise ValueError("it holds no pair")
            if not learnable:
                raise ValueError(f"all {rows} answers equal the human's, so nothing would be learnt from them")
            if not answered:
                raise ValueError(
                    f"all {rows} answers are empty: to have them answered, list the set under `datasets:` with "
                    "`type: axolotl_spin.uclaml` instead"
                )
        self.rows, self.tokens, self.digest = rows, tokens, digest.hexdigest()

    def staged(self) -> Iterator[pa.RecordBatch]:
        """Yields the pairs as those of iteration 0, of `STAGED`.

        Raises:
            ValueError: They are no longer those that `check` saw.
        """
        digest, rows = hashlib.sha256(), 0
        for batch in self._batches():
            _add(digest, batch)
            columns = {
                **{name: batch[name] for name in _COLUMNS},
                "generated_in": pa.array(np.zeros(len(batch), dtype=np.int32)),
                "row": pa.array(np.arange(rows, rows + len(batch), dtype=np.int64)),
            }
            yield pa.record_batch([columns[field.name] for field in STAGED], schema=STAGED)
            rows += len(batch)
        if digest.hexdigest() != self.digest:
            raise ValueError(f"`spin.initial_pairs: {self.source}` was changed while the run started: start again")

    def _batches(self) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([SCHEMA.field(name) for name in _COLUMNS])
        for part in self._read():
            table = pa.Table.from_batches([part]) if isinstance(part, pa.RecordBatch) else part
            columns = [table[name].combine_chunks().cast(schema.field(name).type) for name in _COLUMNS]
            yield pa.record_batch(columns, schema=schema)


def pairs_file(source: str) -> Path | None:
    """Returns the file of token ids that a `spin.initial_pairs` names; None where it is something else.

    Args:
        source: A file with the columns of `pairs.parquet`, or a folder that holds one under that name.
    """
    path = Path(source)
    if path.is_dir() and (path / PAIRS_FILE).is_file():
        return path / PAIRS_FILE
    if path.is_file() and path.suffix == ".parquet":
        with naming(source):
            names = set(pq.read_schema(path).names)
        return None if "real" in names else path
    return None


def read_file(path: Path, source: str) -> GivenPairs:
    """Reads a file of token ids.

    Args:
        path: See `pairs_file`.
        source: The `spin.initial_pairs`.

    Raises:
        ValueError: The file is damaged or has other columns; names `spin.initial_pairs`.
    """
    with naming(source):
        schema = pq.read_schema(path)
        missing = [name for name in _COLUMNS if name not in schema.names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)} (it has {', '.join(schema.names)}): give a `pairs.parquet`, a "
                "folder made by `axolotl spin export --format parquet`, or rows with `real` and `generated` messages"
            )

        if "images" in schema.names:
            raise ValueError(f"{path} holds pairs of prompts with pictures, which are not in the file")

    def read() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(_COLUMNS))

    return GivenPairs(source, read)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Names `spin.initial_pairs` in what goes wrong with its content.

    Args:
        source: Its value.

    Raises:
        ValueError: With the message of what was raised inside.
    """
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(printable(f"`spin.initial_pairs: {source}`: {error}")) from error


def _check_rows(batch: pa.RecordBatch, first: int, vocabulary: int, sequence_len: int) -> None:
    """Raises what is wrong with the first row that cannot be trained on."""

    def refuse(wrong: np.ndarray, why: str) -> None:
        if wrong.any():
            more = f" (and {int(wrong.sum()) - 1} more)" if wrong.sum() > 1 else ""
            raise ValueError(f"row {first + int(np.argmax(wrong))}{more} {why}")

    for name in _COLUMNS:
        refuse(pc.is_null(batch[name]).to_numpy(zero_copy_only=False), f"has no {name}")
    reasons = pc.is_in(batch["finish_reason"], pa.array(["stop", "length"])).to_numpy(zero_copy_only=False)
    refuse(~reasons, "has a finish_reason that is neither `stop` nor `length`")
    stopped, lengths = pc.equal(batch["finish_reason"], "stop").to_numpy(zero_copy_only=False), {}
    for name in IDS:
        ids, lengths[name] = flat(batch[name])
        # an answer that is nothing but its end has no token where the human's has no end
        empty = lengths[name] == 0
        refuse(empty & ~stopped if name == "rejected_ids" else empty, f"has no token in {name}")
        row = np.repeat(np.arange(len(batch)), lengths[name])
        wrong = np.bincount(row, weights=(ids < 0) | (ids >= vocabulary), minlength=len(batch)) > 0
        refuse(
            wrong, f"has ids in {name} outside the model's vocabulary of {vocabulary}: it was made by another tokenizer"
        )
    longest = lengths["prompt_ids"] + np.maximum(lengths["chosen_ids"], lengths["rejected_ids"])
    refuse(
        longest > sequence_len,
        f"and others have up to {int(longest.max())} tokens, more than `sequence_len: {sequence_len}`: raise it, or leave "
        "such rows out",
    )


def _add(digest: Any, batch: pa.RecordBatch) -> None:
    for name in IDS:
        ids, lengths = flat(batch[name])
        digest.update(lengths.astype(np.int32).tobytes())
        digest.update(ids.tobytes())
    digest.update(pc.equal(batch["finish_reason"], "stop").to_numpy(zero_copy_only=False).tobytes())
