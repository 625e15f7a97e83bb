"""Log-probabilities of completions: one function, for the policy and the opponent alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# keys of a pair batch that the model's forward takes
MODEL_INPUTS = ("input_ids", "attention_mask")


def completion_logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums the log-probs that a model gives to each sequence's completion tokens.

    Goes through the wrapped model's own forward, so that DDP, DeepSpeed, FSDP2 and autocast do what they do in
    training. The log-softmax is in fp32 and only over positions that predict a completion token.

    Args:
        model: A causal language model, wrapped or not.
        batch: `input_ids` (sequences, length), `attention_mask` (sequences, length) and `completion_mask`
            (sequences, length), True at the completion's tokens.

    Returns:
        (sequences,) sums in nats, fp32.
    """
    logits = model(**{key: batch[key] for key in MODEL_INPUTS}, use_cache=False).logits
    # the logits at position i predict token i+1
    mask = batch["completion_mask"][:, 1:]  # (sequences, length-1)
    targets = batch["input_ids"][:, 1:]
    token_logps = -F.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    per_token_logps = token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)
    return per_token_logps.sum(-1)
