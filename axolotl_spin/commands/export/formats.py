"""Pairs as rows of formats made of text or messages, each checked to give the pair's tokens to whoever reads it.

uclaml    `real` and `generated` message lists, as the SPIN authors publish; `finish_reason` says which answers were cut
dpo       `prompt`, `chosen`, `rejected` as message lists: TRL's conversational form
dpo-text  `prompt`, `chosen`, `rejected` as text: TRL's standard form
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyarrow as pa

from axolotl_spin.commands.export.template import Answered, TemplateReader

_MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMAS = {
    "uclaml": pa.schema([("real", _MESSAGES), ("generated", _MESSAGES), ("finish_reason", pa.string())]),
    "dpo": pa.schema([("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES)]),
    "dpo-text": pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())]),
}
CUT = "the opponent's answer was cut, and this format cannot say so: its readers end it"
EMPTY = "the opponent's answer is empty, which readers of this format take for a missing one"
OTHER = "text that gives other tokens when it is tokenised again"
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
    return rows


def _text(pairs: pa.RecordBatch, tokenizer: Any) -> list[Row]:
    eos = tokenizer.eos_token or ""
    columns = pairs.to_pydict()
    texts, exact = {}, [True] * len(pairs)
    for name in ("prompt", "chosen", "rejected"):
        ids = columns[f"{name}_ids"]
        made = texts[name] = [
            tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in ids
        ]
        if name != "prompt":  # TRL ends an answer that does not end with the eos token
            made = [text if text.endswith(eos) else text + eos for text in made]
        again = tokenizer(made, add_special_tokens=False)["input_ids"] if made else []
        exact = [good and list(one) == list(other) for good, one, other in zip(exact, ids, again, strict=True)]
    rows = []
    for index, reason in enumerate(columns["finish_reason"]):
        fault = CUT if reason == "length" else "" if exact[index] else OTHER
        rows.append(Row({name: values[index] for name, values in texts.items()}, fault))
    return rows
