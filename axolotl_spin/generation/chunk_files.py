"""Finished pieces of an iteration's generation on disk: what an interrupted phase need not make again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from axolotl.utils.logging import get_logger

from axolotl_spin.disk.atomic import MARK, write_whole
from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.generation.backend import Completion
from axolotl_spin.generation.chunks import Chunk

LOG = get_logger(__name__)

_SCHEMA = pa.schema([("row", pa.int64()), ("ids", pa.list_(pa.int32())), ("finish_reason", pa.string())])


class ChunkFiles:
    """The chunk files of one iteration.

    Args:
        directory: The run's.
        iteration: Whose chunks they are.
        mark: What the answers depend on (`Identity.before`); each file carries it.
    """

    def __init__(self, directory: RunDirectory, iteration: int, mark: str):
        self.directory = directory
        self.iteration = iteration
        self.mark = mark

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
        table = pa.table(columns, schema=_SCHEMA).replace_schema_metadata({MARK: self.mark.encode()})
        write_whole(self._path(chunk.index), lambda aside: pq.write_table(table, aside, write_page_checksum=True))

    def read(self, index: int, rows: np.ndarray) -> pa.Table | None:
        """Reads a chunk's answers.

        Args:
            index: Which chunk.
            rows: Its prompts.

        Returns:
            A table with `row`, `ids` and `finish_reason`. None where there is no file, or one that is damaged or another
            run's: it is made again, since the opponent that answers is still the same.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
        except (pa.ArrowException, OSError) as error:
            LOG.warning(f"{path} is damaged ({error}): its prompts are answered again")
            return None
        mark = (table.schema.metadata or {}).get(MARK, b"").decode()
        if not table.schema.equals(_SCHEMA) or mark != self.mark or not np.array_equal(table["row"], rows):
            LOG.warning(f"{path} is not of this run: its prompts are answered again")
            return None
        return table

    def remove(self) -> None:
        """Removes all chunk files, once the pairs hold their answers. Call it on one rank."""
        folder = self.directory.iteration(self.iteration) / "chunks"
        if folder.exists():
            for path in sorted(folder.iterdir()):
                path.unlink()
            folder.rmdir()
