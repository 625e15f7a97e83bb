"""The work of an iteration, cut into fixed chunks whose answers depend on their seed alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from axolotl_spin.data.prompts import token_counts
from axolotl_spin.settings.generation import DEFAULT_MAX_NEW_TOKENS, GenerationConfig

if TYPE_CHECKING:
    from axolotl_spin.data.images import ImageRows


@dataclass(frozen=True)
class Chunk:
    """The unit that is resumed and given to a rank: one batch of prompts or several.

    Attributes:
        index: Position among the iteration's chunks.
        rows: Indices of the prompts.
        prompts: Their token ids.
        limits: Most tokens that each answer may have.
        seed: With the row it seeds the answer; depends on the run's seed and the iteration alone.
        images: Where the prompts' pictures are; None where they are text alone.
        sources: The prompts' rows there.
    """

    index: int
    rows: tuple[int, ...]
    prompts: tuple[Sequence[int], ...]
    limits: tuple[int, ...]
    seed: int
    images: ImageRows | None = None
    sources: tuple[int, ...] = ()

    def part(self, start: int, stop: int) -> Chunk:
        """Returns the prompts from one position up to another."""
        some = slice(start, stop)
        rows, sources = self.rows[some], self.sources[some]
        return replace(self, rows=rows, prompts=self.prompts[some], limits=self.limits[some], sources=sources)


def iteration_seed(seed: int, iteration: int) -> int:
    """Returns a 63-bit seed that depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{iteration}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def chunk_size(prompts: int, batch_size: int) -> int:
    """Returns how many prompts a chunk has: up to 8 batches, so that ended answers make room for others.

    It does not depend on the number of ranks, and leaves at least 16 chunks to share among them.

    Args:
        prompts: In the iteration.
        batch_size: Answers written at once.
    """
    batches = -(-prompts // batch_size)
    return batch_size * max(1, min(8, batches // 16))


def chunk_rows(lengths: np.ndarray, chunk_size: int) -> list[np.ndarray]:
    """Cuts prompts into chunks of similar length, longest first, so that a chunk that cannot fit fails early.

    Args:
        lengths: (prompts,) tokens in each prompt.
        chunk_size: Prompts in a chunk.

    Returns:
        The prompts' indices, an array for each chunk.
    """
    order = np.argsort(-lengths, kind="stable")
    return [order[start : start + chunk_size] for start in range(0, len(order), chunk_size)]


@dataclass(frozen=True)
class Finished:
    """What an iteration has answered already.

    Attributes:
        answered: (prompts,) bool.
        chunks: Indices of the chunks whose files hold the answers.
    """

    answered: np.ndarray
    chunks: frozenset[int]


class Chunks(Sequence[Chunk]):
    """An iteration's chunks, each made when it is asked for: prompts stay in the dataset's file until then.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids`, and `row` where they have pictures.
        rows: The prompts of each chunk; see `chunk_rows`.
        limit: Returns from a prompt's tokens how many its answer may have.
        seed: See `Chunk`.
        indices: What each chunk is called; its position by default.
        images: See `Chunk`.
    """

    def __init__(
        self,
        prompts: Any,
        rows: list[np.ndarray],
        limit: Callable[[int], int],
        seed: int,
        indices: Sequence[int] | None = None,
        images: ImageRows | None = None,
    ):
        self.images = images
        self._prompts = prompts.with_format("numpy").select_columns(["prompt_ids", *(["row"] if images else [])])
        self._rows, self._limit, self._seed = rows, limit, seed
        self._indices = range(len(rows)) if indices is None else indices

    @classmethod
    def of(
        cls, prompts: Any, generation: GenerationConfig, sequence_len: int, seed: int, images: ImageRows | None = None
    ) -> Chunks:
        """Cuts prompts into chunks; the same on any number of ranks.

        Args:
            prompts: `datasets.Dataset` with `prompt_ids`.
            generation: The `spin.generation` block.
            sequence_len: The host's, in tokens.
            seed: Of the answers; see `Chunk`.
            images: See `Chunk`.
        """
        lengths = token_counts(prompts, "prompt_ids")
        rows = chunk_rows(lengths, chunk_size(len(lengths), generation.batch_size))

        def limit(prompt: int) -> int:
            return token_limit(prompt, max_new_tokens=generation.max_new_tokens, sequence_len=sequence_len)

        return cls(prompts, rows, limit, seed, images=images)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Chunk:  # type: ignore[override]
        rows = self._rows[position].tolist()
        found = self._prompts[rows]
        prompts = tuple(found["prompt_ids"])
        limits = tuple(self._limit(len(prompt)) for prompt in prompts)
        sources = tuple(found["row"].tolist()) if self.images else ()
        return Chunk(self._indices[position], tuple(rows), prompts, limits, self._seed, self.images, sources)

    def index_at(self, position: int) -> int:
        """Returns the index of the chunk at a position, without making it."""
        return self._indices[position]

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields each chunk's index and its prompts' indices."""
        return zip(self._indices, self._rows, strict=True)

    def left(self, finished: Finished) -> Chunks:
        """Returns the prompts without an answer, cut anew: what is finished may have been cut to another size.

        An answer depends on its prompt's row alone, so it is the same in every cut.

        Args:
            finished: What is on disk.
        """
        if not finished.chunks:
            return self
        order = np.concatenate(self._rows)
        order, size = order[~finished.answered[order]], len(self._rows[0])
        rows = [order[start : start + size] for start in range(0, len(order), size)]
        free = (index for index in itertools.count() if index not in finished.chunks)
        indices = list(itertools.islice(free, len(rows)))
        return Chunks(self._prompts, rows, self._limit, self._seed, indices, self.images)


def token_limit(prompt_length: int, *, max_new_tokens: int | None, sequence_len: int) -> int:
    """Returns how many tokens an answer may have: what `sequence_len` leaves, at most `max_new_tokens`."""
    return max(1, min(sequence_len - prompt_length, max_new_tokens or DEFAULT_MAX_NEW_TOKENS))
