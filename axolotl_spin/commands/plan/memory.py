"""What a run needs of memory on each rank, from the model's config alone: its weights are never loaded.

Weights, gradients and optimizer state follow from the number of parameters and how they are kept. What a step holds besides
is of a usual decoder (see `moments`). Whatever cannot be told is left out and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from axolotl_spin.commands.plan.moments import Holding, held
from axolotl_spin.commands.plan.size import ModelSize, checkpointed
from axolotl_spin.commands.plan.towers import Pictures
from axolotl_spin.training.head import logits_held
from axolotl_spin.training.layouts import masks_in_parts

# buffers as large as the trained weights that an optimizer keeps
_STATE = {"adam": 2, "rmsprop": 1, "lion": 1, "sgd": 0}


@dataclass(frozen=True)
class Load:
    """What is computed at once on a rank.

    Attributes:
        ranks: Of the launch.
        sharding: See `Launch`.
        training_tokens: Of the largest micro-batch of pairs.
        answer_tokens: Among them, those of answers.
        generation_tokens: That the cache of keys and values has room for: prompts and answers that are written at once.
        pairs: In that micro-batch.
        mask: Bytes of its mask of tokens x tokens in the shared layout.
    """

    ranks: int
    sharding: str | None
    training_tokens: int
    answer_tokens: int
    generation_tokens: int
    pairs: int = 1
    mask: int = 0


def estimate_memory(size: ModelSize, cfg: Any, load: Load) -> dict[str, Any]:
    """Estimates bytes on each rank.

    Args:
        size: The model's.
        cfg: The host's normalized config.
        load: What is computed at once.

    Returns:
        Bytes under `weights`, `gradients`, `optimizer`, `activations` and `answering`, `None` where unknown; `training` is
        the sum of the first four; and `notes`.
    """
    notes: list[str] = []
    width = torch.empty(0, dtype=cfg.torch_dtype).element_size() if isinstance(cfg.torch_dtype, torch.dtype) else 4
    zero = int(load.sharding[-1]) if load.sharding and load.sharding.startswith("ZeRO") else 0
    fsdp = load.sharding == "FSDP2"
    half = bool(cfg.bf16 or cfg.fp16)
    frozen = size.parameters - size.trainable
    stored = width
    trained_width = 4 if cfg.adapter else width  # PEFT keeps adapters in fp32
    bits = 0.516 if cfg.load_in_4bit else 1.0  # with double quantisation's constants
    weights = (frozen - size.quantised if cfg.adapter else 0) * stored + size.quantised * bits
    weights += size.trainable * trained_width
    several = int(cfg.gradient_accumulation_steps or 1) > 1
    gradients = float(size.trainable * (2 if zero and half else trained_width))
    state = _optimizer_bytes(size.trainable, 4 if zero else trained_width, cfg, notes)
    if zero and state is not None:
        state += 4 * size.trainable
        notes.append("ZeRO keeps an fp32 copy of trained weights beside the optimizer's state")
    whole = weights
    if fsdp or zero == 3:
        weights /= load.ranks
    if fsdp and several:
        # accelerate reduces them after a step's last micro-batch alone; until then each rank has those of its own pairs
        gradients = float(size.trainable * (2 if half else trained_width))
        notes.append("FSDP2 keeps whole gradients on every rank where gradient_accumulation_steps is more than 1")
    elif fsdp or zero >= 2:
        gradients /= load.ranks
    if state is not None and (fsdp or zero >= 1):
        state /= load.ranks
    offload = _offloaded(cfg)
    if "optimizer" in offload and state is not None:
        notes.append(f"the optimizer's {gib(state)} are in main memory (offload)")
        state = 0.0
    if "param" in offload:
        notes.append(f"{gib(weights)} of weights are in main memory (offload)")
        weights = 0.0
    pictures = size.pictures if isinstance(size.pictures, Pictures) else None
    logits = load.answer_tokens * size.vocabulary * (2 if half else 4)
    if not cfg.torch_compile:
        logits = logits_held(load.answer_tokens, size.vocabulary, 2 if half else 4)
    activations = held(
        Holding(
            tokens=load.training_tokens,
            layers=size.layers,
            hidden=size.hidden,
            inner=size.inner or 4 * size.hidden,
            layer=(size.parameters - size.outside - size.towers) / max(1, size.layers),
            outside=size.outside + size.towers,
            frozen=size.towers - size.trained_towers,
            head=size.head,
            width=2 if half else 4,
            logits=logits,
            adapter=bool(cfg.adapter),
            checkpointing=checkpointed(cfg),
            gathered=fsdp,
            gradients=gradients,
            accumulated=several,
            pictures=pictures.kept if pictures else 0,
            again=pictures.again if pictures else 0,
        )
    ) + _mask(size, cfg, load, 2 if half else 4)
    notes.append(
        "activations are of a usual decoder, with what FSDP2 gathers for a layer; kernels and allocators differ"
    )
    if isinstance(size.pictures, str):
        notes.append(
            f"what a tower computes for pictures is not counted, since that is not known here: {size.pictures}"
        )
    if pictures:
        notes.append(
            "pictures are counted before each answer, as in padded rows; in shared rows, which a start tries, half as often"
        )
    if zero == 3:
        notes.append("what DeepSpeed gathers and reduces at once (its buckets) is not counted")
    cache = load.generation_tokens * size.kv_per_token * (2 if half else width)
    answering = cache + (whole if fsdp or zero == 3 else 0)
    if fsdp or zero == 3:
        notes.append(
            "while answering, the whole weights are held as well where they fit (spin.generation.gather_weights)"
        )
    known = [part for part in (weights, gradients, state, activations) if part is not None]
    return {
        "parameters": size.parameters,
        "trainable": size.trainable,
        "ranks": load.ranks,
        "sharding": load.sharding,
        "weights": int(weights),
        "gradients": int(gradients),
        "optimizer": None if state is None else int(state),
        "activations": int(activations),
        **({"towers": size.towers, "pictures": pictures.kept if pictures else None} if size.pictures else {}),
        "training": int(sum(known)) if len(known) == 4 else None,
        "answering": int(answering),
        "notes": notes,
    }


def _optimizer_bytes(trainable: int, width: int, cfg: Any, notes: list[str]) -> float | None:
    name = str(getattr(cfg.optimizer, "value", cfg.optimizer) or "").lower()
    if "adafactor" in name or "came" in name:
        notes.append(f"`optimizer: {name}` keeps factored state, which is small and not counted")
        return 0.0
    kind = next((kind for kind in _STATE if kind in name), None)
    if kind is None or any(word in name for word in ("galore", "apollo", "4bit", "fp8", "optimi")):
        notes.append(f"how much state `optimizer: {name}` keeps is not known here")
        return None
    if "paged" in name:
        notes.append("a paged optimizer moves its state to main memory where the GPU's runs out")
    return trainable * _STATE[kind] * (1 if "8bit" in name else width)


def _offloaded(cfg: Any) -> set[str]:
    zero = (cfg.deepspeed.get("zero_optimization") or {}) if isinstance(cfg.deepspeed, dict) else {}
    found = {
        part for part in ("optimizer", "param") if (zero.get(f"offload_{part}") or {}).get("device") in ("cpu", "nvme")
    }
    if (cfg.fsdp_config or {}).get("offload_params"):
        found |= {"optimizer", "param"}
    return found


def _mask(size: ModelSize, cfg: Any, load: Load, width: int) -> int:
    """Returns the bytes of the mask, where one is made, with the copy that each layer's kernel keeps of it."""
    attention = str(getattr(cfg.attn_implementation, "value", cfg.attn_implementation) or "sdpa")
    if cfg.sample_packing is False or attention not in ("sdpa", "eager"):
        return 0
    if attention == "sdpa" and not cfg.torch_compile and masks_in_parts(load.mask, load.pairs):
        return 0
    return load.mask * (1 + width * (1 if attention == "eager" or cfg.gradient_checkpointing else size.layers))


def gib(count: float | None, digits: int = 1) -> str:
    """Returns bytes as people read them; unknown where there is no figure."""
    return "unknown" if count is None else f"{count / 2**30:.{digits}f} GiB"
