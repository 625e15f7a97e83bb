"""Rows with places for images or sound are refused, with the key and the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AddedToken

from axolotl_spin.data.media import refuse_media


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[DictDefault, Any]:
    """A config of the host over a model that takes images, and its tokenizer: `<image>` is the token 47."""
    folder: Path = tmp_path_factory.mktemp("model")
    config = architectures.config_of("gemma3", 60)
    config.image_token_index = 47
    config.boi_token_index = 20  # an ordinary word of this tokenizer's
    config.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    return DictDefault(base_model=str(folder), base_model_config=str(folder), is_multimodal=True), tokenizer


def test_the_first_row_with_an_image_is_named(model: tuple[DictDefault, Any]) -> None:
    cfg, tokenizer = model
    rows = [[9, 20, 11], [], [8], [7, 47, 9, 47], [47]]
    with pytest.raises(ValueError, match=r"`datasets`: prepared row 3 has '<image>', the model's `image_token_i"):
        refuse_media(Dataset.from_dict({"input_ids": rows}), cfg, tokenizer)
    with pytest.raises(ValueError, match="`test_datasets`: prepared row 0 "):
        refuse_media(Dataset.from_dict({"input_ids": rows}).select([4, 0]), cfg, tokenizer, "test_datasets")


def test_text_passes(model: tuple[DictDefault, Any]) -> None:
    cfg, tokenizer = model
    refuse_media(Dataset.from_dict({"input_ids": [[9, 20, 11], [8]]}), cfg, tokenizer)
    refuse_media(None, cfg, tokenizer)
    refuse_media(Dataset.from_dict({"input_ids": [[47]]}), DictDefault({**cfg, "is_multimodal": False}), tokenizer)
