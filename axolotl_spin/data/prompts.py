"""The prompt strategy: rows of the host's SFT tokenisation become (prompt, human answer) pairs, token for token.

The answer is a trained assistant turn, the prompt all that stands before it, generation header included. So the prompt
that the opponent answers is the one SFT trains on, and the answer keeps the end-of-turn token that SFT trains.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from axolotl_spin.data.row_cache import map_rows
from axolotl_spin.data.turns import IGNORED, NO_MARKS, Marks, UnclearTurnsError, answer_spans

Turns = Literal["last", "all"]


class Prompt(NamedTuple):
    """A prompt and the human answer to it, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]


def prompts_of_row(
    input_ids: Sequence[int], labels: Sequence[int], turns: Turns = "last", marks: Marks = NO_MARKS
) -> list[Prompt]:
    """Splits one SFT row at its trained turns.

    Args:
        input_ids: The row's tokens.
        labels: As many labels, -100 where SFT does not train.
        turns: `last` takes the last trained turn as the answer; `all` makes a pair of each.
        marks: By what turns are told apart; without any, each run of labels is one.

    Returns:
        The row's pairs, in order; none where nothing is labelled.

    Raises:
        UnclearTurnsError: The tokens do not tell which labels belong to one turn.
        ValueError: A turn starts at token 0, so there is no prompt before it.
    """
    spans = answer_spans(input_ids, labels, marks)
    if turns == "last":
        spans = spans[-1:]
    if spans and spans[0][0] == 0:
        raise ValueError("the labels start at the row's first token, so there is no prompt before the answer")
    return [Prompt(list(input_ids[:start]), list(input_ids[start:end])) for start, end in spans]


class MaskedTokensError(ValueError):
    """A row's `attention_mask` leaves out tokens within the conversation, which pairs would have."""


def left_padding(labels: Sequence[int], mask: Sequence[int] | None) -> int:
    """Returns how many tokens at the start of a row take no part: rows that come tokenised may be padded there.

    Args:
        labels: Of the row, -100 where SFT does not train.
        mask: Its `attention_mask`, or None where there is none.

    Raises:
        MaskedTokensError: Another token takes no part, and the row has labels behind it.
    """
    if mask is None or all(mask):
        return 0
    labelled = [place for place, label in enumerate(labels) if label != IGNORED]
    first, last = (labelled[0], labelled[-1]) if labelled else (len(labels), -1)
    start = next((place for place, kept in enumerate(mask) if kept or place == first), len(mask))
    gap = next((place for place in range(start, last + 1) if not mask[place]), None)
    if gap is not None:
        raise MaskedTokensError(
            f"its `attention_mask` is 0 at token {gap}, before the last label, and pairs are of whole conversations: "
            "leave such tokens out of its `input_ids` and `labels`"
        )
    return start


def prompt_dataset(dataset: Any, *, turns: Turns, max_prompts: int | None = None, marks: Marks = NO_MARKS) -> Any:
    """Turns the host's prepared SFT dataset into prompts.

    Args:
        dataset: A `datasets.Dataset` with `input_ids` and `labels`, and `attention_mask` where there is one.
        turns: See `prompts_of_row`.
        max_prompts: Keep only the first so many pairs.
        marks: See `prompts_of_row`.

    Returns:
        A `datasets.Dataset` with `prompt_ids`, `chosen_ids` (list<int32>) and `row` (index of the source row).

    Raises:
        ValueError: The dataset is empty, was not tokenised, or has a row without a prompt or with holes in its mask.
    """
    missing = {"input_ids", "labels"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"the prepared dataset has no {' and no '.join(sorted(missing))} column (it has {dataset.column_names}); "
            "`datasets:` needs a `type` of supervised fine-tuning"
        )
    if len(dataset) == 0:
        raise ValueError("the prepared dataset is empty: check `datasets:`, `sequence_len` and `val_set_size`")
    if turns == "last" and max_prompts is not None:
        dataset = _first_with_answers(dataset, max_prompts, marks)
    masked = "attention_mask" in dataset.column_names

    def split(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "row": []}
        masks = batch["attention_mask"] if masked else [None] * len(rows)
        for row, input_ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], masks, strict=True):
            try:
                start = left_padding(labels, mask)
                prompts = prompts_of_row(input_ids[start:], labels[start:], turns, marks)
            except (UnclearTurnsError, MaskedTokensError) as error:
                raise ValueError(f"row {row} of the prepared dataset: {error}") from None
            except ValueError as error:
                raise ValueError(
                    f"row {row} of the prepared dataset: {error}. SPIN needs a prompt to answer: use a dataset `type` "
                    "with prompts (chat_template, alpaca, input_output, ...) and `train_on_inputs: false`"
                ) from None
            for prompt in prompts:
                columns["prompt_ids"].append(prompt.prompt_ids)
                columns["chosen_ids"].append(prompt.chosen_ids)
                columns["row"].append(row)
        return columns

    prompts = map_rows(
        dataset,
        split,
        code=[sys.modules[__name__], sys.modules[Marks.__module__]],
        settings=[turns, marks],
        features=prompt_features(),
        desc="Splitting rows into prompts and human answers",
    )
    if len(prompts) == 0:
        raise ValueError(
            "no row of the prepared dataset has a labelled answer, so there is nothing to train on: check "
            "`roles_to_train`, `train_on_inputs` and the chat template"
        )
    return prompts.select(range(min(len(prompts), max_prompts or len(prompts))))


def prompt_features() -> Any:
    """Returns the columns of prompts (`datasets.Features`)."""
    from datasets import Features, List, Value

    return Features({"prompt_ids": List(Value("int32")), "chosen_ids": List(Value("int32")), "row": Value("int64")})


def token_counts(dataset: Any, column: str) -> np.ndarray:
    """Returns the number of ids in each row of a column, (rows,) int64, without making Python objects of them.

    Args:
        dataset: `datasets.Dataset`.
        column: One with lists of ids.
    """
    import pyarrow.compute as pc

    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000)
    counts = [pc.list_value_length(batch[column]).to_numpy() for batch in batches]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


def _first_with_answers(dataset: Any, count: int, marks: Marks) -> Any:
    """Cuts a dataset after its first `count` rows that have an answer, so that the rest need not be read."""
    found = 0
    for index, row in enumerate(dataset.select_columns(["input_ids", "labels"])):
        try:
            found += bool(answer_spans(row["input_ids"], row["labels"], marks))
        except UnclearTurnsError:
            found += 1  # which is refused when it is split
        if found == count:
            return dataset.select(range(index + 1))
    return dataset
