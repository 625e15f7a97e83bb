"""What the largest tensor is that operations give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the largest figure of a tensor.

    Args:
        figure: Of a tensor that an operation gave.

    Attributes:
        found: The largest so far.
    """

    def __init__(self, figure: Callable[[Tensor], int]):
        super().__init__()
        self.figure, self.found = figure, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, (tuple, list)) else [given]:
            if isinstance(tensor, Tensor):
                self.found = max(self.found, self.figure(tensor))
        return given
