"""Attention of a token to a cache whose keys and values each serve several heads, without a copy of them for each head.

`sdpa` of transformers repeats keys and values for every head where there is a mask: at each token the whole cache is
written several times over. Here the heads of a group are the queries of one head, which reads its keys and values once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "spin_grouped"


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Attends as transformers' `sdpa` does.

    Args:
        module: Of the model.
        query: (rows, heads, columns, head size).
        key: (rows, groups of heads, width, head size).
        value: The same; its head size may be another.
        attention_mask: (rows, 1, columns, width), bool or added to the scores.
        how: What else the model says.

    Returns:
        (rows, columns, heads, head size of the values), and None for the weights.
    """
    rows, heads, columns, size = query.shape
    groups = key.shape[1]
    plain = not how.get("dropout") and how.get("position_bias") is None
    if columns > 1 or heads == groups or attention_mask is None or attention_mask.shape[1] != 1 or not plain:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **how)
    together = query.reshape(rows, groups, heads // groups, size)
    out = torch.nn.functional.scaled_dot_product_attention(
        together, key, value, attn_mask=attention_mask, scale=how.get("scaling")
    )
    return out.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped(model: Any) -> Iterator[None]:
    """Has a model attend by `grouped_attention` for as long as the context lasts, where it would by `sdpa` and has groups.

    Args:
        model: A causal language model, with its adapter but no other wrapper.
    """
    owners = [module for module in model.modules() if getattr(module, "num_key_value_groups", 1) > 1]
    configs = {id(owner.config): owner.config for owner in owners if hasattr(owner, "config")}.values()
    taken = [config for config in configs if config._attn_implementation == "sdpa"]
    try:
        for config in taken:
            config._attn_implementation = {"": NAME}  # of this config alone, not of those within
        yield
    finally:
        for config in taken:
            config._attn_implementation = {"": "sdpa"}
