"""Which layout a model's attention can take, and the numeric check of that choice before anything depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger

from axolotl_spin.compat import text_config
from axolotl_spin.training.layouts import Layout, PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.policy import frozen

LOG = get_logger(__name__)


def preferred_layout(config: Any, *, sample_packing: bool | None, longest: int) -> tuple[Layout, str]:
    """Returns the layout with the least to compute that a model's attention should take, and why.

    Args:
        config: The model's (`transformers.PretrainedConfig`).
        sample_packing: The host's key; False asks for padding.
        longest: Most tokens in a prompt with an answer.
    """
    if sample_packing is False:
        return "padded", "`sample_packing: false`"
    text = text_config(config)
    attention = str(getattr(text, "_attn_implementation", None) or getattr(config, "_attn_implementation", None))
    if "flash" in attention:
        return "packed", f"{attention} separates sequences by their positions"
    if attention not in ("sdpa", "eager", "flex_attention"):
        return "padded", f"{attention} is not known to take a mask"
    window = getattr(text, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(text, "layer_types", None) or []) or (
        getattr(text, "layer_types", None) is None and getattr(text, "use_sliding_window", True)
    )
    if window and windowed and longest > window:
        return "padded", f"its attention slides over {window} tokens, and pairs may have {longest}"
    return "shared", f"{attention} takes a mask"


def disagreement(model: Any, rows: Sequence[dict[str, Any]], collator: PairCollator, device: Any) -> float:
    """Returns how far a layout's log-probs are from those of the padded layout, in nats per token.

    Also counts how much one answer's log-probs move when the other answer of its pair, and the pairs beside it, are
    exchanged for other tokens: by nothing, where the attention respects the layout.

    Args:
        model: The policy as the trainer wraps it, in `eval()`; every rank must call.
        rows: Pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`), more than one.
        collator: Of the layout.
        device: Where the model is.
    """

    def logps(collate: PairCollator, pairs: Sequence[dict[str, Any]]) -> torch.Tensor:
        batch = {name: tensor.to(device) for name, tensor in collate(pairs).items()}
        return completion_logps(model, batch, collate.in_head) / batch["completion_lengths"]

    with torch.no_grad():
        found = logps(collator, rows)
        padded = logps(PairCollator(collator.pad_token_id, "padded"), rows)
        last = rows[-1]
        others = [_other_tokens(row, ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows[:-1]]
        moved = logps(collator, [*others, _other_tokens(last, ("chosen_ids",))])
    apart = (found - padded).abs().max()
    leaked = (found[-1] - moved[-1]).abs()  # the last pair's opponent answer
    return float(torch.maximum(apart, leaked))


def settle_layout(
    collator: PairCollator,
    model: Any,
    prompts: Any,
    accelerator: Any,
    *,
    sample_packing: bool | None,
    longest: int,
    half: bool,
) -> str:
    """Gives a collator the layout that a model takes, on every rank the same.

    Args:
        collator: Of training and of the opponent's pass; changed in place.
        model: The policy as the trainer wraps it; every rank must call.
        prompts: Prompts and human answers, some of which are tried out.
        accelerator: The trainer's.
        sample_packing: The host's key; False asks for padding.
        longest: Most tokens in a prompt with an answer.
        half: Whether the forward is in half precision, whose rounding differs between layouts.

    Returns:
        A line for the log: the layout and why it was chosen.
    """
    policy = accelerator.unwrap_model(model)
    layout, why = preferred_layout(policy.config, sample_packing=sample_packing, longest=longest)
    text = text_config(policy.config)
    collator.hidden_size = int(getattr(text, "hidden_size", None) or collator.hidden_size)
    rows, limit = _few_pairs(prompts), 0.05 if half or policy.dtype.itemsize < 4 else 1e-3
    head = policy.get_output_embeddings() is not None if hasattr(policy, "get_output_embeddings") else False

    def off_by(tried: Layout, in_head: bool) -> float:
        """Returns the largest disagreement on any rank; infinite where the model does not take the layout."""
        candidate = PairCollator(collator.pad_token_id, tried, hidden_size=10**6)  # all pairs in one row
        candidate.in_head = in_head
        try:
            with frozen(model):
                off = disagreement(model, rows, candidate, accelerator.device)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            LOG.warning(f"the model does not take pairs in the {tried} layout: {error}")
            off = float("inf")
        return float(accelerator.gather(torch.tensor([off], device=accelerator.device)).max())

    in_head = head and off_by(layout, True) <= limit
    if not in_head and layout != "padded":
        off = off_by(layout, False)
        if not off <= limit:
            layout, why = "padded", f"in the {layout} layout its log-probs are off by {off:.2g} nats per token"
            in_head = head and off_by(layout, True) <= limit
    collator.layout, collator.in_head = layout, in_head
    where = "where the LM head gives its logits" if in_head else "from the forward's output"
    return f"pairs are laid out {layout}: {why}; log-probs are taken {where}"


def _few_pairs(prompts: Any) -> list[dict[str, Any]]:
    """Returns up to four short pairs of real prompts and answers; the other answer is the next row's."""
    rows = prompts.select(range(min(4, len(prompts))))
    answers = [ids[:64] for ids in rows["chosen_ids"][:]]
    return [
        {"prompt_ids": prompt[-64:], "chosen_ids": answer, "rejected_ids": other}
        for prompt, answer, other in zip(rows["prompt_ids"][:], answers, answers[1:] + answers[:1], strict=True)
    ]


def _other_tokens(row: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    return {name: np.asarray(ids)[::-1] // 2 if name in parts else ids for name, ids in row.items()}
