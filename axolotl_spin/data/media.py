"""Images and sound in the data: pairs are of text alone. Rows with places for them are refused; columns are told of."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from axolotl_spin.data.marks import special_tokens
from axolotl_spin.data.row_cache import PREPARE_AGAIN

# how models' configs name the tokens that stand where an image or a sound does, and around it
_NAMES = re.compile(r"(image|img|video|vision|audio|speech|boi|eoi|boa|eoa)_(\w+_)?token_(id|index)")

# columns that hold images or sound in data that models with such inputs are trained on
_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


def refuse_media(dataset: Any, cfg: Any, tokenizer: Any, key: str = "datasets") -> None:
    """Refuses prepared rows that a chat template has given places for images or sound, which nothing would fill.

    Args:
        dataset: A `datasets.Dataset` with `input_ids`, or None.
        cfg: The host's normalized config.
        tokenizer: The host's.
        key: What the rows come from.

    Raises:
        ValueError: Names the key, the first such row and its token.
    """
    if dataset is None or not cfg.is_multimodal:
        return
    found = _named(cfg)
    tokens = sorted(token for token in found if token in special_tokens(tokenizer))
    start = 0
    for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000) if tokens else ():
        rows = batch["input_ids"].combine_chunks()
        has = np.isin(rows.flatten().to_numpy(zero_copy_only=False), tokens)
        if has.any():
            ends = np.cumsum(rows.value_lengths().to_numpy(zero_copy_only=False))
            place = int(has.argmax())
            row, token = start + int(np.searchsorted(ends, place, side="right")), int(rows.flatten()[place].as_py())
            raise ValueError(
                f"`{key}`: prepared row {row} has {tokenizer.decode([token])!r}, the model's `{found[token]}`, where an "
                "image or a sound would stand: pairs are of text alone; leave out such rows, or those parts of "
                f"`content`; {PREPARE_AGAIN}"
            )
        start += len(rows)


def placeholder_tokens(cfg: Any) -> tuple[int, ...]:
    """Returns the tokens that stand where a picture, a video or a sound does, and around it, by the model's config.

    Args:
        cfg: The host's normalized config.
    """
    return tuple(sorted(_named(cfg)))


def _named(cfg: Any) -> dict[int, str]:
    from axolotl.loaders.utils import load_model_config

    named = load_model_config(cfg).to_dict().items()
    return {value: name for name, value in named if _NAMES.fullmatch(name) and isinstance(value, int)}


def describe_unread(cfg: Any) -> str | None:
    """Says which columns of the data hold images or sound that no row of text has a place for; None where there are none.

    The host ignores them without a processor, in SFT as well. Rank 0 looks, and only for a model that would take them.

    Args:
        cfg: The host's normalized config.
    """
    if not cfg.is_multimodal or os.environ.get("RANK", "0") != "0":
        return None
    from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config

    found = []
    for key in ("datasets", "test_datasets"):
        for entry in datasets_with_name_generator(cfg.get(key) or []):
            if not _at_hand(str(entry.path)):
                continue
            try:
                rows = load_dataset_with_config(entry, cfg.hf_use_auth_token, streaming=False)
            except Exception:  # the prepared rows came from the host's cache, and what they were made of is gone
                continue
            if isinstance(rows, dict):
                rows = rows.get(entry.split or "train")
            for column in sorted(set(_COLUMNS) & set(rows.column_names if rows is not None else ())):
                if filled := _filled(rows, column):
                    found.append(f"`{column}` of {filled} of {len(rows)} rows of `{key}` ({entry.path})")
    if not found:
        return None
    return (
        f"images or sound in the data are left out: {'; '.join(found)}. Pairs are of text alone, so that both answers are "
        "given without them; leave out rows whose text speaks of what is to be seen or heard there; "
        f"{PREPARE_AGAIN}"
    )


def _at_hand(path: str) -> bool:
    """Whether rows are on this machine: where only the host has them, prepared, nothing is downloaded for a line."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = path.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(name)}" if owner else camelcase_to_snakecase(name)
    return os.path.exists(path) or os.path.exists(os.path.join(config.HF_DATASETS_CACHE, folder))


def _filled(rows: Any, column: str) -> int:
    """Returns how many rows have something in a column, without decoding it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = 0
    for batch in rows.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        values = batch[column].combine_chunks()
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            size = pc.list_value_length(values)
        elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            size = pc.binary_length(values)
        else:
            size = pc.cast(pc.is_valid(values), pa.int64())
        count += pc.sum(pc.greater(size, 0)).as_py() or 0
    return count
