"""No randomness in the policy's forward: what a model draws in training is switched off, and what remains is found."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from axolotl_spin.training.logprobs import completion_logps

# dropout and layerdrop by all their names (`attn_pdrop`, `drop_path_rate`), and the noise of routers
_DROP, _JITTER = "drop", "jitter"
_NOISY = (_DROP, _JITTER)


def disable_dropout(model: torch.nn.Module) -> list[str]:
    """Sets every dropout of a model to 0, LoRA's and attention's included, as the host's preference trainers do.

    Routers with noise route as in `eval()` throughout. Their rate stays: Phi-MoE's is also how near to the best an expert
    must come to be weighed against it, so that another would make another model of it.

    Args:
        model: Changed in place. Layers keep their rates as plain numbers, or read them from the model's config at each
            forward (Falcon, GPT-J, Persimmon): such a layer gets a config of its own, so that the one that is saved with
            the model stays as it is.

    Returns:
        What was switched off, for the log, as `name=rate` without repetition.
    """
    found: dict[str, float] = {}
    quiet: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            found["dropout"] = module.p
            module.p = 0.0
        for name, rate in noisy(vars(module)).items():
            found[name] = rate
            if _JITTER in name:
                module.register_forward_pre_hook(_as_in_eval)
            else:
                setattr(module, name, 0.0)
        held: Any = vars(module).get("config")
        rates = noisy(vars(held)) if isinstance(held, PreTrainedConfig) else {}
        if rates and not isinstance(module, PreTrainedModel):
            found |= rates
            if id(held) not in quiet:
                quiet[id(held)] = copy.copy(held)
                vars(quiet[id(held)]).update(dict.fromkeys(rates, 0.0))
            vars(module)["config"] = quiet[id(held)]
    return [f"{name}={rate:g}" for name, rate in sorted(found.items())]


def _as_in_eval(module: torch.nn.Module, _: Any) -> None:
    """Switches a module's own noise off, whatever mode the trainer has put it into; what is inside it keeps its mode."""
    module.training = False


def noisy(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the rates above 0 of what draws random numbers, by name, among a module's attributes or a config's keys."""
    return {
        name: value
        for name, value in values.items()
        if any(part in name for part in _NOISY) and isinstance(value, float) and value > 0 and math.isfinite(value)
    }


def noise(model: Any, batch: Mapping[str, Tensor]) -> float:
    """Returns how far two forwards in training mode are from each other on the same pairs, in nats per token.

    Args:
        model: The policy as the trainer wraps it; every rank must call.
        batch: As `PairCollator` makes it.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = batch["input_ids"].device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            first, second = (completion_logps(model, batch) / batch["completion_lengths"] for _ in range(2))
        finally:
            for module, training in modes:
                module.training = training
            if hasattr(model, "reshard"):  # FSDP2: a forward without backward leaves the root's parameters gathered
                model.reshard()
    return float((first - second).abs().nan_to_num(0.0).max())  # what is no number is found by other checks
