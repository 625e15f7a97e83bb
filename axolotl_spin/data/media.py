"""Images and sound in the data: pairs are of text alone, so a row that has them is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from axolotl_spin.data.marks import special_tokens

# how models' configs name the tokens that stand where an image or a sound does, and around it
_NAMES = re.compile(r"(image|img|video|vision|audio|speech|boi|eoi|boa|eoa)_(\w+_)?token_(id|index)")


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
    from axolotl.loaders.utils import load_model_config

    found = {value: name for name, value in load_model_config(cfg).to_dict().items() if _NAMES.fullmatch(name)}
    tokens = sorted(token for token in found if isinstance(token, int) and token in special_tokens(tokenizer))
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
                "image or a sound would stand: pairs are of text alone; leave such rows out, or those parts of `content`"
            )
        start += len(rows)
