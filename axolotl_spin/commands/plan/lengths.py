"""How long prompts and human answers are, what a limit would cut, and what repeats: arithmetic on token counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from axolotl_spin.settings.generation import DEFAULT_MAX_NEW_TOKENS
from axolotl_spin.training.layouts import Layout


def describe_lengths(lengths: np.ndarray) -> dict[str, Any]:
    """Returns figures of token counts, with a histogram whose bins double: 1, 2-3, 4-7, 8-15, ...

    Args:
        lengths: (rows,) tokens in each, at least one row.
    """
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(bins)
    histogram = [
        {"from": 2**power, "to": 2 ** (power + 1) - 1, "count": int(counts[power])}
        for power in range(int(bins.min()), len(counts))
    ]
    quantiles = np.percentile(lengths, (50, 95), method="inverted_cdf")
    return {
        "total": int(lengths.sum()),
        "mean": float(lengths.mean()),
        "min": int(lengths.min()),
        "median": int(quantiles[0]),
        "p95": int(quantiles[1]),
        "max": int(lengths.max()),
        "histogram": histogram,
    }


def limits(prompts: np.ndarray, *, max_new_tokens: int | None, sequence_len: int) -> np.ndarray:
    """Returns the most tokens that each prompt's answer may have; `generation.token_limit` over an array.

    Args:
        prompts: (rows,) tokens in each prompt.
        max_new_tokens: The `spin.generation.max_new_tokens`.
        sequence_len: The host's.
    """
    return np.maximum(1, np.minimum(sequence_len - prompts, max_new_tokens or DEFAULT_MAX_NEW_TOKENS))


def heaviest(
    prompts: np.ndarray, answers: np.ndarray, limits: np.ndarray, *, layout: Layout, pairs: int
) -> tuple[np.ndarray, int]:
    """Returns which pairs make the micro-batch with the most tokens where all own answers are cut, and how many it has.

    Args:
        prompts: (rows,) tokens in each prompt.
        answers: (rows,) tokens in each human answer.
        limits: (rows,) most tokens that the own answer may have.
        layout: See `training.layouts`; tokens of padding count.
        pairs: In a micro-batch.

    Returns:
        The rows of those pairs, the longest first; and tokens.
    """
    longer = prompts + np.maximum(answers, limits)
    whole = {"shared": prompts + answers + limits, "packed": 2 * prompts + answers + limits, "padded": longer}[layout]
    rows = np.argsort(whole, kind="stable")[::-1][:pairs]
    # padded rows are as wide as the widest, and a pair has two
    return rows, int(2 * len(rows) * whole.max() if layout == "padded" else whole[rows].sum())


def repeated(prompts: Any) -> tuple[int, int]:
    """Counts what repeats something before it.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids` and `chosen_ids`.

    Returns:
        Prompts that an earlier row has too, and rows whose prompt and answer an earlier row has.
    """
    seen: tuple[set[int], set[int]] = set(), set()
    rows = 0
    for batch in prompts.with_format("arrow").iter(batch_size=10_000):
        columns = []
        for name in ("prompt_ids", "chosen_ids"):
            column = batch[name].combine_chunks()
            ids, ends = column.flatten().to_numpy(), np.cumsum(column.value_lengths().to_numpy())
            columns.append([part.tobytes() for part in np.split(ids, ends[:-1])])
        rows += len(batch)
        for prompt, answer in zip(*columns, strict=True):
            seen[0].add(hash(prompt))
            seen[1].add(hash((prompt, answer)))
    return rows - len(seen[0]), rows - len(seen[1])
