"""An iteration's pairs between their making and their use, in files that are mapped into memory.

    chunks of answers -> AnswerStore (in the prompts' order) -> .pairs.arrow -> scored, written as pairs.parquet, trained on
    pairs.parquet of an earlier start                    -> .pairs.arrow -> trained on

Every rank maps the same `.pairs.arrow`, so the pages of the file are all the memory that pairs take, and the ranks of a
machine share them. It is there from the iteration's start to its end; a start removes what a killed run left of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from axolotl_spin.data.pairs import BATCH_ROWS, SCHEMA, record_batch
from axolotl_spin.disk.atomic import explained, write_whole

STAGED = pa.schema(
    [
        SCHEMA.field(name)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids", "finish_reason", "generated_in", "row")
    ]
)


class AnswerStore:
    """An iteration's answers as they come from the chunks, to be read in the order of the prompts.

    Their ids lie in a file without a name; of each answer only its place, length and end are in memory.

    Args:
        folder: Where there is room for the file.
        count: Number of prompts.
    """

    def __init__(self, folder: Path, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it goes with this object)
        self._tokens = 0
        self._starts = np.zeros(count, dtype=np.int64)
        self._lengths = np.full(count, -1, dtype=np.int32)
        self._stopped = np.zeros(count, dtype=bool)

    def add(self, answers: pa.Table) -> None:
        """Adds a chunk's.

        Args:
            answers: With `row` (of the prompt), `ids` and `finish_reason`.
        """
        rows, ids = answers["row"].to_numpy(), answers["ids"].combine_chunks()
        lengths = pc.list_value_length(ids).to_numpy()
        self._starts[rows] = self._tokens + np.cumsum(lengths) - lengths
        self._lengths[rows] = lengths
        self._stopped[rows] = pc.equal(answers["finish_reason"], "stop").to_numpy()
        with explained(self._folder):
            self._file.write(ids.flatten().to_numpy().astype(np.int32, copy=False).tobytes())
            self._file.flush()
        self._tokens += int(lengths.sum())

    def missing(self) -> np.ndarray:
        """Returns the prompts that have no answer yet."""
        return np.flatnonzero(self._lengths < 0)

    def between(self, start: int, stop: int) -> tuple[pa.ListArray, pa.Array]:
        """Returns ids and finish reasons of the answers to a range of prompts."""
        lengths = self._lengths[start:stop]
        ends = np.cumsum(lengths, dtype=np.int64)
        taken = np.repeat(self._starts[start:stop] - (ends - lengths), lengths) + np.arange(lengths.sum())
        ids = np.memmap(self._file, dtype=np.int32, mode="r")[taken] if len(taken) else np.zeros(0, dtype=np.int32)
        offsets = np.concatenate([[0], ends]).astype(np.int32)
        reasons = np.where(self._stopped[start:stop], "stop", "length")
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)), pa.array(reasons, type=pa.string())

    def paired(self, prompts: Any, iteration: int) -> Iterator[pa.RecordBatch]:
        """Yields pairs of the prompts' human answers and these, in the order of the prompts.

        Args:
            prompts: `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `row`, one for each answer.
            iteration: Whose answers they are.

        Yields:
            Batches of `STAGED`.
        """
        missing = self.missing()
        assert not len(missing), f"{len(missing)} prompts were not answered, the first are {missing[:5]}"
        prompts = prompts.with_format("arrow")
        for start in range(0, len(prompts), BATCH_ROWS):
            part = prompts[start : start + BATCH_ROWS].combine_chunks()
            rejected, reasons = self.between(start, start + len(part))
            columns = {
                **{name: part[name] for name in ("prompt_ids", "chosen_ids", "row")},
                "rejected_ids": rejected,
                "finish_reason": reasons,
                "generated_in": np.full(len(part), iteration, dtype=np.int32),
            }
            yield record_batch(columns, STAGED)


def write_staged(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes pairs for `read_staged`.

    Args:
        path: Destination.
        batches: Of `STAGED`.
    """

    def write(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, STAGED) as file:
            for batch in batches:
                file.write_batch(batch)

    write_whole(path, write)


def read_staged(path: Path) -> pa.Table:
    """Maps staged pairs into memory.

    Raises:
        FileNotFoundError: This rank does not see the file that rank 0 has written.
    """
    try:
        mapped = pa.memory_map(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} was written by rank 0 but is not seen here, though `output_dir` was one folder at the start: is its "
            "filesystem still mounted on this node?"
        ) from error
    return pa.ipc.open_file(mapped).read_all()
