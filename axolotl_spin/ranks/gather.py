"""Sharded weights (ZeRO-3, FSDP2), held whole during a phase without gradients: gathered once, not at every forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch
from accelerate.utils import DistributedType
from axolotl.utils.logging import get_logger
from torch import nn

from axolotl_spin.ranks.nodes import ranks_here

LOG = get_logger(__name__)

Gather = Literal["auto", True, False]

# of the free memory, so much may be taken by whole weights; the rest is for keys and values, and for activations
_SHARE = 0.5


def sharded(accelerator: Any) -> bool:
    """Whether a forward on one rank needs the others, for their shards of the weights."""
    if accelerator.num_processes == 1:
        return False
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return kind == DistributedType.FSDP


@contextmanager
def whole_weights(model: Any, accelerator: Any, gather: Gather) -> Iterator[bool]:
    """Gathers sharded weights on every rank for as long as the context lasts; nothing is done to weights that are whole.

    Within it no gradient may be computed and no weight changed. Afterwards each rank holds what it held before.

    Args:
        model: The policy as the trainer wraps it; every rank must call.
        accelerator: The trainer's.
        gather: The `spin.generation.gather_weights`; "auto" gathers where the whole weights take at most half of every
            rank's free memory.

    Yields:
        Whether a rank's forward still needs the other ranks.
    """
    if not sharded(accelerator):
        yield False
        return
    if gather == "auto":
        needed, free = _whole_bytes(model), _free_bytes(accelerator)
        short = torch.tensor([float(needed > _SHARE * free)], device=accelerator.device)
        gather = not bool(accelerator.reduce(short, "sum").item())
        gib = f"they take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on rank 0"
        LOG.info(f"sharded weights {'are gathered for the phase' if gather else 'stay sharded'}: {gib}")
    if accelerator.distributed_type == DistributedType.FSDP:
        # the root's own weights are gathered in any case: its forward leaves them so, and `generate` may call a part of it
        with _fsdp_whole(model, accelerator, recurse=bool(gather)):
            yield not gather
    elif not gather:
        yield True
    else:
        with _zero3_whole(model):
            yield False


def _whole_bytes(model: nn.Module) -> int:
    """Returns the bytes of all weights together: DTensors and ZeRO-3's parameters know their whole size."""
    return sum(getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in model.parameters())


def _free_bytes(accelerator: Any) -> float:
    """Returns the memory that this rank may take: its accelerator's, or its part of the machine's."""
    device = accelerator.device
    if device.type == "cpu":
        return psutil.virtual_memory().available / ranks_here(otherwise=accelerator.num_processes)
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    except (RuntimeError, ValueError, AttributeError) as error:  # not every kind of device tells
        LOG.warning(
            f"{device} does not tell how much of its memory is free ({error}), so sharded weights stay sharded; where they "
            "fit, `spin.generation.gather_weights: true` is faster"
        )
        return 0.0


@contextmanager
def _fsdp_whole(model: Any, accelerator: Any, recurse: bool) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule) and (recurse or module is model)]
    kept = accelerator.state.fsdp_plugin.reshard_after_forward
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # the root is never resharded by its own forward: FSDP2's default, since backward comes next
            part.set_reshard_after_forward(kept and part is not model, recurse=False)


@contextmanager
def _zero3_whole(engine: Any) -> Iterator[None]:
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)  # they gather before each module's forward, and let go of the weights after it
        # one more compares the ranks at the start of each forward, of which a rank may now have more than another
        compare = offload.module._forward_pre_hooks[offload.fwd_pre_hook.id]
        offload.fwd_pre_hook.remove()
        try:
            yield
        finally:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(compare)
            add_hooks(engine)
