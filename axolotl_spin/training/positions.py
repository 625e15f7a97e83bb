"""Positions of prompts with pictures in shared rows, for models that place a picture's tokens in a plane."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def positions_of_pictures(model: Any, batch: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the positions of a shared batch as the model itself gives them to each prompt, and on from there.

    Multimodal rotary positions (M-RoPE of Qwen2-VL, arXiv 2409.12191) count a picture's rows and columns, so that what
    follows a picture stands nearer than its tokens are many. Both answers go on where their prompt has ended.

    Args:
        model: The causal model, out of its wrappers.
        batch: Of the shared layout: `input_ids`, `position_ids` and `segments`, each (rows, length).
        given: What the forward takes for the pictures.

    Returns:
        (3, rows, length); None where the model's positions are those of text.
    """
    index = getattr(getattr(model, "base_model", None), "get_rope_index", None)
    if index is None or "image_grid_thw" not in given:
        return None
    segments = batch["segments"]
    of_prompts = (segments >= 0) & (segments % 3 == 0)
    pairs, lengths = torch.unique_consecutive(segments[of_prompts] // 3, return_counts=True)
    places = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (prompts, longest)

    def prompts(values: Tensor) -> Tensor:
        return values.new_zeros(places.shape).masked_scatter(places, values[of_prompts])

    along = {name: prompts(values) for name, values in given.items() if values.shape == segments.shape}
    known = {**given, **along, "attention_mask": places.long()}
    taken = inspect.signature(index).parameters
    found, ahead = index(prompts(batch["input_ids"]), **{name: known[name] for name in known if name in taken})
    positions = batch["position_ids"].expand(len(found), *segments.shape).clone()
    positions[:, of_prompts] = found[:, places].to(positions.dtype)
    of_pair = ahead.new_zeros(int(pairs.max()) + 1)
    of_pair[pairs] = ahead.flatten()
    of_answers = (segments >= 0) & ~of_prompts
    positions[:, of_answers] += of_pair[segments[of_answers] // 3].to(positions.dtype)
    return positions
