"""Which prompts an iteration answers where it answers a part of them (`spin.prompts_per_iteration`)."""

from __future__ import annotations

import numpy as np

# mixed into the seed, so that no other shuffle of the run takes the same numbers
_STREAM = 0x534C_4943


def prompt_slice(prompts: int, size: int, number: int, seed: int) -> np.ndarray:
    """Returns the prompts of a slice, in their order; the same on every machine and rank.

    Slices are cut one after the other from a shuffle of all prompts, and from a new shuffle where that is used up. So no
    prompt comes again before each has come once. A slice that reaches into the next shuffle takes none twice: those that it
    has already come last in that shuffle.

    Args:
        prompts: Of the run.
        size: Prompts in a slice, at most all of them.
        number: Of the slice, from 0.
        seed: Of the shuffles.

    Returns:
        (size,) indices of prompts, rising.
    """
    left = np.zeros(0, dtype=np.int64)
    taken = left
    shuffles = 0
    for _ in range(number + 1):
        taken, left = left[:size], left[size:]
        if missing := size - len(taken):
            fresh = _shuffle(prompts, seed, shuffles)
            shuffles += 1
            again = np.isin(fresh, taken)
            fresh = np.concatenate([fresh[~again], fresh[again]])
            taken, left = np.concatenate([taken, fresh[:missing]]), fresh[missing:]
    return np.sort(taken)


def _shuffle(prompts: int, seed: int, number: int) -> np.ndarray:
    """Returns a permutation; from raw numbers, whose stream is fixed in every version of numpy, as that of `permutation` is
    not."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, _STREAM, number])).random_raw(prompts)
    return np.argsort(raw, kind="stable")
