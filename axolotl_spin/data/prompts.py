"""The prompt strategy: rows of the host's SFT tokenisation become (prompt, human answer) pairs, token for token.

The answer is a labelled span, the prompt all that stands before it, generation header included. So the prompt that the
opponent answers is the one SFT trains on, and the answer keeps the end-of-turn token that SFT trains.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from axolotl_spin.data.row_cache import map_rows

IGNORED = -100  # the label of tokens that SFT does not train (torch.nn.CrossEntropyLoss)

Turns = Literal["last", "all"]


class Prompt(NamedTuple):
    """A prompt and the human answer to it, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]


def labelled_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the runs of labelled tokens as (start, end) with `end` exclusive, in order."""
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for position, label in enumerate(labels):
        if label != IGNORED and start is None:
            start = position
        elif label == IGNORED and start is not None:
            spans.append((start, position))
            start = None
    if start is not None:
        spans.append((start, len(labels)))
    return spans


def prompts_of_row(input_ids: Sequence[int], labels: Sequence[int], turns: Turns = "last") -> list[Prompt]:
    """Splits one SFT row at its labelled spans.

    Args:
        input_ids: The row's tokens.
        labels: As many labels, -100 where SFT does not train.
        turns: `last` takes the last labelled span as the answer; `all` makes a pair of each.

    Returns:
        The row's pairs, in order; none where nothing is labelled.

    Raises:
        ValueError: A span starts at token 0, so there is no prompt before it.
    """
    spans = labelled_spans(labels)
    if turns == "last":
        spans = spans[-1:]
    if spans and spans[0][0] == 0:
        raise ValueError("the labels start at the row's first token, so there is no prompt before the answer")
    return [Prompt(list(input_ids[:start]), list(input_ids[start:end])) for start, end in spans]


def prompt_dataset(dataset: Any, *, turns: Turns, max_prompts: int | None = None) -> Any:
    """Turns the host's prepared SFT dataset into prompts.

    Args:
        dataset: A `datasets.Dataset` with `input_ids` and `labels`.
        turns: See `prompts_of_row`.
        max_prompts: Keep only the first so many pairs.

    Returns:
        A `datasets.Dataset` with `prompt_ids`, `chosen_ids` (list<int32>) and `row` (index of the source row).

    Raises:
        ValueError: The dataset is empty, was not tokenised, or has a row without a prompt.
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
        dataset = _first_with_labels(dataset, max_prompts)

    def split(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "row": []}
        for row, input_ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
            try:
                prompts = prompts_of_row(input_ids, labels, turns)
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
        code=[sys.modules[__name__]],
        settings=[turns],
        features=prompt_features(),
        desc="Splitting rows into prompts and human answers",
    )
    if len(prompts) == 0:
        raise ValueError(
            "no row of the prepared dataset has a labelled token, so there is no human answer to train on: check "
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


def _first_with_labels(dataset: Any, count: int) -> Any:
    """Cuts a dataset after its first `count` rows that have a label, so that the rest need not be read."""
    found = 0
    for index, labels in enumerate(dataset["labels"]):
        found += any(label != IGNORED for label in labels)
        if found == count:
            return dataset.select(range(index + 1))
    return dataset


def stop_token_ids(
    chosen_ids: Iterable[Sequence[int]], *, eos: Iterable[int], special: Iterable[int]
) -> tuple[int, ...]:
    """Returns the tokens that end an answer.

    They are the model's and tokenizer's end-of-sequence tokens, and the special token with which most human answers
    end (the template's end-of-turn token): a model trained on it must be able to stop with it.

    Args:
        chosen_ids: Human answers, or a sample of them.
        eos: End-of-sequence ids of the model's generation config and the tokenizer.
        special: The tokenizer's special and added token ids.
    """
    stop = set(eos)
    last = Counter(ids[-1] for ids in chosen_ids if len(ids))
    if last:
        token, count = last.most_common(1)[0]
        if token in set(special) and 2 * count > sum(last.values()):
            stop.add(token)
    return tuple(sorted(stop))
