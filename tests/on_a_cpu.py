"""A test-only plugin: kernels and offloading that the host writes for a GPU run on a CPU.

Triton's interpreter (`TRITON_INTERPRET=1`, from before Triton is imported) runs the kernels; what the host sets onto `cuda`
belongs on the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin


class OnCpuPlugin(BasePlugin):
    """Has fused LoRA kernels and activation offloading run on a CPU."""

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.activation_offloading:
            _offload_on_a_cpu()
        if cfg.lora_mlp_kernel:
            import axolotl.kernels.swiglu

            axolotl.kernels.swiglu.torch = SimpleNamespace(**{**vars(torch), "empty": _empty})


def _empty(*size: Any, device: Any, **how: Any) -> torch.Tensor:
    return torch.empty(*size, device="cpu" if device == "cuda" else device, **how)


def _offload_on_a_cpu() -> None:
    """Has TRL's offloading give back copies of all that it is handed, as if it had been elsewhere and back.

    What it does to the model's modules (hooks on the head, which keep the logits where they are) is left as it is.
    """
    from trl.models.activation_offloading import OffloadActivations

    class Copies(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(lambda saved: saved.detach().clone(), lambda kept: kept)
            self.tracker: dict[int, Any] = {}

        def update_model_params(self, *_: Any) -> None:
            pass

    OffloadActivations.__new__ = staticmethod(lambda *_, **__: Copies())
