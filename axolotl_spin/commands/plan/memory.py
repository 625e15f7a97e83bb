"""What a run needs of memory on each rank, from the model's config alone: its weights are never loaded.

Weights, gradients and optimizer state follow from the number of parameters and how they are kept. What a step holds besides
is of a usual decoder (see `moments`). Whatever cannot be told is left out and said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from axolotl_spin.commands.plan.moments import Holding, held
from axolotl_spin.commands.plan.optimizers import state_bytes
from axolotl_spin.commands.plan.size import ModelSize, checkpointed
from axolotl_spin.commands.plan.towers import Pictures
from axolotl_spin.training.head import logits_held
from axolotl_spin.training.layouts import Layout, masks_in_parts


@dataclass(frozen=True)
class Load:
    """What is computed at once on a rank.

    Attributes:
        ranks: Of the launch.
        sharding: See `Launch`.
        training_tokens: Of the largest micro-batch of pairs, padding included.
        answer_tokens: Among them, those of answers.
        generation_tokens: That the cache of keys and values has room for: prompts and answers that are written at once.
            None where an engine answers.
        pairs: In that micro-batch.
        mask: Bytes of its mask of tokens x tokens, where its layout has one.
        layout: Of that micro-batch.
    """

    ranks: int
    sharding: str | None
    training_tokens: int
    answer_tokens: int
    generation_tokens: int | None
    pairs: int = 1
    mask: int = 0
    layout: Layout = "shared"


def estimate_memory(size: ModelSize, cfg: Any, load: Load) -> dict[str, Any]:
    """Estimates bytes on each rank.

    Args:
        size: The model's.
        cfg: The host's normalized config.
        load: What is computed at once.

    Returns:
        Bytes under `weights`, `gradients`, `optimizer`, `activations` and `answering`, `None` where unknown; `training` is
        the sum of the first four; and `notes`. `answering` is None, too, where an engine answers.
    """
    notes: list[str] = []
    width = _width(cfg)
    zero = int(load.sharding[-1]) if load.sharding and load.sharding.startswith("ZeRO") else 0
    fsdp = load.sharding == "FSDP2"
    half = bool(cfg.bf16 or cfg.fp16)
    computed = 2 if half else width
    frozen = size.parameters - size.trainable
    trained_width = 4 if cfg.adapter else width  # PEFT keeps adapters in fp32
    bits = 0.516 if cfg.load_in_4bit else 1.0  # with double quantisation's constants
    upcast, trained_upcast = (size.upcast, size.trained_upcast) if _ends_in_fp32(cfg, load.sharding) else (0, 0)
    experts = size.experts if _unpacked_in_fp32(cfg, load.sharding) else 0
    weights = (frozen - size.quantised) * width + size.quantised * bits + size.trainable * trained_width
    weights += (4 - width) * (upcast + experts)
    if (cfg.load_in_4bit or cfg.load_in_8bit) and size.experts and not cfg.quantize_moe_experts:
        taken = gib(size.experts * (4 if experts else width))
        notes.append(f"{taken} of weights are experts, which are not quantised without `quantize_moe_experts: true`")
    several = int(cfg.gradient_accumulation_steps or 1) > 1
    gradient_width = 2 if zero and half else trained_width
    gradients = float(size.trainable * gradient_width + (4 - width) * trained_upcast)
    state = state_bytes(size, cfg, width=4 if zero else trained_width, upcast=trained_upcast, notes=notes)
    if zero and state is not None:
        state += 4 * size.trainable
        notes.append("ZeRO keeps an fp32 copy of trained weights beside the optimizer's state")
    whole = weights
    shards = _shards(cfg, load.ranks) if fsdp else load.ranks
    if fsdp or zero == 3:
        weights /= shards
    if fsdp and several:
        # accelerate reduces them after a step's last micro-batch alone; until then each rank has those of its own pairs
        gradients = float(size.trainable * (2 if half else trained_width))
        notes.append("FSDP2 keeps whole gradients on every rank where gradient_accumulation_steps is more than 1")
    elif fsdp or zero >= 2:
        gradients /= shards
    if state is not None and (fsdp or zero >= 1):
        state /= shards
    offload = _offloaded(cfg)
    if ("param" in offload and not several) if fsdp else (zero >= 2 and "optimizer" in offload):
        notes.append(f"{gib(gradients)} of gradients are in main memory (offload)")
        gradients = 0.0
    if "optimizer" in offload and state is not None:
        notes.append(f"the optimizer's {gib(state)} are in main memory (offload)")
        state = 0.0
    if "param" in offload:
        notes.append(f"{gib(weights)} of weights are in main memory (offload)")
        weights = 0.0
    pictures = size.pictures if isinstance(size.pictures, Pictures) else None
    logits = load.answer_tokens * size.vocabulary * computed
    if not cfg.torch_compile:
        logits = logits_held(load.answer_tokens, size.vocabulary, computed)
    activations = held(
        Holding(
            tokens=load.training_tokens,
            layers=size.layers,
            hidden=size.hidden,
            inner=size.inner or 4 * size.hidden,
            layer=(size.parameters - size.outside - size.towers) / max(1, size.layers),
            outside=size.outside + size.towers,
            share=1 - (size.trained_outside + size.trained_towers) / max(1, size.trainable),
            head=size.head,
            width=computed,
            logits=logits,
            adapter=bool(cfg.adapter),
            checkpointing=checkpointed(cfg),
            gathered=fsdp,
            resharded=(cfg.fsdp_config or {}).get("reshard_after_forward") is not False,
            gradients=gradients,
            accumulated=several,
            pictures=pictures.kept if pictures else 0,
            again=pictures.again if pictures else 0,
        )
    ) + _mask(size, cfg, load, computed)
    if zero in (1, 2) and "optimizer" not in offload:
        # a step begins with a rank's own part of the gradients once more, in fp32; others and activations are gone by then
        activations = max(activations, (4 + gradient_width) * size.trainable / load.ranks - gradients)
    if load.sharding is None and load.ranks > 1:
        notes.append(f"{gib(gradients)} of gradients are DDP's buckets, which hold all of them once more")
        gradients *= 2
    notes += _what_is_left_out(size, cfg, load, zero)
    answering: float | None = None
    if load.generation_tokens is not None:
        answering = load.generation_tokens * size.kv_per_token * computed + (whole if fsdp or zero == 3 else 0)
    if fsdp or zero == 3:
        when = "answering" if load.generation_tokens is not None else "scoring"
        notes.append(
            f"while {when}, the whole weights are held as well where they fit (spin.generation.gather_weights)"
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
        "answering": None if answering is None else int(answering),
        "notes": notes,
    }


def saved_bytes(size: ModelSize, cfg: Any, sharding: str | None) -> int:
    """Returns the bytes that an iteration's model, or its adapter, takes on disk.

    Args:
        size: The model's.
        cfg: The host's normalized config.
        sharding: See `Launch`.
    """
    if cfg.adapter:
        return 4 * size.trainable
    width = _width(cfg)
    return width * size.parameters + (4 - width) * (size.upcast if _ends_in_fp32(cfg, sharding) else 0)


def _what_is_left_out(size: ModelSize, cfg: Any, load: Load, zero: int) -> list[str]:
    """Says what the figures are of, and what they leave out."""
    notes = ["activations are of a usual decoder, with what FSDP2 gathers for a layer; kernels and allocators differ"]
    if load.layout != "shared" and not size.pictures:
        how = {"packed": "end to end", "padded": "as padded rows"}[load.layout]
        notes.append(f"a micro-batch is counted {how}, where a prompt stands before each of its answers")
    if _attention(cfg) == "eager":
        notes.append("`attn_implementation: eager` holds scores of tokens x tokens in each head, which are not counted")
    if isinstance(size.pictures, str):
        notes.append(
            f"what a tower computes for pictures is not counted, since that is not known here: {size.pictures}"
        )
    if isinstance(size.pictures, Pictures):
        notes.append(
            "pictures are counted before each answer, as in padded rows; in shared rows, which a start tries, half as often"
        )
    if zero:
        notes.append("what DeepSpeed gathers and reduces at once (its buckets) is not counted")
    if any("spectrum" in str(name).lower() for name in cfg.plugins or []):
        notes.append("Spectrum chooses what is trained when the model loads: here it is all of the model")
    if load.generation_tokens is None:
        notes.append("vLLM's engines have memory of their own (spin.generation.vllm), which is not counted")
    return notes


def _width(cfg: Any) -> int:
    """Returns the bytes of a number as the weights are loaded."""
    return torch.empty(0, dtype=cfg.torch_dtype).element_size() if isinstance(cfg.torch_dtype, torch.dtype) else 4


def _ends_in_fp32(cfg: Any, sharding: str | None) -> bool:
    """Whether embeddings and head stay in fp32, as the host loads them (`ModelLoader._configure_embedding_dtypes`)."""
    return not (sharding or cfg.adapter or cfg.attn_needs_dtype_cast or cfg.cut_cross_entropy)


def _unpacked_in_fp32(cfg: Any, sharding: str | None) -> bool:
    """Whether PEFT casts to fp32 what is not quantised beside quantised weights; the host casts back embeddings alone."""
    sharded = cfg.adapter == "qlora" or (cfg.fsdp_config or {}).get("cpu_ram_efficient_loading")
    left = sharding == "ZeRO-3" or (sharding == "FSDP2" and sharded) or cfg.quantize_moe_experts
    return bool((cfg.load_in_4bit or cfg.load_in_8bit) and cfg.adapter in ("lora", "qlora") and not left)


def _shards(cfg: Any, ranks: int) -> int:
    """Returns how many ranks hold the weights together under FSDP2; others may hold copies of their shards."""
    if (cfg.dp_shard_size or 1) > 1:
        return min(int(cfg.dp_shard_size), ranks)
    return max(1, ranks // int(cfg.dp_replicate_size or 1))


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
    attention = _attention(cfg)
    if attention not in ("sdpa", "eager"):
        return 0
    shared = load.layout == "shared"
    if shared and attention == "sdpa" and not cfg.torch_compile and masks_in_parts(load.mask, load.pairs):
        return 0
    return load.mask * (1 + width * (1 if attention == "eager" or checkpointed(cfg) else size.layers))


def _attention(cfg: Any) -> str:
    return str(getattr(cfg.attn_implementation, "value", cfg.attn_implementation) or "sdpa")


def gib(count: float | None, digits: int = 1) -> str:
    """Returns bytes as people read them; unknown where there is no figure."""
    return "unknown" if count is None else f"{count / 2**30:.{digits}f} GiB"
