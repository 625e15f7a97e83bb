"""The policy without what a launch wraps around it: DDP, DeepSpeed, `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.other import is_compiled_module


def bare(model: Any, accelerator: Any) -> Any:
    """Returns the policy itself, not compiled: each answered token would be a shape of its own to compile for.

    accelerate's way to keep the compiled one takes DDP out of the very module that trains, and hands out one whose forward
    goes through DDP all the same: with collectives that a rank with fewer batches does not take part in.

    Args:
        model: The policy as the trainer wraps it.
        accelerator: The trainer's.
    """
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def as_trained(model: Any, accelerator: Any) -> Any:
    """Returns the policy itself, compiled where the trainer's is: the opponent is rounded as the policy will be.

    Args:
        model: The policy as the trainer wraps it.
        accelerator: The trainer's.
    """
    policy = bare(model, accelerator)
    if not is_compiled_module(model):
        return policy
    return torch.compile(policy, **accelerator.state.dynamo_plugin.to_kwargs())
