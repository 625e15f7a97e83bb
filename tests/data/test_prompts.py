"""Rows of SFT tokenisation to pairs, on literal rows."""

from __future__ import annotations

import pytest
from datasets import Dataset

from axolotl_spin.data.prompts import prompt_dataset, prompts_of_row
from axolotl_spin.data.turns import labelled_spans
from axolotl_spin.uclaml import check_row

X = -100


def test_spans() -> None:
    assert labelled_spans([X, 1, 2, X, X, 3]) == [(1, 3), (5, 6)]
    assert labelled_spans([1, X]) == [(0, 1)]
    assert labelled_spans([X, X]) == []


def test_last_turn_keeps_all_before_it_as_prompt() -> None:
    """Two turns; what stands unlabelled behind the last answer (a newline of the template, say) is dropped."""
    ids, labels = [1, 2, 3, 4, 5, 6, 7], [X, 2, 3, X, 5, 6, X]
    assert prompts_of_row(ids, labels) == [([1, 2, 3, 4], [5, 6])]
    assert prompts_of_row(ids, labels, "all") == [([1], [2, 3]), ([1, 2, 3, 4], [5, 6])]
    assert prompts_of_row(ids, [X] * 7) == []


def test_answer_without_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        prompts_of_row([1, 2], [1, 2])
    assert prompts_of_row([1, 2, 3], [1, X, 3]) == [([1, 2], [3])]
    with pytest.raises(ValueError, match="no prompt"):
        prompts_of_row([1, 2, 3], [1, X, 3], "all")


def rows(*labels: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": [list(range(10, 10 + len(row))) for row in labels], "labels": list(labels)})


def test_dataset_of_prompts() -> None:
    """Rows without a label are left out, and `row` still points at the source."""
    made = prompt_dataset(rows([X, 1], [X, X], [X, 1, X, 2]), turns="all")
    assert made["row"][:] == [0, 2, 2]
    assert made["prompt_ids"][:] == [[10], [10], [10, 11, 12]]
    assert made["chosen_ids"][:] == [[11], [11], [13]]
    assert prompt_dataset(rows([X, X], [X, 1], [X, 2], [X, 3]), turns="last", max_prompts=2)["row"][:] == [1, 2]
    assert len(prompt_dataset(rows([X, 1, X, 2], [X, 1]), turns="all", max_prompts=1)) == 1


def test_padding_on_the_left_is_no_prompt() -> None:
    padded = {"input_ids": [[0, 0, 5, 6, 7], [5, 6, 7, 0, 0]], "labels": [[X, X, X, 6, X], [X, 6, X, X, X]]}
    masks = {"attention_mask": [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]}
    made = prompt_dataset(Dataset.from_dict({**padded, **masks}), turns="last")
    assert (made["prompt_ids"][:], made["chosen_ids"][:], made["row"][:]) == ([[5], [5]], [[6], [6]], [0, 1])


@pytest.mark.parametrize(("mask", "gap"), [([0, 1, 0, 1], 2), ([0, 0, 0, 1], 2), ([1, 1, 1, 0], 3)])
def test_holes_in_the_mask_are_refused(mask: list[int], gap: int) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "attention_mask": [mask], "labels": [[X, X, 7, 8]]})
    with pytest.raises(ValueError, match=f"row 0 .*`attention_mask` is 0 at token {gap}, before the last label"):
        prompt_dataset(dataset, turns="last")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": ["a"]}), "no input_ids and no labels column"),
        (rows().add_column("x", []), "empty"),
        (rows([X, X]), "roles_to_train"),
        (rows([X, 1], [1, 2]), "row 1 .*train_on_inputs"),
    ],
)
def test_useless_datasets_are_refused(dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_dataset(dataset, turns="last")


def test_authors_rows_are_checked() -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    check_row({"real": [question, answer], "generated": []})
    check_row({"real": [question, answer], "generated": [question, {"role": "assistant", "content": "b"}]})
    with pytest.raises(ValueError, match="role assistant"):
        check_row({"real": [question]})
    with pytest.raises(ValueError, match="another prompt"):
        check_row({"real": [question, answer], "generated": [{**question, "content": "other"}, answer]})
