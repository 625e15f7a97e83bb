"""Which prompts an iteration answers where it answers a part of them."""

from __future__ import annotations

import numpy as np
import pytest

from axolotl_spin.data.slices import prompt_slice


def slices(prompts: int, size: int, count: int, seed: int = 7) -> list[list[int]]:
    return [prompt_slice(prompts, size, number, seed).tolist() for number in range(count)]


def test_they_are_what_they_have_always_been() -> None:
    """Another draw would be another run; worked out apart from the code, from PCG64's raw numbers."""
    raw = [np.random.PCG64(np.random.SeedSequence([7, 0x534C_4943, number])).random_raw(10) for number in range(2)]
    first, second = (sorted(range(10), key=lambda index: int(numbers[index])) for numbers in raw)
    assert (first, second) == ([1, 7, 3, 6, 4, 5, 8, 9, 2, 0], [8, 3, 1, 0, 6, 7, 9, 4, 2, 5])
    # 4 and 4 of the first shuffle; 2 and 0 are left, with the second's 8 and 3; then its 1, 6, 7 and 9, since 0 has come
    assert slices(10, 4, 4) == [[1, 3, 6, 7], [4, 5, 8, 9], [0, 2, 3, 8], [1, 6, 7, 9]]


@pytest.mark.parametrize(("prompts", "size"), [(12, 4), (10, 4), (7, 5), (5, 3), (9, 8), (1, 1), (6, 6), (1000, 37)])
def test_none_comes_again_before_all_have_come(prompts: int, size: int) -> None:
    """Within a slice each prompt stands once, and at any time no prompt has come two times more often than another."""
    came = np.zeros(prompts, dtype=int)
    for indices in slices(prompts, size, 3 * prompts // size + 3):
        assert len(set(indices)) == size and indices == sorted(indices) and 0 <= indices[0] <= indices[-1] < prompts
        came[indices] += 1
        assert came.max() - came.min() <= 1
    assert came.min() >= 3


def test_all_prompts_are_in_their_order() -> None:
    assert slices(6, 6, 2) == [[0, 1, 2, 3, 4, 5]] * 2


def test_shuffles_are_the_seeds_and_differ() -> None:
    assert slices(100, 50, 4) == slices(100, 50, 4)
    assert slices(100, 50, 1, seed=8) != slices(100, 50, 1)
    one, other, third, fourth = slices(100, 50, 4)
    assert sorted(one + other) == sorted(third + fourth) == list(range(100)) and one not in (third, fourth)
