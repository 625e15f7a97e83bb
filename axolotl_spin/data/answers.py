"""What answers' ids say: whether two are equal, whether one repeats a token, how many bigrams differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FlatIds = tuple[np.ndarray, np.ndarray]  # the ids of all answers end to end, and how many each has


def identical(chosen: FlatIds, rejected: FlatIds) -> np.ndarray:
    """Returns (answers,) whether both have the same ids."""
    alike = chosen[1] == rejected[1]
    differs = chosen[0][np.repeat(alike, chosen[1])] != rejected[0][np.repeat(alike, rejected[1])]
    row = np.repeat(np.flatnonzero(alike), chosen[1][alike])
    return alike & (np.bincount(row, weights=differs, minlength=len(alike)) == 0)


def monotone(answers: FlatIds) -> np.ndarray:
    """Returns (answers,) whether an answer says nothing but one token over and over (its end token aside)."""
    ids, lengths = answers
    starts = np.cumsum(lengths) - lengths
    first = np.repeat(ids[starts[lengths > 0]], lengths[lengths > 0])
    differs = ids != first
    differs[(starts + lengths - 1)[lengths > 0]] = False  # the end token
    row = np.repeat(np.arange(len(lengths)), lengths)
    return (lengths > 0) & (np.bincount(row, weights=differs, minlength=len(lengths)) == 0)


def flat(lists: pa.ListArray) -> FlatIds:
    """Returns lists of ids end to end; one that is null counts as empty."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(zero_copy_only=False), lengths.astype(np.int64)


def distinct_2(answers: Iterable[Sequence[int] | np.ndarray]) -> float | None:
    """Returns the share of different bigrams among all bigrams of the answers (distinct-2); None where there are none.

    Args:
        answers: Token ids of each.
    """
    bigrams = [_bigrams(np.asarray(ids, dtype=np.int64)) for ids in answers]
    together = np.concatenate([np.zeros(0, dtype=np.int64), *bigrams])
    return len(np.unique(together)) / len(together) if len(together) else None


def _bigrams(ids: np.ndarray) -> np.ndarray:
    """Returns every pair of neighbours as one number."""
    return ids[:-1] << 32 | ids[1:]
