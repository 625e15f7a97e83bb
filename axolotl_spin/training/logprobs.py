"""Log-probabilities of completions: one function, for the policy and the opponent alike, in every layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from axolotl_spin.compat import text_config
from axolotl_spin.training.head import TiledHead, logit_change, selected_logps, tiled_logps
from axolotl_spin.training.layouts import GIVEN
from axolotl_spin.training.masks import SharedMask, shared_block_mask, shared_mask
from axolotl_spin.training.positions import positions_of_pictures


def completion_logps(model: Any, batch: Mapping[str, Tensor], in_head: bool = False) -> Tensor:
    """Sums the log-probs that a model gives to each sequence's completion tokens.

    Goes through the wrapped model's own forward, so that DDP, DeepSpeed, FSDP2 and autocast do what they do in
    training. Only positions that predict a completion token reach the LM head (`logits_to_keep`).

    Args:
        model: A causal language model, wrapped or not.
        batch: As `PairCollator` makes it, in any layout.
        in_head: Takes the log-probs where the LM head gives its logits, for the very positions that are needed, instead of
            from the forward's output, of which accelerate makes an fp32 copy under mixed precision. Right where the model
            does to the logits after its head what its config says, or nothing (see `layout_check`). Only so a large
            vocabulary's logits need not be held (see `head`).

    Returns:
        (sequences,) sums in nats, fp32: all human answers, then all of the opponent's.
    """
    inputs = {"input_ids": batch["input_ids"]}
    given = _given(model, batch)
    inputs |= given
    if "position_ids" in batch:
        placed = positions_of_pictures(_causal_model(model), batch, given) if given else None
        inputs["position_ids"] = batch["position_ids"] if placed is None else placed
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    elif "segments" in batch:
        inputs["attention_mask"] = _mask_for(model, batch["segments"], batch.get("spans"))
    columns = batch["columns"]
    some = {"logits_to_keep": columns} if _keeps_some_logits(model) else {}

    def needed(values: Tensor) -> Tensor:
        """Picks from (rows, positions, size) what predicts an answer's token; returns (answer tokens, size)."""
        values = (values if some else values[:, columns]).flatten(0, 1)
        return values[batch["picks"]] if len(inputs["input_ids"]) > 1 else values

    targets = batch["targets"]
    if in_head:
        causal = _causal_model(model)
        head, change = causal.get_output_embeddings(), logit_change(text_config(causal.config))
        taken: list[Tensor] = []

        def give(logps: Tensor) -> Tensor:
            taken.append(logps)
            return logps[None, :, None]

        hooks = [head.register_forward_pre_hook(lambda _, hidden: (needed(hidden[0])[None], *hidden[1:]))]
        way: AbstractContextManager[Any] = nullcontext()
        tiled = TiledHead.of(head)
        if tiled is not None and tiled.pays(len(targets)):
            way = tiled.giving(lambda products, bias: give(tiled_logps(products, bias, targets, change)))
        else:
            hooks.append(
                head.register_forward_hook(
                    lambda _, __, logits: give(selected_logps(logits[0], targets, change, overwrite=True))
                )
            )
        try:
            with way:
                given = model(**inputs, **some, use_cache=False).logits[0, :, 0]
        finally:
            for hook in hooks:
                hook.remove()
        # FSDP2's mixed precision rounds what a forward gives to bf16. The gradient must pass through it all the same: the
        # hooks of wrappers that gather weights for the backward pass sit there
        token_logps = taken[0] + 0.0 * given.float()
    else:
        token_logps = selected_logps(needed(model(**inputs, **some, use_cache=False).logits), targets)
    lengths = batch["completion_lengths"]
    places = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # (sequences, longest)
    per_token_logps = token_logps.new_zeros(places.shape).masked_scatter(places, token_logps)
    return per_token_logps.sum(-1)


def _given(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a batch has for the forward as it is; in the weights' precision, where nothing else casts it."""
    given = {name.removeprefix(GIVEN): values for name, values in batch.items() if name.startswith(GIVEN)}
    if not given or torch.is_autocast_enabled(batch["input_ids"].device.type):
        return given
    kind = _causal_model(model).dtype
    return {name: values.to(kind) if values.is_floating_point() else values for name, values in given.items()}


def _mask_for(model: Any, segments: Tensor, spans: Tensor | None) -> Any:
    """Returns the shared layout's mask in the form that the model's attention takes.

    Flex attention takes blocks, `eager` adds its mask, the others select by it, or compute what it would leave.
    """
    config = text_config(_causal_model(model).config)
    if config._attn_implementation == "flex_attention":
        return shared_block_mask(segments)
    if config._attn_implementation != "eager":
        return shared_mask(segments) if spans is None else SharedMask.of(segments, spans)
    allowed = shared_mask(segments)
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
