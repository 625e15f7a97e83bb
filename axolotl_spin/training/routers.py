"""Mixtures of experts: what their routers give beside the logits is left out of every forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from axolotl_spin.compat import text_config


def leave_out_router_logits(model: torch.nn.Module) -> bool:
    """Has a model compute no router logits, nor the auxiliary loss of them, whatever its config says.

    That loss is of the tokens of a forward with its 2-D mask. It breaks where a forward has some of the mask's tokens alone
    (answering, with keys and values kept) or a mask for each pair (the shared layout), and SPIN's loss has no part for it.

    Args:
        model: The policy, with its adapter but no other wrapper. Its config stays as it is.

    Returns:
        Whether the config asks for them.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    asked = bool(getattr(text_config(base.config), "output_router_logits", False))
    taken = inspect.signature(base.forward).parameters
    takes = "output_router_logits" in taken or any(one.kind is one.VAR_KEYWORD for one in taken.values())
    if asked and takes:

        def without(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return args, {**kwargs, "output_router_logits": False}

        # an adapter passes keywords on; PEFT 0.20 does so past the base's hooks, and `generate` calls the base alone
        for part in {model, base}:
            part.register_forward_pre_hook(without, with_kwargs=True)
    return asked
