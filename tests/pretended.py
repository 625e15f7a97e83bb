"""A GPU that is not there: tensors which say that they lie on it, and compute on the CPU.

Each operation is first asked of torch's own fake tensors of a CUDA device, which need none and know the rules: tensors of
two devices do not mix, but for numbers without dimensions, and indices, from the CPU. Then it is done on the CPU, so that
there are values to go on with. The pretended device is called `meta`, the only one beside the CPU on which every build of
torch differentiates. What is CUDA's alone (kernels, streams, random states, how much memory is free) is not pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

GPU = torch.device("meta")
_JUDGED_AS = torch.device("cuda", 0)
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class OnGpu(Tensor):
    """A tensor on the pretended GPU.

    Args:
        held: What it is, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        looks = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=GPU, **looks)

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    def tolist(self) -> Any:
        """Returns the values, which torch does not do for subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return NotImplemented if _other_kinds(types) else _done(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes tensors on the pretended GPU where it is asked for by name."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in _other_kinds(types):
            with self:  # what such a tensor makes itself is made here too
                return kind.__torch_dispatch__(func, types, args, kwargs)
        there = _is_gpu(kwargs.get("device")) or any(isinstance(each, OnGpu) for each in tree_leaves((args, kwargs)))
        return _done(func, args, kwargs) if there else func(*args, **kwargs)


def _other_kinds(types: Any) -> list[Any]:
    """Returns kinds of tensors that answer for themselves, such as a mask that is one by its looks."""
    return [kind for kind in types if kind not in (Tensor, torch.nn.Parameter, OnGpu)]


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == GPU.type


def _done(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Does an operation on the CPU, once it has been found to be allowed."""
    places = _places(func, args, kwargs)
    held_args, held_kwargs = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
    if _is_gpu(held_kwargs.get("device")):
        held_kwargs["device"] = torch.device("cpu")
    held = func(*held_args, **held_kwargs)

    def placed(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        if next(places):
            return OnGpu(out)
        # a copy to the CPU is one, though the values lie there already
        return out.clone() if any(out is each for each in tree_leaves(held_args)) else out

    return return_and_correct_aliasing(func, args, kwargs, tree_map(placed, held))


def _places(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[bool]:
    """Returns for each tensor that an operation gives whether it lies on the GPU.

    Raises:
        RuntimeError: It mixes devices.
    """
    leaves = tree_leaves((args, kwargs))
    given = [each for each in leaves if isinstance(each, Tensor)]
    assert all(isinstance(each, OnGpu) or each.device != GPU for each in given), (
        f"{func} is given a tensor of no device"
    )
    places = [(isinstance(each, OnGpu), each.dim() == 0) for each in given]
    if func in _INDEXED:
        _check_indices(func, args)
        return repeat(places[0][0])
    # which device it is does not depend on values or shapes
    key = (func, *places, *(_is_gpu(each) for each in leaves if isinstance(each, torch.device)))
    if key not in _KNOWN:
        _KNOWN[key] = _asked(func, args, kwargs, places)
    known = _KNOWN[key]
    return repeat(known[0]) if len(set(known)) == 1 else iter(known)


_KNOWN: dict[Any, list[bool]] = {}


def _check_indices(func: Any, args: Any) -> None:
    """What is on a GPU takes indices from there and from the CPU, what is on the CPU from there alone; values likewise if
    they are one number. Fake tensors are less strict, and look at the values of masks."""
    there = isinstance(args[0], OnGpu)
    indices = [each for each in args[1] if each is not None]
    values = [each for each in args[2:3] if isinstance(each, OnGpu) != there and (there is False or each.dim())]
    if values or (not there and any(isinstance(each, OnGpu) for each in indices)):
        raise RuntimeError(f"{func} is given indices or values of another device")


def _asked(func: Any, args: Any, kwargs: dict[str, Any], places: list[tuple[bool, bool]]) -> list[bool]:
    with FakeTensorMode():

        def shown(tensor: Tensor) -> Tensor:
            where = _JUDGED_AS if isinstance(tensor, OnGpu) else tensor.device
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where)

        asked, how = tree_map_only(
            Tensor, shown, (args, {k: v if k != "generator" else None for k, v in kwargs.items()})
        )
        if _is_gpu(how.get("device")):
            how["device"] = _JUDGED_AS
        try:
            found = func(*asked, **how)
        except (DataDependentOutputException, DynamicOutputShapeException):  # what comes of it depends on values
            if len({there for there, number in places if not number}) > 1:
                raise RuntimeError(f"{func} is given tensors of two devices") from None
            return [places[0][0]]
    return [out.device.type == _JUDGED_AS.type for out in tree_leaves(found) if isinstance(out, Tensor)] or [False]


@contextmanager
def a_gpu() -> Iterator[torch.device]:
    """Yields the pretended GPU, which can be asked for within the context."""
    made, autocast, enabled, generator = torch.tensor, torch.autocast, torch.is_autocast_enabled, torch.Generator

    def tensor(*args: Any, device: Any = None, **how: Any) -> Tensor:
        return OnGpu(made(*args, **how)) if _is_gpu(device) else made(*args, device=device, **how)

    # they do not ask what a device pretends to be
    changes = {
        "tensor": tensor,
        "autocast": lambda kind, *args, **how: nullcontext() if kind == GPU.type else autocast(kind, *args, **how),
        "is_autocast_enabled": lambda kind=None: kind != GPU.type and (enabled(kind) if kind else enabled()),
        "Generator": lambda device="cpu": generator("cpu" if _is_gpu(device) else device),
    }
    with patch.multiple(torch, **changes), _Factories():
        yield GPU


def moved(module: Any) -> Any:
    """Returns a module with its weights and buffers on the pretended GPU; changed in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = torch.nn.Parameter(OnGpu(weight.detach()), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnGpu(buffer)
    return module


def back(tensor: Tensor) -> Tensor:
    """Returns a tensor of the pretended GPU on the CPU."""
    assert isinstance(tensor, OnGpu), "it lies on the CPU"
    return tensor.held
