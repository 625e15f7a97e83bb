"""Pairs as rows of formats made of text or messages, each checked to give the pair's tokens to whoever reads it.

uclaml    `real` and `generated` message lists, as the SPIN authors publish; `finish_reason` says which answers were cut
dpo       `prompt`, `chosen`, `rejected` as message lists: TRL's conversational form; read by the host's `rl: dpo`
dpo-text  `prompt`, `chosen`, `rejected` as text: TRL's standard form; read by TRL
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

from axolotl_spin.commands.export.template import Answered, TemplateReader
from axolotl_spin.data.texts import answer_texts

_MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMAS = {
    "uclaml": pa.schema([("real", _MESSAGES), ("generated", _MESSAGES), ("finish_reason", pa.string())]),
    "dpo": pa.schema([("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES)]),
    "dpo-text": pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())]),
}
CUT = "the opponent's answer was cut, and this format cannot say so: its readers end it"
EMPTY = "the opponent's answer is empty, which readers of this format take for a missing one"
OTHER = "text that gives other tokens when its reader tokenises it again"
UNREAD = "no messages give the prompt and the human answer by the tokenizer's chat template"


class Row(NamedTuple):
    """A pair in a format.

    Attributes:
        values: Its columns; None where it cannot be written at all.
        fault: What of the pair the format does not keep; empty where it keeps every token.
    """

    values: dict[str, Any] | None
    fault: str


def rows_of(pairs: pa.RecordBatch, kind: str, tokenizer: Any) -> list[Row]:
    """Turns pairs into rows of a format.

    Args:
        pairs: Of the columns of `pairs.parquet`.
        kind: One of `SCHEMAS`.
        tokenizer: The run's, with its chat template.

    Raises:
        ValueError: The format needs a chat template that can be read.
    """
    return _text(pairs, tokenizer) if kind == "dpo-text" else _messages(pairs, kind, tokenizer)


def _messages(pairs: pa.RecordBatch, kind: str, tokenizer: Any) -> list[Row]:
    reader, columns = TemplateReader(tokenizer), pairs.to_pydict()
    prompts, reasons = columns["prompt_ids"], columns["finish_reason"]
    human = reader.read([Answered(*ids) for ids in zip(prompts, columns["chosen_ids"], strict=True)])
    answers = [
        Answered(prompt, answer, reason == "length", turns[:-1] if turns else None, closed=reader.closed(chosen))
        for prompt, chosen, answer, reason, turns in zip(
            prompts, columns["chosen_ids"], columns["rejected_ids"], reasons, human, strict=True
        )
    ]
    known = [answer for answer in answers if answer.turns is not None]
    found = iter(reader.read(known))
    rows = []
    for answer, real in zip(answers, human, strict=True):
        if real is None:
            rows.append(Row(None, UNREAD))
            continue
        generated, fault = next(found), ""
        if generated is None:
            fault = OTHER
            generated = [*real[:-1], {"role": "assistant", "content": reader.literal(answer)}]
        if kind == "uclaml":
            reason = "length" if answer.cut else "stop"
            rows.append(Row({"real": real, "generated": generated, "finish_reason": reason}, fault))
        else:
            fault = CUT if answer.cut else EMPTY if not generated[-1]["content"] else fault
            rows.append(Row({"prompt": real[:-1], "chosen": real[-1:], "rejected": generated[-1:]}, fault))
    return rows if kind == "uclaml" else _read_by_host(rows, columns, tokenizer)


def _read_by_host(rows: list[Row], columns: dict[str, list], tokenizer: Any) -> list[Row]:
    """Notes the rows of which the host's `rl: dpo` with `type: chat_template.default` makes other tokens.

    It renders each answer behind a message of its own and takes the text from where it first finds the answer's words,
    which may be in that message or in the template.
    """
    from axolotl.prompt_strategies.dpo.chat_template import default
    from axolotl.utils.dict import DictDefault

    entry = {"field_messages": "prompt", "chat_template": "tokenizer_default"}
    transform, _ = default(DictDefault({"datasets": [entry], "chat_template": "tokenizer_default"}))
    sound = [index for index, row in enumerate(rows) if row.values is not None and not row.fault]
    texts = [transform(rows[index].values, tokenizer=tokenizer) for index in sound]
    exact = read_by_trl(
        {name: [columns[name][index] for index in sound] for name in ("prompt_ids", "chosen_ids", "rejected_ids")},
        {name: [text[name] for text in texts] for name in ("prompt", "chosen", "rejected")},
        tokenizer,
    )
    for index, good in zip(sound, exact, strict=True):
        if not good:
            rows[index] = rows[index]._replace(fault=OTHER)
    return rows


def _text(pairs: pa.RecordBatch, tokenizer: Any) -> list[Row]:
    def decode(ids: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    columns = pairs.to_pydict()
    prompts = columns["prompt_ids"]
    texts = {"prompt": _prompt_texts(prompts, decode(prompts), tokenizer)}
    for name in ("chosen", "rejected"):
        texts[name] = answer_texts(prompts, columns[f"{name}_ids"], decode)
    exact = read_by_trl(columns, texts, tokenizer)
    rows = []
    for index, reason in enumerate(columns["finish_reason"]):
        fault = CUT if reason == "length" else "" if exact[index] else OTHER
        rows.append(Row({name: values[index] for name, values in texts.items()}, fault))
    return rows


def _prompt_texts(prompts: list[list[int]], texts: list[str], tokenizer: Any) -> list[str]:
    """Leaves out the begin token that the reader's tokenizer puts before a text by itself."""
    begin = tokenizer.bos_token
    if not begin or not texts:
        return texts
    without = [text.removeprefix(begin) for text in texts]
    found = []
    for ids, text, shorter in zip(prompts, texts, without, strict=True):
        kept = [made for made in (text, shorter, shorter.removeprefix(" ")) if tokenizer(made)["input_ids"] == ids]
        found.append(kept[0] if kept else text)
    return found


def read_by_trl(columns: dict[str, list], texts: dict[str, list[str]], tokenizer: Any) -> list[bool]:
    """Returns whether TRL's DPO makes the pairs' tokens of their texts.

    It ends an answer that does not end with the eos token, tokenises the prompt, and the prompt with each answer, as the
    tokenizer does by itself (with a begin token, where it sets one), and cuts off as many tokens as the prompt has.

    Args:
        columns: `prompt_ids`, `chosen_ids`, `rejected_ids`.
        texts: `prompt`, `chosen`, `rejected`.
        tokenizer: The run's.
    """
    eos = tokenizer.eos_token or ""
    if not texts["prompt"]:
        return []
    again = tokenizer(texts["prompt"])["input_ids"]
    exact = [list(ids) == list(made) for ids, made in zip(columns["prompt_ids"], again, strict=True)]
    for name in ("chosen", "rejected"):
        ended = [text if text.endswith(eos) else text + eos for text in texts[name]]
        whole = tokenizer([prompt + text for prompt, text in zip(texts["prompt"], ended, strict=True)])["input_ids"]
        wanted = [
            [*prompt, *answer] for prompt, answer in zip(columns["prompt_ids"], columns[f"{name}_ids"], strict=True)
        ]
        exact = [good and list(made) == ids for good, made, ids in zip(exact, whole, wanted, strict=True)]
    return exact
