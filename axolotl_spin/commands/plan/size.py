"""A model counted from its config alone, on the meta device: its weights are never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.dict import DictDefault

from axolotl_spin.commands.plan.towers import Pictures, count_pictures
from axolotl_spin.compat import empty_model, text_config
from axolotl_spin.generation.adapter import saved_adapter
from axolotl_spin.training.towers import freeze_towers


@dataclass(frozen=True)
class ModelSize:
    """A model counted without its weights.

    Attributes:
        parameters: All of them, an adapter's included.
        trainable: Those that are trained.
        quantised: Those that `load_in_4bit` or `load_in_8bit` stores in fewer bits.
        layers, hidden, vocabulary: Of the decoder.
        kv_per_token: Numbers that a token leaves in the cache of keys and values.
        inner: Width of an MLP; of as many experts as a token is given to.
        outside: Parameters that are in no layer of the decoder: embeddings and head.
        head: Parameters of the LM head.
        towers, trained_towers: Parameters beside the language model, and those of them that are trained.
        pictures: What the pictures of a micro-batch hold; why that is not known; None on text.
    """

    parameters: int
    trainable: int
    quantised: int
    layers: int
    hidden: int
    vocabulary: int
    kv_per_token: int
    inner: int = 0
    outside: int = 0
    head: int = 0
    towers: int = 0
    trained_towers: int = 0
    pictures: Pictures | str | None = None


def model_size(cfg: Any, pictures: Mapping[str, torch.Tensor] | None = None) -> ModelSize:
    """Counts the parameters of the config's model on the meta device, with the adapter that the host would add.

    Args:
        cfg: The host's normalized config.
        pictures: What the processor makes of the pictures of a micro-batch; None on text.

    Raises:
        ValueError: The model's config cannot be read or built.
    """
    from axolotl.loaders.utils import load_model_config

    try:
        config = load_model_config(cfg)
        with torch.device("meta"):
            model = empty_model(config, multimodal=bool(cfg.is_multimodal), trusted=bool(cfg.trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the model of `base_model: {cfg.base_model}` cannot be built from its config: {error}"
        ) from error
    text = text_config(config)
    parameters = sum(weight.numel() for weight in model.parameters())
    head = model.get_output_embeddings()
    ends = [part.weight for part in (model.get_input_embeddings(), head) if getattr(part, "weight", None) is not None]
    outside = sum(weight.numel() for weight in {id(weight): weight for weight in ends}.values())
    quantised = 0
    if cfg.load_in_4bit or cfg.load_in_8bit:
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
        quantised = sum(part.weight.numel() for part in linear)
    if cfg.adapter:
        trainable = _adapter_parameters(model, cfg)
        parameters += trainable
    else:
        if not cfg.processor_type or cfg.freeze_mm_modules:  # else pictures train them
            freeze_towers(model)
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    layers = int(getattr(text, "num_hidden_layers", 0) or 0)
    head_dim = int(getattr(text, "head_dim", None) or (hidden // heads if heads else 0))
    return ModelSize(
        parameters,
        trainable,
        quantised,
        layers,
        hidden,
        int(getattr(text, "vocab_size", 0)),
        2 * layers * kv_heads * head_dim,
        _inner(text, hidden),
        outside,
        head.weight.numel() if getattr(head, "weight", None) is not None else 0,
        *_towers(model),
        _pictures(model, cfg, pictures) if pictures else None,
    )


def _towers(model: Any) -> tuple[int, int]:
    """Returns the parameters that are in no part of the language model, and how many of them are trained."""
    if text_config(model.config) is model.config or not hasattr(model, "get_decoder"):
        return 0, 0
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    text = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    beside = [weight for weight in model.parameters() if id(weight) not in text]
    return sum(weight.numel() for weight in beside), sum(weight.numel() for weight in beside if weight.requires_grad)


def _pictures(model: Any, cfg: Any, given: Mapping[str, torch.Tensor]) -> Pictures | str:
    try:
        return count_pictures(model.to(_forward_type(cfg)), given, checkpointing=checkpointed(cfg))
    except ValueError as error:
        return str(error)


def _forward_type(cfg: Any) -> torch.dtype:
    """Returns the type of numbers in the forward pass."""
    if cfg.bf16 or cfg.fp16:
        return torch.bfloat16 if cfg.bf16 else torch.float16
    return cfg.torch_dtype if isinstance(cfg.torch_dtype, torch.dtype) else torch.float32


def _inner(text: Any, hidden: int) -> int:
    """Returns the width of what a token passes through in an MLP."""
    experts = getattr(text, "num_experts_per_tok", None)
    names = ("moe_intermediate_size", "intermediate_size") if experts else ("intermediate_size", "n_inner")
    width: Any = next((getattr(text, name) for name in names if getattr(text, name, None)), 4 * hidden)
    return int(experts or 1) * int(max(width) if isinstance(width, (list, tuple)) else width)


def _adapter_parameters(model: Any, cfg: Any) -> int:
    from axolotl.loaders.adapter import load_lora
    from peft import get_peft_model

    if cfg.lora_model_dir:
        settings = saved_adapter(cfg.lora_model_dir)
        settings.inference_mode = False
    else:
        _, settings = load_lora(model, DictDefault(cfg), config_only=True)
    with torch.device("meta"):
        model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def checkpointed(cfg: Any) -> bool:
    """Whether activations are computed again in the backward pass."""
    return bool(cfg.gradient_checkpointing or (cfg.fsdp_config or {}).get("activation_checkpointing"))
