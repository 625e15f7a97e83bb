"""Log-probabilities of completions: one function, for the policy and the opponent alike, in every layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axolotl_spin.layouts import shared_block_mask, shared_mask

# fp32 numbers that exist at once while log-probs are computed: 64 MiB
_CHUNK = 16 * 2**20


def completion_logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Sums the log-probs that a model gives to each sequence's completion tokens.

    Goes through the wrapped model's own forward, so that DDP, DeepSpeed, FSDP2 and autocast do what they do in
    training. Only positions that predict a completion token reach the LM head (`logits_to_keep`).

    Args:
        model: A causal language model, wrapped or not.
        batch: As `PairCollator` makes it, in any layout.

    Returns:
        (sequences,) sums in nats, fp32: all human answers, then all of the opponent's.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "position_ids" in batch:
        inputs["position_ids"] = batch["position_ids"]
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    elif "segments" in batch:
        inputs["attention_mask"] = _mask_for(model, batch["segments"])
    columns = batch["columns"]
    if _keeps_some_logits(model):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns]
    logits = logits.flatten(0, 1)
    if len(inputs["input_ids"]) > 1:
        logits = logits[batch["picks"]]
    token_logps = selected_logps(logits, batch["targets"])  # (answer tokens,)
    lengths = batch["completion_lengths"]
    places = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (sequences, longest)
    per_token_logps = token_logps.new_zeros(places.shape).masked_scatter(places, token_logps)
    return per_token_logps.sum(-1)


def _mask_for(model: Any, segments: Tensor) -> Any:
    """Returns the shared layout's mask in the form that the model's attention takes.

    Flex attention takes blocks, `eager` adds its mask, the others select by it.
    """
    config = _causal_model(model).config
    if config._attn_implementation == "flex_attention":
        return shared_block_mask(segments)
    allowed = shared_mask(segments)
    if config._attn_implementation != "eager":
        return allowed
    kind = getattr(config, "dtype", None) or torch.float32
    return torch.zeros_like(allowed, dtype=kind).masked_fill(~allowed, torch.finfo(kind).min)


def _causal_model(model: Any) -> Any:
    """Returns the causal language model inside DDP's, DeepSpeed's and PEFT's wrappers."""
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keeps_some_logits(model: Any) -> bool:
    """Whether a model's forward takes the positions whose logits are wanted; some models with code of their own do not."""
    return "logits_to_keep" in inspect.signature(_causal_model(model).forward).parameters


class _SelectedLogps(torch.autograd.Function):
    """log softmax(logits)[target] in fp32, a chunk of tokens at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chunk = max(1, _CHUNK // logits.shape[-1])
        normalizers, chosen = [], []
        for part, target in zip(logits.split(chunk), targets.split(chunk), strict=True):
            normalizers.append(part.float().logsumexp(-1))
            chosen.append(part.gather(-1, target[:, None]).squeeze(-1).float())
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(logits, targets, normalizer)
        return torch.cat(chosen) - normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets, normalizer = ctx.saved_tensors
        chunk = max(1, _CHUNK // logits.shape[-1])
        gradient = torch.empty_like(logits)
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            part = torch.sub(logits[rows].float(), normalizer[rows, None]).exp_().mul_(-grad[rows, None])
            part.scatter_add_(-1, targets[rows, None], grad[rows, None])
            gradient[rows] = part
        return gradient, None


def selected_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the log-prob of each target, computed in fp32 without an fp32 copy of all logits.

    Args:
        logits: (tokens, vocabulary), of any floating type, as the model gives them: scaled, capped and biased.
        targets: (tokens,) ids.

    Returns:
        (tokens,) log-probs in nats, fp32.
    """
    return _SelectedLogps.apply(logits, targets)
