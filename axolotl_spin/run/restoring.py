"""A checkpoint's weights in the model that goes on, also where it was saved in another form than it has in memory.

`save_pretrained` writes many models in the form of their first checkpoints: towers under other names, experts one by one
that are a single tensor in memory. The Trainer restores tensors by their names in memory and warns of the others, so that
such a model would go on with the weights that it was started from. `from_pretrained` reads what `save_pretrained` wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from axolotl_spin.disk.atomic import DamagedFileError, read_json

LOG = get_logger(__name__)

_NAMED = 5  # tensors in a message


def restore(model: Any, folder: Path) -> bool:
    """Copies a checkpoint's weights into a whole model, where names and shapes in memory are not those on disk.

    A second copy of the weights is held on the CPU meanwhile.

    Args:
        model: The policy, not wrapped; its parameters stay the same objects.
        folder: A checkpoint, or a saved model.

    Returns:
        Whether that was done. Where it was not, the Trainer restores every tensor by its name: of an adapter, or of a model
        that is saved as it is.

    Raises:
        DamagedFileError: Tensors of the model are not in the checkpoint, or have another shape there; names them.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    shapes = saved_shapes(folder)
    if not shapes or saved_as_in_memory(model, shapes):
        return False
    state = _of_this_model(model)
    try:
        found, lacking = _read(model, state, folder, model.dtype)
        # some tensors may be held in a wider type than the model's class holds them in
        if any(_narrower(tensor, state.get(name)) for name, tensor in found.items()):
            del found
            kinds = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
            found, lacking = _read(model, state, folder, reduce(torch.promote_types, kinds))
    except RuntimeError as error:  # experts that no longer make one tensor: which ones is only in the library's log
        raise _unlike(folder, _not_on_disk(model, state, shapes)) from error
    lacking |= {name for name, tensor in state.items() if name not in found or found[name].shape != tensor.shape}
    if lacking:
        raise _unlike(folder, lacking)
    model.load_state_dict({name: found[name] for name in state}, strict=False)
    LOG.info(f"{len(state)} tensors of {folder} were read in the form that the model has in memory")
    return True


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a saved model's tensors by their names on disk; empty without a model in safetensors files."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        files = {SAFE_WEIGHTS_NAME}
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        files = set(read_json(folder / SAFE_WEIGHTS_INDEX_NAME)["weight_map"].values())
    else:
        return {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        with safe_open(folder / name, framework="pt") as file:
            shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())})
    return shapes


def saved_as_in_memory(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model's tensors lie on disk by the names, in the shapes and with the values that they have in memory.

    Args:
        model: The model.
        shapes: See `saved_shapes`. Of tensors that are tied one is enough.
    """
    # transformers keeps the conversions that it loaded a model by, and saves it by their reverse; a model without the note
    # was made in another way
    if getattr(model, "_weight_conversions", True):
        return False
    state = _of_this_model(model)
    there = {_place(state[name]) for name in shapes if name in state}
    return all(name in state and tuple(state[name].shape) == shape for name, shape in shapes.items()) and all(
        _place(tensor) in there for tensor in state.values()
    )


def _of_this_model(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors that a model is saved with."""
    unsaved = set(model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in unsaved}


def _read(
    model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> tuple[dict[str, Tensor], set[str]]:
    """Returns a saved model's tensors as they are in memory, and the names of those that are not on disk in this shape."""
    told: dict[str, Any]
    loaded: Any
    loaded, told = type(model).from_pretrained(
        str(folder),
        config=copy.deepcopy(model.config),
        dtype=dtype,
        attn_implementation="eager",  # every model has it, and it needs nothing
        ignore_mismatched_sizes=True,  # they are told here, with what is missing
        output_loading_info=True,
    )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in told["mismatched_keys"]}
    return loaded.state_dict(), (set(told["missing_keys"]) | mismatched) & state.keys()


def _narrower(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.promote_types(one.dtype, other.dtype) != one.dtype


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Returns what tied tensors have in common."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape)


def _not_on_disk(model: PreTrainedModel, state: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> set[str]:
    """Returns the names on disk under which a model would be saved and that are not there."""
    once = {_place(tensor): (name, tensor) for name, tensor in reversed(list(state.items()))}
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in once.values()}
    return revert_weight_conversion(model, empty).keys() - shapes.keys()


def _unlike(folder: Path, lacking: Collection[str]) -> DamagedFileError:
    names = ", ".join(sorted(lacking)[:_NAMED]) + (", ..." if len(lacking) > _NAMED else "")
    return DamagedFileError(
        f"{folder} does not hold the model that is trained: missing there, or of another shape, are {len(lacking)} of its "
        f"tensors ({names}). Set `resume_from_checkpoint` to another checkpoint, or `auto_resume_from_checkpoints: false` "
        "to start from the beginning"
    )
