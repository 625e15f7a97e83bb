"""Rows with places for images or sound are refused, with the key and the row; columns of them are told of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AddedToken

from axolotl_spin.data.media import _at_hand, describe_unread, refuse_media


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
    says = r"`datasets`: prepared row 3 has '<image>', the model's `image_token_i.*`axolotl preprocess`"
    with pytest.raises(ValueError, match=says):
        refuse_media(Dataset.from_dict({"input_ids": rows}), cfg, tokenizer)
    with pytest.raises(ValueError, match="`test_datasets`: prepared row 0 "):
        refuse_media(Dataset.from_dict({"input_ids": rows}).select([4, 0]), cfg, tokenizer, "test_datasets")


def test_text_passes(model: tuple[DictDefault, Any]) -> None:
    cfg, tokenizer = model
    refuse_media(Dataset.from_dict({"input_ids": [[9, 20, 11], [8]]}), cfg, tokenizer)
    refuse_media(None, cfg, tokenizer)
    refuse_media(Dataset.from_dict({"input_ids": [[47]]}), DictDefault({**cfg, "is_multimodal": False}), tokenizer)


def test_columns_that_no_template_reads_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are rows that hold something: no null, no empty list or path; as Parquet with an image feature too."""
    from datasets import Features, Image, List, Value

    rows = {"images": [["a.png"], [], None, ["b.png", "c.png"]], "audio": ["", None, "d.wav", ""], "text": list("abcd")}
    Dataset.from_dict({**rows, "image": [None] * 4}).to_json(tmp_path / "a.jsonl")
    held = [{"bytes": b"1", "path": None}, None, None]
    features = Features({"image": Image(), "videos": List(Value("string"))})
    Dataset.from_dict({"image": held, "videos": [[], None, []]}, features=features).to_parquet(tmp_path / "b.parquet")
    entries = [{"path": str(tmp_path / "a.jsonl"), "ds_type": "json"}]
    held_out = [{"path": str(tmp_path / "b.parquet"), "ds_type": "parquet", "split": "train"}]
    gone = [{"path": str(tmp_path / "gone.jsonl"), "ds_type": "json"}]
    cfg = DictDefault(is_multimodal=True, datasets=gone + entries, test_datasets=held_out)
    told = describe_unread(cfg)
    assert told is not None
    assert (
        f"`audio` of 1 of 4 rows of `datasets` ({tmp_path / 'a.jsonl'}); `images` of 2 of 4 rows of `datasets` ("
        in told
    )
    assert f"; `image` of 1 of 3 rows of `test_datasets` ({tmp_path / 'b.parquet'}). Pairs are" in told
    assert "`axolotl preprocess`" in told
    assert describe_unread(DictDefault({**cfg, "is_multimodal": False})) is None
    assert describe_unread(DictDefault(is_multimodal=True, datasets=gone)) is None
    monkeypatch.setenv("RANK", "1")
    assert describe_unread(cfg) is None


def test_rows_are_at_hand_on_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a hub are where `datasets` prepared them: their own names, in its spelling."""
    from datasets import DatasetBuilder, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    assert not _at_hand("Someone/TalkOfPictures") and _at_hand(str(tmp_path))
    named = {"dataset_name": "TalkOfPictures", "repo_id": "Someone/TalkOfPictures", "hash": "0"}

    class Builder(DatasetBuilder):
        def _info(self) -> Any:
            from datasets import DatasetInfo

            return DatasetInfo()

    Path(Builder(cache_dir=str(tmp_path), **named).cache_dir).mkdir(parents=True)
    assert _at_hand("Someone/TalkOfPictures") and not _at_hand("Another/TalkOfPictures")
