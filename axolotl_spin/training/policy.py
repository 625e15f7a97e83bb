"""What is done to the policy as a module: it is put to sleep as the opponent, and its weights are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from axolotl_spin.training.quantised import by_mode, packed


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Puts the policy into `eval()` as the opponent, and each part of it back afterwards; gradient checkpointing is not
    touched, and quantised layers go on computing as in training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        module.training = by_mode(module)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if hasattr(model, "reshard"):  # FSDP2: a forward without backward leaves the root's parameters gathered
            model.reshard()


def nonfinite_weights(model: torch.nn.Module, frozen: bool = False) -> list[str]:
    """Returns the names of parameters with a NaN or infinite value in what this rank holds of them.

    Args:
        model: The policy, wrapped or not. Of a sharded parameter only this rank's shard is read.
        frozen: Read those too that are not trained, but for quantised storage, which holds no numbers.
    """
    found = []
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad or (frozen and parameter.is_floating_point())):
            continue
        held = held_by_this_rank(parameter)
        plain = type(held) is torch.Tensor and held.dtype.itemsize > 1  # else a quantised one's storage
        if plain and not torch.isfinite(held).all() and not packed(_owner(model, name), parameter):
            found.append(name)
    return found


def held_by_this_rank(parameter: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of a parameter: its shard where it is sharded, without a copy."""
    held = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3 leaves the parameter itself empty
    held = held.to_local() if hasattr(held, "to_local") else held  # FSDP2's DTensor
    return held.data


def _counted_elsewhere(parameter: torch.Tensor) -> bool:
    """Whether another rank holds the same of a parameter and counts it: with several replicas of FSDP2's shards."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return False
    placed: Any = parameter
    places = mesh.get_coordinate() or [1] * mesh.ndim  # a rank that is not in the mesh holds nothing
    return any(how.is_replicate() and place for how, place in zip(placed.placements, places, strict=True))


def _owner(model: torch.nn.Module, name: str) -> torch.nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def weights_digest(model: torch.nn.Module, accelerator: Any) -> str:
    """Returns a sum over the bits of all weights: the same for the same weights, on any number of ranks.

    It tells apart weights that were drawn when a model was loaded (rows of added tokens, an adapter that does not begin as
    nothing), not a permutation of them. Quantised weights are read from disk and left out.

    Args:
        model: The policy, wrapped or not; every rank must call.
        accelerator: The trainer's.
    """
    total = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    parts = False
    for name, parameter in model.named_parameters():
        held = held_by_this_rank(parameter)
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3's last shards are filled up
            filled: Any = parameter
            before = filled.ds_tensor.ds_numel * accelerator.process_index
            held = held.flatten()[: max(0, filled.ds_numel - before)]
        parts = parts or hasattr(parameter, "ds_tensor") or hasattr(parameter, "to_local")
        plain = type(held) is torch.Tensor and held.is_floating_point() and held.dtype.itemsize > 1
        if plain and not _counted_elsewhere(parameter) and not packed(_owner(model, name), parameter):
            for piece in held.flatten().split(1 << 24):  # fp32 holds every half-precision number exactly
                total += piece.float().view(torch.int32).sum(dtype=torch.int64).to(total.device)
    return f"{(accelerator.reduce(total, 'sum') if parts else total).item():x}"


def refuse_untrained(model: torch.nn.Module, *, adapter: bool) -> None:
    """Refuses a policy of which nothing is trained: it would end as it began, hours later and without a word.

    Args:
        model: The policy, with what is trained marked.
        adapter: Whether it has one.

    Raises:
        ValueError: Names the keys that choose what is trained.
    """
    if any(weight.requires_grad for weight in model.parameters()):
        return
    names = "; an adapter's weights have names that begin with `base_model.model.`" if adapter else ""
    raise ValueError(
        "nothing of the model is trained: `unfrozen_parameters` (and `lora_target_modules` with an adapter) reach none of "
        f"its weights{names}. Remove `unfrozen_parameters`, or write patterns that match"
    )
