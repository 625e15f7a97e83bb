"""Rows with pictures: where they are, what the processor makes of them, and the tokens that stand for them.

A picture is never copied: pairs keep the row that it came from and a hash, and the host's own collator makes of that row,
micro-batch by micro-batch, what the model's forward takes beside ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from axolotl_spin.data.turns import IGNORED

# what the host's collator gives that a batch of pairs makes for itself
_OF_THE_ROW = ("input_ids", "attention_mask", "labels")
_IMAGE_KEYS = ("image", "url", "path", "base64")

Collate = Callable[[list[dict[str, Any]]], Any]


class ImageInputs(NamedTuple):
    """What a forward over prompts takes beside their ids.

    Attributes:
        of_images: Tensors along the pictures of all prompts, in order (`pixel_values`, `image_grid_thw`, ...).
        of_tokens: For each prompt a tensor of (tokens,) (`token_type_ids`, `mm_token_type_ids`); 0 for text.
    """

    of_images: dict[str, Any]
    of_tokens: dict[str, list[Any]]


class ImageRows:
    """The host's rows with pictures.

    Args:
        rows: `datasets.Dataset` as the user wrote them: conversations and pictures, or where these lie.
        tokenised: The same rows as `tokenise_row` gives them: `input_ids`, `labels`, `images`.
        collate: The host's collator.
        placeholders: Tokens of the model that stand where a picture, a video or a sound does.
    """

    def __init__(self, rows: Any, tokenised: Any, collate: Collate, placeholders: Sequence[int]):
        self.rows, self.tokenised, self.collate = rows, tokenised, collate
        self.placeholders = tuple(placeholders)
        self._hashes = tokenised.select_columns(["images"])

    def hashes(self, row: int) -> list[str]:
        """Returns the hash of each of a row's pictures, in order."""
        return self._hashes[row]["images"]

    def messages(self, row: int) -> list[dict[str, Any]]:
        """Returns a row's conversation as the processor is given it; `pictures_of` has its pictures."""
        [example] = self.collate.processing_strategy([self.rows[row]])  # type: ignore[attr-defined]
        return example["messages"]

    def digest(self, prompts: Any) -> str:
        """Returns the SHA-256 of the pictures of prompts (`datasets.Dataset` with `row`)."""
        parts = ["/".join(self.hashes(row)) for row in prompts["row"]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def inputs(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> ImageInputs:
        """Has the host's collator process the pictures of some rows.

        Args:
            rows: Of the source.
            prompts: The prompt's ids of each.

        Raises:
            ValueError: A row does not give its prompt any more.
        """
        batch = dict(self.collate([self.rows[int(row)] for row in rows]))
        kept = [mask.nonzero().flatten() for mask in batch["attention_mask"]]
        shape = batch["input_ids"].shape
        for row, prompt, ids, places in zip(rows, prompts, batch["input_ids"], kept, strict=True):
            if not np.array_equal(ids[places[: len(prompt)]].numpy(), np.asarray(prompt)):
                raise ValueError(
                    f"row {row} of `datasets:` does not give the prompt that it gave when the run began: its pictures, or "
                    "what reads them, have changed since"
                )
        of_images, of_tokens = {}, {}
        for name, values in batch.items():
            if name in _OF_THE_ROW or values is None:
                continue
            if tuple(values.shape[:2]) != tuple(shape):
                of_images[name] = values
            elif values.dim() == 2:
                parts = zip(values, kept, prompts, strict=True)
                of_tokens[name] = [value[places[: len(prompt)]] for value, places, prompt in parts]
            else:
                raise ValueError(
                    f"the processor gives `{name}` for each token of a row, which pairs of it would not have"
                )
        return ImageInputs(of_images, of_tokens)

    def most(self) -> int:
        """Returns how many pictures a row has at most."""
        return max((len(found) for found in self._hashes["images"]), default=0)

    def unprocessed(self, row: int, prompt: Sequence[int]) -> tuple[list[int], list[Any]]:
        """Returns a prompt as an engine takes it that processes pictures itself.

        Args:
            row: Of the source.
            prompt: The prompt's ids.

        Returns:
            Its ids, in which a picture is what the chat template sets for it; and the pictures (`PIL.Image`), as the host's
            strategy leaves them.
        """
        strategy = self.collate.processing_strategy  # type: ignore[attr-defined]
        [example] = strategy([self.rows[int(row)]])
        tokenizer, messages = strategy.processor.tokenizer, example["messages"]
        text = strategy.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=False, chat_template=strategy.chat_template
        )
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)  # as processors ask
        ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        behind = len(self.tokenised[int(row)]["input_ids"]) - len(prompt)
        return ids[: len(ids) - behind], pictures_of(messages)

    def squeezed(self, ids: Sequence[int]) -> list[int]:
        """Returns ids in which each picture is one token, for people to read."""
        return [
            token
            for place, token in enumerate(ids)
            if token not in self.placeholders or place == 0 or ids[place - 1] != token
        ]


def tokenise_row(
    row: dict[str, Any], collate: Collate, strategy: Any, known: Callable[[list[int]], list[int]]
) -> dict[str, Any]:
    """Makes of a row the tokens that SFT trains on.

    Args:
        row: Of the source.
        collate: The host's collator.
        strategy: The host's processing strategy in it.
        known: Returns the labels of ids where the strategy does not tell an assistant's turns from others.

    Returns:
        `input_ids` and `labels` (lists of ids), and `images`, the hashes of the pictures.

    Raises:
        ValueError: The row has sound or a video, or its tokens are others tomorrow.
    """
    conversations = [example["messages"] for example in strategy([row])]
    hashes = [picture_hash(image) for messages in conversations for image in pictures_of(messages)]
    batch = collate([row])
    if any(_tells_the_day(strategy, messages) for messages in conversations):
        raise ValueError(
            "the chat template puts today's date into it, and its tokens are made again for each batch, so that the run "
            "would stop at midnight: begin the conversations with a system message of their own, where the template then "
            "leaves out the date, or write the template with a fixed date into `chat_template_jinja`"
        )
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    labels = batch["labels"][0][batch["attention_mask"][0].bool()].tolist()
    ids = ids.tolist()
    if not strategy.role_boundaries and not strategy.train_on_inputs:
        labels = known(ids)
    return {"input_ids": ids, "labels": labels, "images": hashes}


def _tells_the_day(strategy: Any, messages: list[dict[str, Any]]) -> bool:
    """Whether a conversation's text depends on the day on which the host's strategy (or its processor) renders it."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    template = strategy.chat_template or getattr(strategy.processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or "strftime_now" not in template:
        return False

    def on(day: str) -> Any:
        known = {**strategy.processor.tokenizer.special_tokens_map, "strftime_now": lambda _: day}
        return render_jinja_template(conversations=[messages], chat_template=template, **known)

    try:
        return on("1") != on("2")
    except jinja2.TemplateError:  # one that the collator gives something more; it has rendered this conversation
        return False


def labels_by_headers(
    ids: list[int], headers: Sequence[Sequence[int]], ends: Sequence[int], special: Sequence[int]
) -> list[int]:
    """Labels an assistant's turns as they stand between a chat template's header and the next end or special token.

    Args:
        ids: Of a row.
        headers: What a chat template sets before an assistant's content.
        ends: Tokens that end an answer; the first behind a turn is of it.
        special: Other tokens that no text has.
    """
    labels = [IGNORED] * len(ids)
    for header in headers:
        size = len(header)
        for at in range(len(ids) - size + 1):
            if tuple(ids[at : at + size]) != tuple(header):
                continue
            for place in range(at + size, len(ids)):
                if ids[place] in special and ids[place] not in ends:
                    break
                labels[place] = ids[place]
                if ids[place] in ends:
                    break
    return labels


def pictures_of(messages: list[dict[str, Any]]) -> list[Any]:
    """Returns the pictures (`PIL.Image`) of a conversation, which the host's strategy leaves loaded or where they are.

    Args:
        messages: What that makes of a row.

    Raises:
        ValueError: A part is sound or a video, or no picture has come to its place.
    """
    from transformers.image_utils import load_image

    found = []
    for message in messages:
        for part in message["content"]:
            kind = part.get("type")
            if kind == "image":
                picture = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
                if picture is None:
                    raise ValueError(
                        "it has more places for pictures than pictures: of a row's `images` the host takes the first "
                        'alone, so give each in a part of `content` of its own, as {"type": "image", "path": ...}'
                    )
                found.append(load_image(picture))
            elif kind != "text":
                raise ValueError(
                    f"it has a part of the type `{kind}`: pairs may have pictures, but no sound and no video"
                )
    return found


def picture_hash(picture: Any) -> str:
    """Returns the SHA-256 of what a picture (`PIL.Image`) shows, in 32 digits: its mode, size and pixels."""
    return hashlib.sha256(f"{picture.mode}/{picture.size}".encode() + picture.tobytes()).hexdigest()[:32]
