"""What pictures add to a training step: a tower's activations, counted on tensors that have a shape and no storage.

The model's own code runs over the pictures of the data, and every tensor that it keeps for the backward pass is counted. So
what a frozen tower does not keep is not counted either.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

_META = torch.device("meta")


@dataclass(frozen=True)
class Pictures:
    """What the pictures of a micro-batch hold.

    Attributes:
        kept: Bytes from the tower's forward to its backward pass, the pictures themselves among them.
        again: Bytes that the largest of its layers makes again in the backward pass; 0 without checkpointing.
    """

    kept: int
    again: int = 0


def count_pictures(model: Any, given: Mapping[str, torch.Tensor], *, checkpointing: bool) -> Pictures:
    """Runs a model's tower and what joins it to the language model.

    Args:
        model: On the meta device, in the width of its forward pass, with `requires_grad` as it is trained.
        given: What the processor makes of pictures, along the pictures; on the CPU.
        checkpointing: Whether a layer's activations are computed again in the backward pass.

    Raises:
        ValueError: The model has no such part, or it cannot run without its weights.
    """
    features = getattr(model, "get_image_features", None)
    if features is None:
        raise ValueError(f"{type(model).__name__} has no `get_image_features`")
    taken = inspect.signature(features).parameters
    width = next(model.parameters()).dtype
    pixels = {name: value.to(_META, width) if value.is_floating_point() else value for name, value in given.items()}
    counted = _Kept(model)
    counted.add_batch(given, pixels)
    model.train()
    try:
        with counted.watching(checkpointing), _Kernels(), _Shapes():
            features(**{name: value for name, value in pixels.items() if name in taken})
    except Exception as error:  # a model's code raises what it likes
        raise ValueError(f"{type(model).__name__}: {type(error).__name__}: {error}") from error
    return Pictures(counted.bytes, counted.again)


class _Kept:
    """Adds up the storages that autograd keeps; those of weights stay out.

    Args:
        model: Whose layers are looked at.
    """

    def __init__(self, model: Any):
        self._model = model
        self._held: list[torch.Tensor] = list(model.parameters())  # so that no storage comes again as another one
        self._seen = {_storage(weight) for weight in self._held}
        self.bytes = self.again = 0
        self._inside: int | None = None  # bytes of the layer that runs; None outside of one

    def add_batch(self, given: Mapping[str, torch.Tensor], pixels: Mapping[str, torch.Tensor]) -> None:
        """Counts the batch itself, which is there all the time, and what is given to the model where that is no other."""
        for name, value in given.items():
            self.bytes += value.nbytes
            self._held.append(pixels[name])
            if pixels[name].dtype == value.dtype:
                self._seen.add(_storage(pixels[name]))

    @contextmanager
    def watching(self, checkpointing: bool) -> Iterator[None]:
        """Counts while the context lasts; with checkpointing of a layer what it is given, and the rest by itself."""
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept))
            for layer in self._model.modules() if checkpointing else ():
                if isinstance(layer, GradientCheckpointingLayer):
                    for hook in (
                        layer.register_forward_pre_hook(self._enter),
                        layer.register_forward_hook(self._leave),
                    ):
                        stack.callback(hook.remove)
            yield

    def _enter(self, layer: Any, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
            self._keep(args[0])
        self._inside = 0

    def _leave(self, layer: Any, args: Any, output: Any) -> None:
        self.again, self._inside = max(self.again, self._inside or 0), None

    def _keep(self, value: torch.Tensor) -> torch.Tensor:
        key = _storage(value)
        if key not in self._seen:
            self._seen.add(key)
            self._held.append(value)
            size = value.untyped_storage().nbytes()
            if self._inside is None:
                self.bytes += size
            else:
                self._inside += size
        return value


class _Kernels(TorchFunctionMode):
    """Has attention keep what its kernels keep on a GPU; without a device PyTorch would lay out all of its weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value")
            parts = [*args[:3], *(kwargs[name] for name in names[len(args) :])]
            return torch.ops.aten._scaled_dot_product_flash_attention(*parts)[0]
        return func(*args, **kwargs)


class _Shapes(TorchDispatchMode):
    """Keeps whole numbers, which shapes and places are made of, on the CPU with their values, and the rest without any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        empty = [value.is_meta for value in tensors]
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == _META and not any(empty):
            dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
            whole = not dtype.is_floating_point if dtype else all(isinstance(value, int) for value in tree_leaves(args))
            if whole:
                kwargs["device"] = torch.device("cpu")
        if any(empty) and not all(empty):
            args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to(_META), (args, kwargs))
        return func(*args, **kwargs)


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata
