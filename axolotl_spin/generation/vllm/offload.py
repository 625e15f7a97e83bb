"""What training holds on a device, put aside in the host's memory while something else needs the device, and brought back.

It works on storages, not on tensors: a storage is emptied and later filled again with the same bytes, so that all its
views stay views of it, such as parameters in DeepSpeed's flat buffers or FSDP2's shards. No layout needs code of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

LOG = get_logger(__name__)

# objects of these libraries are looked into; of others, such as the host's datasets, nothing is training's
_LIBRARIES = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes", "axolotl")


@contextmanager
def offloaded(roots: Sequence[Any], device: torch.device) -> Iterator[int]:
    """Moves weights, gradients, buffers and optimizer state to the CPU for as long as the context lasts.

    Nothing that the roots hold may be used within it. Afterwards every tensor is what it was, bit for bit.

    Args:
        roots: The model and the optimizer, as the trainer wraps them.
        device: Where what is moved lies.

    Yields:
        The bytes that were moved.

    Raises:
        MemoryError: The host's memory does not hold them; nothing was moved.
    """
    held = [storage for storage in device_storages(roots, device) if storage.resizable()]
    size = sum(storage.nbytes() for storage in held)
    available = psutil.virtual_memory().available
    if size > available:
        raise MemoryError(
            f"`spin.generation.vllm.offload: true` needs {size / 2**30:.1f} GiB of the host's memory on this rank, and "
            f"{available / 2**30:.1f} GiB are available: set it to false, or lower `gpu_memory_utilization` instead"
        )
    started = time.perf_counter()
    kept = []
    try:
        for storage in held:
            kept.append((storage, storage.nbytes(), storage.clone() if device.type == "cpu" else storage.cpu()))
            storage.resize_(0)
        _release(device)
        LOG.info(f"{size / 2**30:.2f} GiB of training moved to the CPU in {time.perf_counter() - started:.1f} s")
        yield size
    finally:
        started = time.perf_counter()
        while kept:
            storage, count, content = kept.pop()
            storage.resize_(count)
            storage.copy_(content)
        LOG.info(f"brought back in {time.perf_counter() - started:.1f} s")


def _release(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()


def device_storages(roots: Sequence[Any], device: torch.device) -> list[torch.UntypedStorage]:
    """Returns every storage on a device that is reached from some objects, each once.

    Args:
        roots: Modules, optimizers, or what wraps them.
        device: Which device; one without a number is the only one of its kind (accelerate's, of a single process).
    """
    storages: dict[int, torch.UntypedStorage] = {}
    seen: dict[int, Any] = {}  # holds on to the objects, whose numbers must stay theirs
    waiting = deque(roots)
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen[id(found)] = found
        if isinstance(found, Tensor):
            waiting.extend(_parts(found))
            there = found.device.type == device.type and device.index in (None, found.device.index)
            if there and not is_traceable_wrapper_subclass(found) and found.layout == torch.strided:
                storage = found.untyped_storage()
                if storage.nbytes():
                    storages[storage._cdata] = storage
        elif isinstance(found, dict):
            waiting.extend([*found.keys(), *found.values()])
        elif isinstance(found, (list, tuple, set, frozenset, deque)):
            waiting.extend(found)
        elif not isinstance(found, type) and type(found).__module__.partition(".")[0] in _LIBRARIES:
            waiting.append(getattr(found, "__dict__", {}))
    return list(storages.values())


def _parts(tensor: Tensor) -> list[Any]:
    """Returns what a tensor carries along: its gradient, attributes (ZeRO-3's shard), and inner tensors (FSDP2's shard)."""
    parts: list[Any] = [tensor.__dict__]
    if tensor.is_leaf and tensor.grad is not None:
        parts.append(tensor.grad)
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts += [getattr(tensor, name) for name in names]
    return parts
