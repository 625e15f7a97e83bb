"""Quantised weights: which storage holds no numbers, and layers whose kernel depends on `training`."""

from __future__ import annotations

from typing import Any

import torch

# libraries that keep packed bits in tensors of a floating type of several bytes: bitsandbytes where
# `bnb_4bit_quant_storage` says so (the host: bfloat16, or float32), HQQ with `view_as_float`. What the others pack is of
# integers, of floats of one byte, or a tensor class of their own, which shows by itself
_PACKERS = ("bitsandbytes", "hqq")


def compute_as_in_training(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for inference.

    On a CPU with AVX512-BF16 a first forward in `eval()` packs a layer's weight for another kernel, for good: its results
    are others than training's (in bf16 throughout), and training goes on with it and gets no gradient through that layer.
    Of bitsandbytes 0.50; can go when it packs back by itself.

    Args:
        model: Changed in place.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def by_mode(module: torch.nn.Module) -> bool:
    """Whether a layer computes its product in another way in `eval()`: bitsandbytes' of 8 bits do so on a CPU or an XPU.

    There is no noise in such a layer; it can stay in training mode when the policy answers and scores.
    """
    return _of_packers(type(module)) and not list(module.children())


def packed(module: torch.nn.Module, weight: torch.Tensor) -> bool:
    """Whether a weight holds packed bits that stand for numbers only together with their scales.

    Args:
        module: Which the weight belongs to. Sharding may have left it the only one that tells.
        weight: As the module holds it, whole or sharded.
    """
    return _of_packers(type(weight)) or _of_packers(type(module))


def _of_packers(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] in _PACKERS for base in kind.__mro__)
