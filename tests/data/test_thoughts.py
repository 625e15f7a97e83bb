"""Models that think: what stands in prompts and in answers, and that it is said where thoughts alone tell answers apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import numpy as np
import pyarrow as pa
import pytest
import tiny
from rows import PAIR, ids_file, jsonl, load
from warm import Warm

from axolotl_spin.data.thoughts import ThinkBlock, think_block, told_apart

TOKENIZER = tiny.tokenizer([*tiny.WORDS, "<think>", "</think>"])
# drops the thoughts of earlier turns, and opens the last answer with a block, an empty one where it has no thoughts
TOKENIZER.chat_template = (
    "{% for m in messages %}{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in said %}{% set thought = said.split(' </think>')[0].replace('<think> ', '') %}"
    "{% set said = said.split('</think> ')[1] %}{% endif %}"
    "{{ '<|' + m.role + '|> ' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think> ' + (thought + ' ' if thought else '') + '</think> ' }}{% endif %}{{ said + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think> </think> ' }}{% endif %}{% endif %}"
)
OPENS, ENDS = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])
BEFORE = "<|user|> w1 <|end|> <|assistant|> w2 <|end|> <|user|> w3 <|end|> <|assistant|> <think>"
PLAIN, THOUGHTFUL = "w4 w5", "<think> w7 w8 </think> w4 w5"
# prompt and answer
EXPECTED = {PLAIN: (f"{BEFORE} </think>", "w4 w5 <|end|>"), THOUGHTFUL: (BEFORE, "w7 w8 </think> w4 w5 <|end|>")}


def talk(answer: str) -> dict[str, Any]:
    turns = ["w1", "<think> w9 </think> w2", "w3", answer]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def model_that_knows_thoughts(folder: Path) -> None:
    host.config(folder)
    tiny.model(len(TOKENIZER)).save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("answers", [[PLAIN] * 2, [PLAIN, THOUGHTFUL], [THOUGHTFUL] * 2], ids=["none", "some", "all"])
def test_own_answers_start_where_the_human_ones_do(tmp_path: Path, answers: list[str], thinking: bool | None) -> None:
    """A block is the prompt's as far as every answer opens with it: an empty one whole, of another its mark."""
    model_that_knows_thoughts(tmp_path)
    data = {**jsonl(tmp_path / "t.jsonl", [talk(answer) for answer in answers]), "type": "chat_template"}
    asked = {} if thinking is None else {"chat_template_kwargs": {"enable_thinking": thinking}}
    run, _, _ = load(tmp_path, datasets=[data], **asked)
    found = [TOKENIZER.batch_decode(run.prompts[name][:]) for name in ("prompt_ids", "chosen_ids")]
    assert list(zip(*found, strict=True)) == [EXPECTED[answer] for answer in answers]
    asked = TOKENIZER.apply_chat_template(
        talk(PLAIN)["messages"][:-1], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert asked.strip() == f"{BEFORE} </think>"  # as one who asks the trained model not to think
    assert run.thoughts is not None
    assert (run.thoughts.opens, run.thoughts.ends) == ((OPENS,), (ENDS,))


def test_an_answer_in_parts_starts_where_a_whole_one_does(tmp_path: Path) -> None:
    model_that_knows_thoughts(tmp_path)
    parts = [{"begin_offset": 0, "end_offset": 1, "train": False}, {"begin_offset": 3, "end_offset": 4, "train": True}]
    plain, thoughtful = talk(PLAIN), talk(THOUGHTFUL)
    plain["messages"][-1]["train_detail"] = parts
    data = {**jsonl(tmp_path / "t.jsonl", [plain, thoughtful]), "type": "chat_template"}
    run, _, _ = load(tmp_path, datasets=[{**data, "message_field_training_detail": "train_detail"}])
    found = [TOKENIZER.batch_decode(run.prompts[name][:]) for name in ("prompt_ids", "chosen_ids")]
    assert list(zip(*found, strict=True)) == [EXPECTED[PLAIN], EXPECTED[THOUGHTFUL]]


def block(template: str, words: list[str] = tiny.WORDS, **entry: str) -> ThinkBlock | None:
    tokenizer = tiny.tokenizer(words)
    tokenizer.chat_template = template
    data = {"type": "chat_template", "chat_template": "tokenizer_default", **entry}
    return think_block(SimpleNamespace(datasets=[data], chat_template_kwargs=None, chat_template=None), tokenizer)


def test_marks_come_from_the_template_by_the_key_of_the_data() -> None:
    thoughts = "{% if m.why %}w1 <w2>{{ m.why }} <w3> {% endif %}"
    template = "{% for m in messages %}<|{{ m.role }}|>" + thoughts + "{{ m.content }}{% endfor %}"
    words = [*tiny.WORDS, "<w2>", "<w3>"]
    ids = tiny.tokenizer(words).convert_tokens_to_ids(["<w2>", "<w3>"])
    assert block(template, words, template_thinking_key="why") == ThinkBlock((ids[0],), (ids[1],))
    assert block(template, words) is None
    assert block(template.replace("<w3>", "<w2>"), words, template_thinking_key="why") is None  # harmony's open alike
    assert block(tiny.TEMPLATE) is None
    assert block(tiny.TEMPLATE, [*tiny.WORDS, "<think>", "</think>"]) == ThinkBlock((OPENS,), (ENDS,))


@pytest.mark.parametrize(
    ("special", "opens"), [(["<|channel>", "<channel|>"], "<|channel>thought"), (["[THINK]", "[/THINK]"], "[THINK]")]
)
def test_marks_that_a_template_does_not_show(special: list[str], opens: str) -> None:
    """Gemma 4 sets a channel's name behind the mark, also in an empty block; the rest is Magistral's."""
    tokenizer = tiny.tokenizer([*tiny.WORDS, "thought"])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    found = think_block(SimpleNamespace(datasets=[]), tokenizer)
    assert found is not None
    encode = partial(tokenizer.encode, add_special_tokens=False)
    assert found.opened_by(encode(f"{opens} w1 {special[1]} w2"))
    assert not found.opened_by(encode(f"{opens} {special[1]} w2")) and not found.opened_by(encode("w1 w2"))


@pytest.mark.parametrize(
    ("ids", "thinks"),
    [
        ([1, 5, 2, 6], True),
        ([9, 1, 9, 5], True),  # behind a blank, and cut
        ([1, 2, 5], False),  # nothing in it
        ([1, 9, 2, 5], False),
        ([1], False),
        ([], False),
        ([5, 1, 5, 2], False),
    ],
)
def test_an_answer_thinks_where_it_opens_with_something_in_the_block(ids: list[int], thinks: bool) -> None:
    assert ThinkBlock((1,), (2,), frozenset({9})).opened_by(ids) is thinks


def test_told_apart_by_thoughts_alone() -> None:
    marks = ThinkBlock((1,), (2,))
    plain, thoughtful = pa.array([[5]] * 4), pa.array([[1, 5, 2, 6]] * 3 + [[5]])
    assert "75% of 4 own answers open with thoughts, and 0% of the human's" in told_apart(marks, plain, thoughtful)
    assert told_apart(marks, thoughtful, thoughtful) == told_apart(marks, thoughtful, plain) == ""
    assert told_apart(None, plain, thoughtful) == ""


def test_more_tokens_than_one_column_takes() -> None:
    """Offsets of a list column are of 32 bits: two halves of 1.2e9 tokens each do not become one. Nothing is computed of
    most of them, which are zeros that no memory holds yet."""
    half = pa.ListArray.from_arrays(
        pa.array([0, 1_200_000_000], pa.int32()), pa.array(np.zeros(1_200_000_000, np.int8))
    )
    answers = pa.chunked_array([half, half])
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        answers.combine_chunks()
    assert ThinkBlock((0,), (2,)).share(answers) == 1


@pytest.mark.host
@pytest.mark.once
def test_a_run_and_its_plan_say_so(tmp_path: Path, warm: Warm) -> None:
    """The human answers of a template without blocks, and a model that thinks all the same."""
    from axolotl_spin.commands.plan.estimate import Given, plan_run

    tokenizer = tiny.tokenizer([*tiny.WORDS, "<think>", "</think>"])
    tiny.model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.conversations(tmp_path / "data.jsonl", 8)
    pairs = ids_file(tmp_path / "given" / "pairs.parquet", [{**PAIR, "rejected_ids": [OPENS, 9, ENDS, 11, 6]}] * 8)
    settings = host.config(tmp_path, spin={"iterations": 1, "initial_pairs": str(pairs)})
    run = host.train(settings, by=warm)
    line = "100% of 8 own answers open with thoughts, and 0% of the human's"
    assert run.output.count(line) == 1
    _, figures = plan_run(str(host.write(settings)), Given())
    assert [line in entry["text"] for entry in figures["advice"] if entry["key"] == "chat_template"] == [True]
