"""Models whose positions are turned by other frequencies in longer sequences: LongRoPE (Phi-3, Phi-4-mini) and dynamic NTK.

transformers changes the frequencies of all rows of a forward as soon as its largest position passes a length, and keys that
are in a cache by then were turned by the former ones. LongRoPE has two sets of frequencies, so that rows can be told apart
by their length (`decode`). Dynamic NTK has others for each length beyond its own, and keeps the last ones for what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from axolotl_spin.compat import text_config
from axolotl_spin.data.prompts import token_counts
from axolotl_spin.generation.chunks import token_limit
from axolotl_spin.settings.spin import SpinConfig


def switch_lengths(config: Any, kind: str = "longrope") -> tuple[int, ...]:
    """Returns beyond how many tokens a model turns a sequence by other frequencies, rising; none where it does not.

    Args:
        config: The model's (`transformers.PretrainedConfig`).
        kind: The `rope_type`, or a part of it.
    """
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    of_layers = [part for part in rope.values() if isinstance(part, dict)]
    found = set()
    for part in of_layers or [rope]:
        if kind in str(part.get("rope_type") or part.get("type")):
            own = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            found.add(int(own if own and kind == "longrope" else text.max_position_embeddings))
    return tuple(sorted(found))


def refuse_switches(
    cfg: Any, settings: SpinConfig, played: Sequence[Any], *, pictures: bool, served_len: int | None
) -> None:
    """Refuses a run in which an answer would be drawn from other frequencies than its model's.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        played: What is answered: `datasets.Dataset` with `prompt_ids` and `chosen_ids`, or None.
        pictures: Prompts have pictures, whose answers keep one cache from start to end.
        served_len: The `max_model_len` of vLLM's engines; None with another backend.

    Raises:
        ValueError: Names the keys to change and the largest length that works.
    """
    from axolotl.loaders.utils import load_model_config

    config = load_model_config(cfg)
    dynamic, long = switch_lengths(config, "dynamic"), switch_lengths(config)
    if not (dynamic or long):
        return
    if served_len is not None and dynamic:
        raise ValueError(
            "`spin.generation.backend: vllm`: vLLM turns positions by other frequencies than training does where a model "
            "has `rope_type: dynamic`: set `spin.generation.backend: transformers`"
        )
    longest, most = _longest(cfg, settings, played), min(dynamic + long)
    lower = (
        f"set `sequence_len` to at most {most}, or lower `spin.generation.max_new_tokens` until no prompt and its answer "
        f"have more than {most} tokens together"
    )
    if served_len is not None and served_len > most:
        raise ValueError(
            f"`spin.generation.backend: vllm`: with `rope_type: longrope` vLLM takes the frequencies of sequences of more "
            f"than {most} tokens for all answers where its `max_model_len` ({served_len} here) is more, and training takes "
            f"them for those sequences alone: set `spin.generation.backend: transformers`; or {lower} and leave out "
            "`spin.generation.vllm.max_model_len`"
        )
    if dynamic and longest > most:
        raise ValueError(
            f"`sequence_len: {cfg.sequence_len}`: a model with `rope_type: dynamic` turns positions otherwise with each "
            f"token beyond {most}, by the longest sequence that it was given, and a prompt and its answer may have "
            f"{longest}: {lower}"
        )
    if pictures and longest > most:
        raise ValueError(
            f"`sequence_len: {cfg.sequence_len}`: a model with `rope_type: longrope` has other frequencies beyond {most} "
            f"tokens, where answers to prompts with pictures cannot go on, and such a prompt and its answer may have "
            f"{longest}: {lower}"
        )


def _longest(cfg: Any, settings: SpinConfig, played: Sequence[Any]) -> int:
    """Returns the most tokens of a prompt with either of its answers."""
    whole = int(cfg.sequence_len)
    if settings.initial_pairs is not None:
        return whole
    most, found = settings.generation.max_new_tokens, 0
    for prompts in played:
        if prompts is not None and len(prompts):
            asked, human = token_counts(prompts, "prompt_ids"), token_counts(prompts, "chosen_ids")
            own = (int(n) + token_limit(int(n), max_new_tokens=most, sequence_len=whole) for n in np.unique(asked))
            found = max(found, int((asked + human).max()), *own)
    return found
