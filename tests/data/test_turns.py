"""Which labels are an assistant's turn: on literal rows, and on what the host labels under every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host
import pytest
import tiny
from rows import TOKENIZER, jsonl, load

from axolotl_spin.data.turns import Header, Marks, UnclearTurnsError, answer_spans

X = -100
# 1 opens a user's turn, 2 the assistant's, 9 ends a turn, 8 is white space
MARKS = Marks(ends=(9,), special=(1, 2), blanks=(8,), headers=(Header((2,)),))
OPENINGS = (Header((1,)),)
PARTS = Marks(**{**vars(MARKS), "parts": "message_field_training_detail: train_detail", "openings": OPENINGS})
OTHERS = Marks(**{**vars(MARKS), "others": "message_field_training: train", "openings": OPENINGS})


def answers(row: str, marks: Marks = MARKS) -> list[str]:
    """Tokens are digits, a labelled one stands in front of a quotation mark; returns the answers' tokens."""
    ids, labels = [], []
    for sign in row.replace(" ", ""):
        if sign == "'":
            labels[-1] = ids[-1]
        else:
            ids.append(int(sign))
            labels.append(X)
    return ["".join(map(str, ids[start:end])) for start, end in answer_spans(ids, labels, marks)]


def test_the_end_of_anothers_turn_is_no_answer() -> None:
    assert answers("1 3 9' 2 4' 5' 9' 1 3 3 9'") == ["459"]
    assert answers("1 3 9' 2 4' 9' 1 3 9' 2 5' 9'") == ["49", "59"]
    assert answers("1 3 9' 2 9'") == []


def test_an_answer_that_says_nothing_but_its_end() -> None:
    """Without a chat template's header nothing tells a lone run from an answer, so it is one, as the data says."""
    headless = Marks(ends=(9,), blanks=(8,))
    assert answers("1 3 9'", headless) == ["9"]
    assert answers("1 3 9' 8'", headless) == ["9"]
    assert answers("1 3 4' 9'", headless) == ["49"]
    assert answers("1 3 9' 2 4' 9'", headless) == ["49"]  # the end of one of several may be a user's


def test_an_end_behind_white_space_is_the_answers_own() -> None:
    """The host labels an end up to three tokens behind the content; what stands between belongs to the answer."""
    assert answers("1 3 9' 8 2 4' 5' 8 9' 8 1 3 9'") == ["4589"]
    assert answers("1 3 9 2 4' 5' 9 1 3 9'") == ["45"]  # its end is not trained; the other is a user's
    headless = Marks(ends=(9,), blanks=(8,))  # where the host's reach alone tells
    assert answers("1 3' 4' 8 8 8 9'", headless) == ["348889"]
    assert answers("1 3' 4' 8 8 8 8 9'", headless) == ["34"]


def test_a_run_of_several_turns_is_cut_at_their_ends() -> None:
    assert answers("1 3 2 4' 9' 5' 9' 1 3 2 6' 9' 8'") == ["49", "59", "69"]


def test_parts_of_a_turn_are_one_turn() -> None:
    assert answers("1 3 9 2 4' 5 6' 9'") == ["4569"]
    assert answers("1 3 9 2 4' 9' 1 3 9 2 4' 5 6' 9' 1 3 9 2 7' 9'") == ["49", "4569", "79"]
    assert answers("1 3 2 4 5' 6 9'") == ["569"]  # nothing says that the first part is one
    assert answers("1 3 9 2 8 4 5' 6 7 7 7 9' 8 1 3 9", PARTS) == ["84567779"]
    assert answers("1 3 9 2 4 5' 6 8 9 8", PARTS) == ["456"]  # an end that is not trained stays out
    assert answers("1 3 9 2 4 5' 6", PARTS) == ["456"]


def test_parts_whose_turn_cannot_be_told_are_refused() -> None:
    with pytest.raises(UnclearTurnsError, match="message_field_training_detail: train_detail"):
        answers("1 3 9 4' 5 6' 9'", Marks(ends=(9,), parts=PARTS.parts))
    with pytest.raises(UnclearTurnsError, match="eot_tokens"):
        answers("2 4' 5 1 3 2 6'", Marks(headers=MARKS.headers, parts=PARTS.parts))
    for opened in ("1 3 9 5 4' 9'", "1 3 9 2 5 9 4' 9'"):  # a header that is missing, and one of a turn before
        with pytest.raises(UnclearTurnsError, match="header of an assistant's turn is not found"):
            answers(opened, PARTS)
    with pytest.raises(UnclearTurnsError, match="header of an assistant's turn is not found"):
        answers("1 3 9 4 5' 9'", Marks(ends=(9,), parts=PARTS.parts))  # the first part would be the prompt's


def test_rows_of_no_template_beside_those_of_one() -> None:
    """Such rows of a mixture have no parts and no other roles: their labels are as the data says."""
    for marks in (PARTS, OTHERS):
        assert answers("3 4 5' 6' 9'", marks) == ["569"]
        assert answers("3 4' 5 6' 9'", marks) == ["4", "69"]


# an empty think block: 6 opens it and 7 ends it, in the last answer alone
BLOCK = Marks(**{**vars(PARTS), "headers": (Header((2,), (), (6, 8, 7)),)})


def test_parts_begin_behind_what_the_template_sets_before_an_answer() -> None:
    assert answers("1 3 9 2 4 5' 9' 1 3 9 2 6 8 7 4 5' 9'", BLOCK) == ["459", "459"]
    assert answers("1 3 9 2 6 3 8 7 4 5' 9'", BLOCK) == ["387459"]  # thoughts: only what opens them is the same
    assert answers("1 3 9 2 6 8' 7' 4' 9'", BLOCK) == ["8749"]  # what is trained is never the prompt's


def test_turns_of_other_roles_are_no_answers() -> None:
    assert answers("1 3' 3' 9' 2 4' 9' 1 3' 9'", OTHERS) == ["49"]
    assert answers("3 4' 9' 3 5' 9'", OTHERS) == ["49", "59"]  # not a row of the template
    assert answers("1 3' 9 1 4' 9' 2 5' 9'", OTHERS) == ["59"]
    assert answers("2 5' 1 3' 2 4' 9'", Marks(**{**vars(OTHERS), "special": ()})) == ["5", "49"]  # no ends between
    assert answers("1 3 9 1 4' 9'", OTHERS) == []
    with pytest.raises(UnclearTurnsError, match=r"roles_to_train: \[assistant\]"):
        answers("1 3' 9' 2 4' 9'", Marks(ends=(9,), others=OTHERS.others))


@pytest.mark.parametrize(
    "row",
    [
        "1 3' 9' 2 4' 9' 6 5 9 7' 9'",  # behind a tool's words, which no header opens
        "1 3 9 5 6 4' 9' 1 3 9 2 4' 9'",  # a header that thoughts have changed
        "5' 9' 1 3' 9' 2 4' 9'",
    ],
)
def test_turns_that_nothing_known_opens_are_refused(row: str) -> None:
    with pytest.raises(
        UnclearTurnsError, match=r"does not tell whose turn is trained there: train the assistant's alone"
    ):
        answers(row, OTHERS)


# harmony: 7 closes a message, which `eot_tokens` calls an end, 9 the turn; each message opens with 1 or 2 and its channel
HARMONY = Marks(ends=(7, 9), claimed=(7,), special=(1, 2), blanks=(8,), headers=(Header((2, 3)),))


def test_a_message_that_closes_within_a_turn_does_not_end_it() -> None:
    assert answers("1 4 7' 2 3 5 6' 4' 7' 2' 3' 6' 5' 9'", HARMONY) == ["64723659"]
    assert answers("1 4 7' 2 3 5 6' 7' 8' 2' 3' 6' 7' 2' 3' 5'", HARMONY) == ["678236 7235".replace(" ", "")]
    assert answers("1 4 7' 2 3 6 5' 7' 1 4 7' 2 3 5 6' 7' 2' 3' 4' 9'", HARMONY) == ["57", "672349"]
    sure = Marks(**{**vars(HARMONY), "claimed": ()})  # the model's own end is one wherever it stands
    assert answers("1 4 7' 2 3 5 6' 7' 2' 3' 4' 9'", sure) == ["67", "2349"]
    # without a header behind it, or with itself as the run's last end, it ends turns
    assert answers("1 4 2 3 5' 7' 6' 7' 4' 9'", HARMONY) == ["57", "67", "49"]
    assert answers("1 4 2 3 5' 7' 2' 3' 6' 7'", HARMONY) == ["57", "2367"]


# -- what the host labels ---------------------------------------------------------------------------------------------

END_APART = tiny.TEMPLATE.replace("' <|end|> '", "' w0 <|end|> '")  # a token stands before each end


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def turns(folder: Path, rows: list[list[dict]], which: str, template: str | None = None, **entry: Any) -> list[str]:
    """Returns the answers that a run takes, in alphabetical order; each prompt must end where an answer starts."""
    folder.mkdir(exist_ok=True)
    data = {**jsonl(folder / "rows.jsonl", [{"messages": row} for row in rows]), "type": "chat_template", **entry}
    changes: dict[str, Any] = {"chat_template_jinja": template, "chat_template": "jinja"} if template else {}
    spin = {"iterations": 1, "turns": which}
    run, _, _ = load(folder, datasets=[data], sequence_len=128, spin=spin, **changes)
    assert all(prompt.endswith("<|assistant|>") for prompt in TOKENIZER.batch_decode(run.prompts["prompt_ids"][:]))
    return sorted(TOKENIZER.batch_decode(run.prompts["chosen_ids"][:]))


TALK = [say("user", "w1"), say("assistant", "w2 w3"), say("user", "w4"), say("assistant", "w5")]
WITH_THANKS = [*TALK[:2], say("user", "w6 w7")]


@pytest.mark.parametrize(
    ("option", "end", "last"),
    [("all", " <|end|>", " <|end|>"), ("turn", " <|end|>", " <|end|>"), ("last", "", " <|end|>"), ("none", "", "")],
)
def test_each_trained_turn_is_an_answer_whatever_ends_are_trained(
    tmp_path: Path, option: str, end: str, last: str
) -> None:
    """A conversation that ends with the user has an answer like any other."""
    found = turns(tmp_path, [TALK, WITH_THANKS], "all", train_on_eos=option)
    assert found == sorted([f"w2 w3{end}", f"w5{last}", f"w2 w3{last}"])


def test_the_last_trained_turn(tmp_path: Path) -> None:
    assert turns(tmp_path, [TALK, WITH_THANKS], "last", train_on_eos="all") == ["w2 w3 <|end|>", "w5 <|end|>"]


def test_an_end_apart_from_its_turn(tmp_path: Path) -> None:
    found = turns(tmp_path, [TALK, WITH_THANKS], "all", END_APART, train_on_eos="all")
    assert found == ["w2 w3 w0 <|end|>", "w2 w3 w0 <|end|>", "w5 w0 <|end|>"]


MESSAGES = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|> ' + m['content'] + ' <s> ' }}{% else %}"
    "{% if m['thinking'] %}{{ '<|assistant|> w38 ' + m['thinking'] + ' <s> ' }}{% endif %}"
    "{{ '<|assistant|> w39 ' + m['content'] + (' <|end|> ' if loop.last else ' <s> ') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@pytest.mark.parametrize("thinks", [True, False])
def test_an_end_that_eot_tokens_names_may_close_thoughts(tmp_path: Path, thinks: bool) -> None:
    """`<s>` stands for harmony's `<|end|>`, and the model's own end for its `<|return|>`. Where no thoughts are, and the
    template ends turns with `<s>` alone, it is an end."""
    template = MESSAGES if thinks else MESSAGES.replace("(' <|end|> ' if loop.last else ' <s> ')", "' <s> '")
    more = {"thinking": "w8 w9"} if thinks else {}
    rows = [[say("user", "w1"), say("assistant", f"w{n} w3", **more)] for n in range(4, 8)]
    data = {**jsonl(tmp_path / "rows.jsonl", [{"messages": row} for row in rows]), "type": "chat_template"}
    data |= (
        {"template_thinking_key": "thinking", "message_property_mappings": {"thinking": "thinking"}} if thinks else {}
    )
    changes = {"chat_template": "jinja", "chat_template_jinja": template, "eot_tokens": ["<s>"], "val_set_size": 0}
    run, _, _ = load(tmp_path, datasets=[data], sequence_len=128, spin={"iterations": 1}, **changes)
    prompts, found = (TOKENIZER.batch_decode(run.prompts[name][:]) for name in ("prompt_ids", "chosen_ids"))
    assert run.thoughts is None
    if thinks:
        assert {prompt.split("<s>")[1] for prompt in prompts} == {" <|assistant|>"}
        assert sorted(found) == [f"w38 w8 w9 <s> <|assistant|> w39 w{n} w3 <|end|>" for n in range(4, 8)]
        assert run.stops == (TOKENIZER.eos_token_id,)
    else:
        assert sorted(found) == [f"w{n} w3 <s>" for n in range(4, 8)]
        assert run.stops == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)


def detail(*parts: tuple[int, int, bool]) -> list[dict[str, Any]]:
    return [{"begin_offset": start, "end_offset": end, "train": train} for start, end, train in parts]


# as words: trained, not, trained; and not, trained, not
SPLIT = detail((0, 2, True), (3, 5, False), (6, 8, True))
MIDDLE = detail((0, 2, False), (3, 5, True), (6, 8, False))


@pytest.mark.parametrize(("option", "end"), [("turn", " <|end|>"), ("none", "")])
def test_a_turn_that_is_trained_in_parts_is_whole(tmp_path: Path, option: str, end: str) -> None:
    odd = [[say("user", "w1"), say("assistant", "w2 w3 w4", train_detail=parts)] for parts in (SPLIT, MIDDLE)]
    keys = {"message_field_training_detail": "train_detail", "train_on_eos": option}
    found = turns(tmp_path, [*odd, [*TALK[:2], *odd[1]]], "all", **keys)
    assert found == sorted([f"w2 w3{end}", *[f"w2 w3 w4{end}"] * 3])


def test_content_in_parts_is_one_turn(tmp_path: Path) -> None:
    """The host reads `train` from parts of a content without any key."""
    parts = [
        {"type": "text", "text": text, "train": train} for text, train in (("w2", True), (" w3", False), (" w4", True))
    ]
    assert turns(tmp_path, [[say("user", "w1"), say("assistant", parts)]] * 2, "all") == ["w2 w3 w4 <|end|>"] * 2


def test_turns_chosen_by_the_data_or_by_role(tmp_path: Path) -> None:
    chosen = [
        say("user", "w1", train=True),
        say("assistant", "w2", train=False),
        say("user", "w3"),
        say("assistant", "w4"),
    ]
    assert turns(tmp_path / "a", [chosen, TALK], "all", message_field_training="train") == [
        "w2 w3 <|end|>", "w4 <|end|>", "w5 <|end|>"
    ]  # fmt: skip
    roles = turns(tmp_path / "b", [TALK, WITH_THANKS], "last", roles_to_train=["user", "assistant"])
    assert roles == ["w2 w3 <|end|>", "w5 <|end|>"]
    # an end that the host does not know is of the next header, but the first has none before it
    keys = {"roles_to_train": ["user", "assistant"], "train_on_eos": "none"}
    assert turns(tmp_path / "c", [TALK], "all", tiny.TEMPLATE.replace("<|end|>", "<s>"), **keys) == ["w2 w3", "w5"]


def test_segments_are_turns(tmp_path: Path) -> None:
    """Without a template the data's own borders hold."""
    segments = [(False, "w1"), (True, "w2 <|end|>"), (False, "w3"), (True, "w4"), (False, "w5"), (True, "w6 <|end|>")]
    row = {"segments": [{"label": label, "text": text} for label, text in segments]}
    data = [{**jsonl(tmp_path / "i.jsonl", [row] * 4), "type": "input_output"}]
    run, _, _ = load(tmp_path, datasets=data, chat_template=None, spin={"iterations": 1, "turns": "all"})
    assert TOKENIZER.batch_decode(run.prompts["chosen_ids"][:3]) == ["w2 <|end|>", "w4", "w6 <|end|>"]


def test_a_mixture_with_rows_of_no_template(tmp_path: Path) -> None:
    """`message_field_training_detail` concerns the conversations alone."""
    parts = [say("user", "w1"), say("assistant", "w2 w3 w4", train_detail=MIDDLE)]
    chat = {**jsonl(tmp_path / "c.jsonl", [{"messages": parts}] * 2), "type": "chat_template"}
    segments = [{"label": label, "text": text} for label, text in [(False, "w5"), (True, "w6 w7 <|end|>")]]
    plain = {**jsonl(tmp_path / "i.jsonl", [{"segments": segments}] * 2), "type": "input_output"}
    run, _, _ = load(tmp_path, datasets=[{**chat, "message_field_training_detail": "train_detail"}, plain])
    assert (
        sorted(TOKENIZER.batch_decode(run.prompts["chosen_ids"][:])) == ["w2 w3 w4 <|end|>"] * 2 + ["w6 w7 <|end|>"] * 2
    )


# as Mistral's: what ends the user's turn opens the assistant's, which goes on behind a tool's words
TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|> ' + m['content'] + ' <|assistant|> ' }}"
    "{% elif m['role'] == 'tool' %}{{ 'w38 ' + m['content'] + ' w39 ' }}"
    "{% else %}{{ m['content'] + ' <|end|> ' }}{% endif %}{% endfor %}"
)


def test_an_answer_behind_a_tools_words_is_not_lost(tmp_path: Path) -> None:
    """Where users' turns may be trained, nothing tells it from theirs."""
    asked = [say("user", "w1", train=True), say("assistant", "w2")]
    keys = {"template": TOOLS, "message_field_training": "train"}
    assert turns(tmp_path, [asked, TALK], "all", **keys) == ["w2 <|end|>", "w2 w3 <|end|>", "w5 <|end|>"]
    called = [*asked, say("tool", "w3"), say("assistant", "w4")]
    with pytest.raises(
        ValueError, match=r"row \d of .*`message_field_training: train` trains .* the assistant's alone"
    ):
        turns(tmp_path / "called", [TALK, called], "last", **keys)


CASES = host.SHARED / "cases"


@pytest.mark.skipif(not CASES.exists(), reason="the small inputs that once failed lie beside some checkouts only")
@pytest.mark.parametrize(("which", "count"), [("last", 16), ("all", 32)])
def test_conversations_that_end_with_the_user(tmp_path: Path, which: str, count: int) -> None:
    data = {"path": str(CASES / "ends_with_user.jsonl"), "ds_type": "json", "type": "chat_template"}
    entry = {**data, "train_on_eos": "all", "roles_to_train": ["assistant"]}
    run, _, _ = load(tmp_path, datasets=[entry], sequence_len=128, spin={"iterations": 1, "turns": which})
    assert len(run.prompts) == count
    assert all(len(ids) > 1 and ids[-1] == TOKENIZER.eos_token_id for ids in run.prompts["chosen_ids"][:])
