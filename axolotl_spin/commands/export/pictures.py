"""Pairs whose prompts have pictures, in TRL's multimodal preference form: `images` beside `prompt`, `chosen`, `rejected`.

Pairs have no pictures, but the row that these came from. So the run's config is loaded as a start loads it, and its rows
give the conversations and pictures again. Each row is read by TRL's own collator, and checked to give the pair's tokens.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import click
import pyarrow as pa

from axolotl_spin.commands.config import load_config
from axolotl_spin.commands.export.formats import CUT, EMPTY, OTHER, UNREAD, Row
from axolotl_spin.data.images import picture_hash, pictures_of
from axolotl_spin.data.texts import answer_texts

Message = dict[str, Any]
# ids of a human's and an opponent's answer, each behind its prompt
Read = tuple[list[int], list[int]]


def pictured_schema() -> pa.Schema:
    """Returns the columns, which `datasets` reads as messages and pictures."""
    from datasets import Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}  # of a picture without text
    messages = List({"role": Value("string"), "content": List(part)})
    return Features({"images": List(Image()), **dict.fromkeys(("prompt", "chosen", "rejected"), messages)}).arrow_schema


class PicturedRows:
    """Turns pairs into rows with pictures.

    Args:
        config: The run's YAML.

    Raises:
        ValueError: It is not valid, or has no pictures.
    """

    def __init__(self, config: str):
        from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

        try:
            cfg, plugin = load_config(config, logged=False)
        except click.ClickException as error:
            raise ValueError(error.message) from error
        cfg.world_size = 1
        plugin.load_datasets(cfg, preprocess=True)
        assert plugin.run is not None
        if plugin.run.images is None:
            raise ValueError(f"--config {config} is of a run on text: name the YAML of the run on pictures")
        self._config, self._images, self._tokenizer = config, plugin.run.images, plugin.run.tokenizer
        strategy: Any = self._images.collate.processing_strategy  # type: ignore[attr-defined]
        strategy.processor.chat_template = strategy.chat_template or strategy.processor.chat_template
        self._trl = DataCollatorForVisionPreference(strategy.processor)

    def rows_of(self, pairs: pa.RecordBatch) -> list[Row]:
        """Turns pairs into rows of `pictured_schema`.

        Args:
            pairs: Of the columns of `pairs.parquet`.

        Raises:
            ValueError: A row of the data has other pictures than the pair was made of.
        """
        return [self._row(pair) for pair in pairs.to_pylist()]

    def _row(self, pair: dict[str, Any]) -> Row:
        messages, pictures = self._source(pair)
        wanted = [*pair["prompt_ids"], *pair["chosen_ids"]]
        for turns, answer in _splits(messages):
            values = {"images": pictures, "prompt": turns, "chosen": [answer], "rejected": [answer]}
            read = self._read(values)
            if read is not None and read[0][: len(wanted)] == wanted:
                break
        else:
            return Row(None, UNREAD)
        behind, fault = read[0][len(wanted) :], OTHER
        wanted = [*pair["prompt_ids"], *pair["rejected_ids"]]
        contents = self._contents(pair, "".join(part["text"] for part in answer["content"]))
        for content in contents:
            values["rejected"] = [_said(content)]
            read = self._read(values)
            if read is not None and read[1] == wanted + behind:
                fault = ""
                break
        else:
            values["rejected"] = [_said(contents[0])]
        said = values["rejected"][0]["content"][0]["text"]
        fault = CUT if pair["finish_reason"] == "length" else EMPTY if not said else fault
        return Row({**values, "images": [{"bytes": _png(picture), "path": None} for picture in pictures]}, fault)

    def _source(self, pair: dict[str, Any]) -> tuple[list[Message], list[Any]]:
        """Returns the conversation of a pair's row, its pictures taken out, and these."""
        row, pictures = pair["row"], []
        if row < len(self._images.rows):
            messages = self._images.messages(row)
            pictures = pictures_of(messages)
        if [picture_hash(picture) for picture in pictures] != pair["images"] or row >= len(self._images.rows):
            raise ValueError(
                f"row {row} of `datasets:` in {self._config} does not have the pictures that its pair was made of: name "
                "the YAML that the run was started with, and see that its data has not changed since"
            )
        return [_plain(message) for message in messages], pictures

    def _read(self, values: dict[str, Any]) -> Read | None:
        """Returns what TRL's DPO makes of a row; None where the chat template refuses it."""
        try:
            batch = self._trl([dict(values)])
        except Exception:  # templates and processors raise errors of their own
            return None
        ids, masks = batch["input_ids"], batch["attention_mask"]
        human, own = (row[mask.bool()].tolist() for row, mask in zip(ids, masks, strict=True))
        return human, own

    def _contents(self, pair: dict[str, Any], human: str) -> list[str]:
        """Returns what the opponent's answer may say, the most literal first: it stands as the human's `human` does."""

        def decode(ids: list[list[int]]) -> list[str]:
            return self._tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        prompts, found = [pair["prompt_ids"]] * 2, []
        ids = [pair["chosen_ids"], pair["rejected_ids"]]
        for chosen, rejected in (answer_texts(prompts, ids, decode), decode(ids)):
            before, _, behind = chosen.partition(human.strip())
            for end in dict.fromkeys([behind, behind.strip(), ""]):
                if rejected.endswith(end):
                    text = rejected.removesuffix(end)
                    shorter = [text, text.removeprefix(before), text.removeprefix(before.strip())]
                    found += [*shorter, *(text.strip() for text in shorter)]
                    break
        return list(dict.fromkeys(found))


def _splits(messages: list[Message]) -> Iterator[tuple[list[Message], Message]]:
    """Yields what may be a pair's prompt and human answer, the last first."""
    for place in reversed(range(1, len(messages))):
        answer = messages[place]
        if answer["role"] not in ("system", "user") and all(part["type"] == "text" for part in answer["content"]):
            yield messages[:place], answer


def _plain(message: Message) -> Message:
    content = [{"type": part["type"], "text": part.get("text")} for part in message["content"]]
    return {"role": message["role"], "content": content}


def _said(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
