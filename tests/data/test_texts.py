"""Texts of answers behind their prompts, with tokenizers of the kinds that drop or share something at the border."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from axolotl_spin.data.texts import answer_texts


def word_marks() -> PreTrainedTokenizerFast:
    """Words carry the space before them, and bytes stand in for what is not in the vocabulary, as in Llama 2."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁hello",
        "▁who",
        "there",
        "▁there",
    ]
    backend = Tokenizer(
        models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        (["▁who"], ["▁there", "</s>"], " there</s>"),
        (["▁who"], ["there"], "there"),
        (["<s>", "▁who", "▁there"] * 9, ["▁hello"], " hello"),
        (["▁who", "<0xC3>"], ["<0xA9>", "▁hello"], "é hello"),  # a character that begins in the prompt
        (["▁who"], ["<0xC3>"], "�"),
        (["▁who"], [], ""),
    ],
)
def test_what_an_answer_adds(prompt: list[str], answer: list[str], text: str) -> None:
    tokenizer = word_marks()
    ids: Any = tokenizer.convert_tokens_to_ids
    assert answer_texts([ids(prompt)], [ids(answer)], tokenizer.batch_decode) == [text]
