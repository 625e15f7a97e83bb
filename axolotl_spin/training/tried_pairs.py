"""Pairs on which a model is tried out before anything is trained on: the run's own, the longest among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from axolotl_spin.data.images import ImageRows
from axolotl_spin.data.prompts import token_counts

Pair = dict[str, Any]

# so many are tried out; the longest of the run stand first, and are cut as no window is
_TRIED, LONG = 6, 2
_MOST_LONG, _MOST, _MOST_ANSWER = 1024, 64, 128


def tried_pairs(prompts: Any, images: ImageRows | None = None) -> list[Pair]:
    """Returns some pairs of real text: the longest of the run, then others spread over it.

    Prompt and answer of a row are one text here, whose latter half answers the first, so that answers of a token or two
    show as much as others do. The second answer is the next row's.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids` and `chosen_ids`.
        images: Where the prompts' pictures are; such prompts stay whole.
    """
    lengths = token_counts(prompts, "prompt_ids") + token_counts(prompts, "chosen_ids")
    longest = np.argsort(-lengths, kind="stable")[:LONG].tolist()
    spread = np.linspace(0, len(lengths) - 1, min(_TRIED, len(lengths))).astype(int).tolist()
    picked = [*longest, *(row for row in spread if row not in longest)][: min(_TRIED, len(lengths))]
    if images is not None:
        return pictured_pairs(prompts.select(picked), images)
    texts = [[*prompts[row]["prompt_ids"], *prompts[row]["chosen_ids"]] for row in picked]
    texts = [ids[: _MOST_LONG if place < LONG else _MOST] for place, ids in enumerate(texts)]
    answers = [ids[-min(len(ids) // 2, _MOST_ANSWER) :] for ids in texts]
    return [
        {"prompt_ids": ids[: len(ids) - len(answer)], "chosen_ids": answer, "rejected_ids": other}
        for ids, answer, other in zip(texts, answers, answers[1:] + answers[:1], strict=True)
    ]


def pictured_pairs(prompts: Any, images: ImageRows) -> list[Pair]:
    """Returns a pair of each prompt with its pictures: the human answer, cut, and the next row's.

    Args:
        prompts: `datasets.Dataset` with `prompt_ids`, `chosen_ids` and `row`.
        images: Where the prompts' pictures are.
    """
    rows = list(prompts)
    answers = [row["chosen_ids"][:_MOST_ANSWER] for row in rows]
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": answer,
            "rejected_ids": other,
            "images": images,
            "row": row["row"],
        }
        for row, answer, other in zip(rows, answers, answers[1:] + answers[:1], strict=True)
    ]
