"""Finished pieces of an iteration's generation on disk: what an interrupted phase need not make again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import MARK, WEIGHTS, write_whole
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.disk.printable import printable
from axolotl_spin.generation.backend import Completion
from axolotl_spin.generation.chunks import Chunk, Finished

LOG = get_logger(__name__)

_SCHEMA = pa.schema([("row", pa.int64()), ("ids", pa.list_(pa.int32())), ("finish_reason", pa.string())])


class ChunkFiles:
    """The chunk files of one iteration.

    Args:
        directory: The run's.
        iteration: Whose chunks they are.
        mark: What the answers depend on (`Identity.before`); each file carries it.
        weights: Digest of the weights that answer, likewise.
    """

    def __init__(self, directory: RunDirectory, iteration: int, mark: str, weights: str = ""):
        self.directory = directory
        self.iteration = iteration
        self.mark, self.weights = mark, weights

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.directory.chunks(self.iteration)

    def _path(self, index: int) -> Path:
        return self.directory.chunk(self.iteration, index)

    def write(self, chunk: Chunk, completions: Sequence[Completion]) -> None:
        """Writes a chunk's answers as a whole file.

        Args:
            chunk: What was asked.
            completions: An answer for each of its prompts, in order.
        """
        columns = [
            pa.array(chunk.rows, type=_SCHEMA.field("row").type),
            pa.array([completion.ids for completion in completions], type=_SCHEMA.field("ids").type),
            pa.array([completion.finish_reason for completion in completions], type=pa.string()),
        ]
        marks = {MARK: self.mark.encode(), WEIGHTS: self.weights.encode()}
        table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata(marks)
        write_whole(self._path(chunk.index), lambda aside: pq.write_table(table, aside, write_page_checksum=True))

    def finished(self, prompts: int) -> Finished:
        """Returns what is answered already, in chunks of whatever size.

        Args:
            prompts: The iteration's.
        """
        answered, chunks = np.zeros(prompts, dtype=bool), []
        for index, table in self.tables(prompts):
            answered[table["row"].to_numpy()] = True
            chunks.append(index)
        return Finished(answered, frozenset(chunks))

    def tables(self, prompts: int) -> Iterator[tuple[int, pa.Table]]:
        """Yields each file's chunk and its answers, with `row`, `ids` and `finish_reason`; no row comes twice.

        A file that is damaged, another run's, or of other weights, is left out: its prompts are answered again, by the
        opponent that this start has.

        Args:
            prompts: The iteration's.
        """
        answered = np.zeros(prompts, dtype=bool)
        for path in sorted(self.folder.glob("*.parquet")):
            table = self._read(path)
            if table is None or not path.stem.isdecimal():
                continue
            rows = table["row"].to_numpy()
            if not ((rows >= 0) & (rows < prompts)).all():
                LOG.warning(
                    f"{path} holds answers to prompts that there are not: what it should hold is answered again"
                )
                continue
            if answered[rows].any():
                LOG.warning(f"{path} holds answers of another file: what it should hold is answered again")
                continue
            answered[rows] = True
            yield int(path.stem), table

    def _read(self, path: Path) -> pa.Table | None:
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
        except (pa.ArrowException, OSError) as error:
            LOG.warning(f"{path} is damaged ({printable(error)}): its prompts are answered again")
            return None
        mark, weights = ((table.schema.metadata or {}).get(name, b"").decode() for name in (MARK, WEIGHTS))
        if not table.schema.equals(_SCHEMA) or mark != self.mark:
            LOG.warning(f"{path} is not of this run: its prompts are answered again")
            return None
        if weights and self.weights and weights != self.weights:
            LOG.warning(
                f"{path} was answered by other weights than the model has at this start: its prompts are answered again"
            )
            return None
        return table

    def remove(self) -> None:
        """Removes all chunk files, once the pairs hold their answers. Call it on one rank of a folder."""
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                path.unlink()
            self.folder.rmdir()
