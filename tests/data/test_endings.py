"""With which tokens answers end, and that both of a pair end alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import axolotl.cli  # noqa: F401 (sets up logging, so before a test listens)
import host
import numpy as np
import pyarrow as pa
import pytest
import tiny
from datasets import Dataset
from rows import jsonl, load

from axolotl_spin.data.endings import Endings, count_endings, end_alike, stop_token_ids

IDS = pa.list_(pa.int32())


def test_both_end_alike_by_hand() -> None:
    """The end 9 is taken off where the human has none; what was cut stays as it is; an answer may be empty then."""
    human = pa.array([[5, 9], [5], [5], [5, 6], [5]], type=IDS)
    own = pa.array([[6, 9], [6, 9], [6, 6], [9], []], type=IDS)
    assert end_alike(human, own, [2, 9]).to_pylist() == [[6, 9], [6], [6, 6], [], []]
    assert end_alike(human, own, []).to_pylist() == own.to_pylist()
    assert end_alike(human[1:3], own[1:3], [9]).to_pylist() == [[6], [6, 6]]


def test_an_answer_stays_as_drawn_where_the_humans_is_cut_at_the_same_limit() -> None:
    """At three tokens the human's is cut as the opponent's are; one that is shorter or longer has been left open."""
    human = pa.array([[5, 5, 5], [5, 5], [5, 5, 5, 5], [5, 5, 5]], type=IDS)
    own = pa.array([[6, 9], [6, 9], [6, 9], [6, 6, 6]], type=IDS)
    assert end_alike(human, own, [9], limit=3).to_pylist() == [[6, 9], [6], [6], [6, 6, 6]]
    assert end_alike(human, own, [9]).to_pylist() == [[6], [6], [6], [6, 6, 6]]


def prompts(answers: list[list[int]], prompt: int = 1) -> Dataset:
    return Dataset.from_dict(
        {"prompt_ids": [[4] * prompt] * len(answers), "chosen_ids": answers, "row": list(range(len(answers)))}
    )


def stops(answers: list[list[int]], special: list[int], sequence_len: int = 99) -> tuple[int, ...]:
    return stop_token_ids(prompts(answers), ends=[2], special=special, sequence_len=sequence_len)


def test_stop_tokens() -> None:
    """Every special token that ends a noticeable share of the answers; an ordinary last token does not stop one."""
    assert stops([[5, 9]] * 7 + [[5, 8]] * 3, [8, 9]) == (2, 8, 9)
    assert stops([[5, 9]] * 7 + [[5, 8]] * 3, [9]) == (2, 9)
    assert stops([[5, 9]] * 990 + [[5, 8]] * 10, [8, 9]) == (2, 8, 9)
    assert stops([[5, 9]] * 995 + [[5, 8]] * 5, [8, 9]) == (2, 9)
    assert stops([[5]], []) == (2,)


def test_a_mark_inside_answers_stops_none() -> None:
    """8 stands inside answers more often than at their end; and where an answer is cut, any token may be its last."""
    assert stops([[5, 8, 5, 8, 5, 9]] * 9 + [[5, 8]] * 3, [8, 9]) == (2, 9)
    assert stops([[5, 9]] * 9 + [[5, 5, 8]], [8, 9], sequence_len=4) == (2, 9)


def test_a_claimed_end_that_stands_inside_answers_stops_none() -> None:
    """`eot_tokens` says that 2 is an end: it is where it ends most answers that have it, and where none has it."""

    def found(answers: list[list[int]], claimed: list[int]) -> tuple[int, ...]:
        return stop_token_ids(prompts(answers), ends=[2, 9], special=[2, 9], sequence_len=99, claimed=claimed)

    assert found([[5, 2, 5, 9]] * 4, [2]) == (9,)
    assert found([[5, 2, 5, 9]] * 4, []) == found([[5, 2]] * 4, [2]) == found([[5, 9]] * 4, [2]) == (2, 9)
    assert found([[5, 2, 5, 9]] * 2 + [[5, 2]] * 3, [2]) == (2, 9)


def test_endings_are_counted() -> None:
    """Of six answers, two end, one is cut at five tokens, and behind the others 8 stands, or nothing special near by. Of
    the eight rows two have no answer."""
    answers = [[5, 9], [5, 9], [5, 5, 5, 5], [5], [5], [5]]
    tails: list[list[int]] = [[], [], [], [7, 7, 7, 8], [7, 7, 7, 7, 2], [7]]
    ids = [[4, *answer, *tail] for answer, tail in zip(answers, tails, strict=True)]
    labels = [[-100, *answer, *[-100] * len(tail)] for answer, tail in zip(answers, tails, strict=True)]
    masks = [[1] * len(row) for row in ids]
    ids[3], labels[3], masks[3] = [0, 0, *ids[3]], [-100, -100, *labels[3]], [0, 0, *masks[3]]
    none = {"input_ids": [[4]] * 2, "labels": [[-100]] * 2, "attention_mask": [[1]] * 2}
    found = {"input_ids": ids, "labels": labels, "attention_mask": masks}
    source = Dataset.from_dict({name: [*found[name], *none[name]] for name in found})
    count = partial(count_endings, stops=[2, 9], special={2, 8, 9}, sequence_len=5)
    expected = Endings(answers=6, without=4, cut=1, behind=8, rows=8, unanswered=2)
    assert count(prompts(answers), source) == count(prompts(answers), source, first=7) == expected
    some = count(
        prompts(answers).select([0, 2]), source, first=2
    )  # rows behind the last that was asked for are not read
    assert (some.rows, some.unanswered) == (3, 1)


# -- what the host prepares -------------------------------------------------------------------------------------------

# a turn ends with a token that is special, but not the tokenizer's eos
OTHER_END = tiny.TEMPLATE.replace("<|end|>", "<s>")


def talk(folder: Path, rows: int = 8, words: int = 3, **entry: Any) -> list[dict[str, Any]]:
    made = []
    for i in range(rows):
        answer = " ".join(f"w{(i + j) % 40}" for j in range(words))
        made.append({"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": answer}]})
    return [{**jsonl(folder / f"{words}.jsonl", made), "type": "chat_template", **entry}]


OTHER = {"chat_template": "jinja", "chat_template_jinja": OTHER_END}
CUT = {"sequence_len": 20, "excess_length_strategy": "truncate"}


@pytest.mark.parametrize(
    ("changes", "words", "says"),
    [
        (OTHER, 3, r"8 of 8 human answers have no end .*`<s>` stands behind answers.*`eot_tokens: \['<s>'\]`"),
        ({**OTHER, "eot_tokens": ["<|end|>"]}, 3, r"`eot_tokens: \['<\|end\|>', '<s>'\]`"),
        (
            CUT,
            30,
            r"8 are cut by `sequence_len: 20`.*`excess_length_strategy: drop`; then have .* by `axolotl preprocess`",
        ),
    ],
)
def test_data_without_any_end_are_refused(tmp_path: Path, changes: dict[str, Any], words: int, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        load(tmp_path, datasets=talk(tmp_path, words=words), **changes)
    assert "`train_on_eos: none` in each entry" in str(refused.value)


def test_eot_tokens_mend_it(tmp_path: Path) -> None:
    run, _, _ = load(tmp_path, datasets=talk(tmp_path), eot_tokens=["<s>"], **OTHER)
    assert (run.endings.without, run.stops) == (0, (2, 6))


def test_ends_that_are_meant_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = talk(tmp_path, train_on_eos="none")
    run, _, _ = load(tmp_path, datasets=data)
    assert (run.endings.answers, run.endings.without, run.endings.cut) == (8, 8, 0)
    assert "8 of 8 human answers have no end token" in caplog.text and "`train_on_eos: turn` changes" in caplog.text


def test_some_without_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve rows are cut at the limit, eight are whole, and three have an empty answer."""
    data = [*talk(tmp_path), *talk(tmp_path, rows=12, words=30), *talk(tmp_path, rows=3, words=0)]
    run, _, _ = load(tmp_path, datasets=data, **CUT)
    assert (run.endings.answers, run.endings.without, run.endings.cut) == (20, 12, 12)
    assert "12 of 20 human answers have no end" in caplog.text and "raise it, or leave them out" in caplog.text
    assert "3 of 23 rows have no trained answer" in caplog.text


def test_the_models_generation_config_names_ends(tmp_path: Path) -> None:
    host.config(tmp_path)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [6, 3]}))
    run, _, _ = load(tmp_path)
    assert run.stops == (3, 6)


def test_lengths_of_numpy_columns() -> None:
    """Ids come as int32 or int64, and in slices."""
    both = pa.array([np.array([5, 9]), np.array([5, 7])], type=pa.list_(pa.int64()))
    assert end_alike(both[1:], both[:1], [9]).to_pylist() == [[5]]
