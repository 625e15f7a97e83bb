"""Log-probabilities of completions: one function, for the policy and the opponent alike, in every layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axolotl_spin.compat import text_config
from axolotl_spin.training.layouts import shared_block_mask, shared_mask

# fp32 numbers that exist at once while log-probs are computed: 64 MiB
_CHUNK = 16 * 2**20


def completion_logps(model: Any, batch: Mapping[str, Tensor], in_head: bool = False) -> Tensor:
    """Sums the log-probs that a model gives to each sequence's completion tokens.

    Goes through the wrapped model's own forward, so that DDP, DeepSpeed, FSDP2 and autocast do what they do in
    training. Only positions that predict a completion token reach the LM head (`logits_to_keep`).

    Args:
        model: A causal language model, wrapped or not.
        batch: As `PairCollator` makes it, in any layout.
        in_head: Takes the log-probs where the LM head gives its logits, for the very positions that are needed, instead of
            from the forward's output, of which accelerate makes an fp32 copy under mixed precision. Right where the model
            does nothing to the logits after its head (see `layout_check`).

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
    some = {"logits_to_keep": columns} if _keeps_some_logits(model) else {}

    def needed(values: Tensor) -> Tensor:
        """Picks from (rows, positions, size) what predicts an answer's token; returns (answer tokens, size)."""
        values = (values if some else values[:, columns]).flatten(0, 1)
        return values[batch["picks"]] if len(inputs["input_ids"]) > 1 else values

    def log_probs(logits: Tensor) -> Tensor:
        return selected_logps(logits, batch["targets"], overwrite=in_head)

    if in_head:
        head = _causal_model(model).get_output_embeddings()
        taken: list[Tensor] = []

        def take(_: Any, __: Any, logits: Tensor) -> Tensor:
            taken.append(log_probs(logits[0]))
            return taken[0][None, :, None]

        hooks = [
            head.register_forward_pre_hook(lambda _, hidden: (needed(hidden[0])[None], *hidden[1:])),
            head.register_forward_hook(take),
        ]
        try:
            given = model(**inputs, **some, use_cache=False).logits[0, :, 0]
        finally:
            for hook in hooks:
                hook.remove()
        # FSDP2's mixed precision rounds what a forward gives to bf16. The gradient must pass through it all the same: the
        # hooks of wrappers that gather weights for the backward pass sit there
        token_logps = taken[0] + 0.0 * given.float()
    else:
        token_logps = log_probs(needed(model(**inputs, **some, use_cache=False).logits))
    lengths = batch["completion_lengths"]
    places = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (sequences, longest)
    per_token_logps = token_logps.new_zeros(places.shape).masked_scatter(places, token_logps)
    return per_token_logps.sum(-1)


def _mask_for(model: Any, segments: Tensor) -> Any:
    """Returns the shared layout's mask in the form that the model's attention takes.

    Flex attention takes blocks, `eager` adds its mask, the others select by it.
    """
    config = text_config(_causal_model(model).config)
    if config._attn_implementation == "flex_attention":
        return shared_block_mask(segments)
    allowed = shared_mask(segments)
    if config._attn_implementation != "eager":
        return allowed
    kind = getattr(config, "dtype", None) or torch.float32
    kind = getattr(torch, kind) if isinstance(kind, str) else kind  # a config that was written out has its name
    return torch.zeros_like(allowed, dtype=kind).masked_fill(~allowed, torch.finfo(kind).min)


def _causal_model(model: Any) -> Any:
    """Returns the causal language model inside the wrappers of `torch.compile`, DDP, DeepSpeed and PEFT."""
    model = getattr(model, "_orig_mod", model)
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _keeps_some_logits(model: Any) -> bool:
    """Whether a model's forward takes the positions whose logits are wanted; some models with code of their own do not."""
    return "logits_to_keep" in inspect.signature(_causal_model(model).forward).parameters


class _SelectedLogps(torch.autograd.Function):
    """log softmax(logits)[target] in fp32, a chunk of tokens at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
        chunk = max(1, _CHUNK // logits.shape[-1])
        normalizers, chosen = [], []
        for part, target in zip(logits.split(chunk), targets.split(chunk), strict=True):
            normalizers.append(part.float().logsumexp(-1))
            chosen.append(part.gather(-1, target[:, None]).squeeze(-1).float())
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.overwrite = overwrite
        return torch.cat(chosen) - normalizer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, targets, normalizer = ctx.saved_tensors
        chunk = max(1, _CHUNK // logits.shape[-1])
        gradient = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        for start in range(0, len(logits), chunk):
            rows = slice(start, start + chunk)
            part = torch.sub(logits[rows].float(), normalizer[rows, None]).exp_().mul_(-grad[rows, None])
            part.scatter_add_(-1, targets[rows, None], grad[rows, None])
            gradient[rows] = part
        return gradient, None, None


def selected_logps(logits: Tensor, targets: Tensor, overwrite: bool = False) -> Tensor:
    """Returns the log-prob of each target, computed in fp32 without an fp32 copy of all logits.

    Args:
        logits: (tokens, vocabulary), of any floating type, as the model gives them: scaled, capped and biased.
        targets: (tokens,) ids.
        overwrite: The backward pass writes the gradient where the logits are. Nothing else may need them, and it runs
            once.

    Returns:
        (tokens,) log-probs in nats, fp32.
    """
    return _SelectedLogps.apply(logits, targets, overwrite)
