"""A model counted from its config alone, on the meta device: its weights are never loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.dict import DictDefault

from axolotl_spin.commands.plan.towers import Pictures, count_pictures
from axolotl_spin.compat import empty_model, text_config
from axolotl_spin.generation.adapter import saved_adapter
from axolotl_spin.training.layouts import Layout
from axolotl_spin.training.preferred_layout import preferred_layout
from axolotl_spin.training.towers import freeze_towers

# what the host loads a model with where it puts another attention in its place
_LOADED_WITH = {"fp8": "sdpa", "varlen": "eager"}
# layers that leave a state instead of keys and values, or nothing
_WITHOUT_KEYS = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")


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
        trained_outside: Those of `outside` that are trained.
        upcast, trained_upcast: Parameters of embeddings and head by the names that the host knows, which may be in fp32
            (see `memory`), and those of them that are trained.
        embedding: Those of embeddings that are trained.
        experts: Parameters of experts that are no linear layers, but lie in one tensor.
        layout: Of a micro-batch of text, as a start will ask of the model.
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
    trained_outside: int = 0
    upcast: int = 0
    trained_upcast: int = 0
    embedding: int = 0
    experts: int = 0
    layout: Layout = "shared"


def model_size(cfg: Any, pictures: Mapping[str, torch.Tensor] | None = None) -> ModelSize:
    """Counts the parameters of the config's model on the meta device, with the adapter that the host would add.

    Args:
        cfg: The host's normalized config.
        pictures: What the processor makes of the pictures of a micro-batch; None on text.

    Raises:
        ValueError: The model's config cannot be read or built.
    """
    from axolotl.loaders.utils import load_model_config
    from axolotl.utils.freeze import freeze_layers_except

    try:
        config = load_model_config(cfg)
        with torch.device("meta"):
            model = empty_model(config, multimodal=bool(cfg.is_multimodal), trusted=bool(cfg.trust_remote_code))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the model of `base_model: {cfg.base_model}` cannot be built from its config: {error}"
        ) from error
    text = text_config(config)
    head = model.get_output_embeddings()
    ends = [model.get_input_embeddings(), head]
    outside = [part.weight for part in ends if getattr(part, "weight", None) is not None]
    upcast = _upcast(model, cfg)
    experts = [weight for name, weight in model.named_parameters() if weight.dim() > 2 and "expert" in name.lower()]
    linear = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    packed = [*linear, *(experts if cfg.quantize_moe_experts else [])]
    quantised = _count(packed) if cfg.load_in_4bit or cfg.load_in_8bit else 0
    embeddings = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    stacked = _count(experts)
    policy = _adapted(model, cfg) if cfg.adapter else model
    if cfg.unfrozen_parameters:
        freeze_layers_except(policy, cfg.unfrozen_parameters)
    if not cfg.processor_type or cfg.freeze_mm_modules:  # else pictures train them
        freeze_towers(policy)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    towers, trained_towers = _towers(model)
    return ModelSize(
        parameters=_count(policy.parameters()),
        trainable=_trained(policy.parameters()),
        quantised=quantised,
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden=hidden,
        vocabulary=int(getattr(text, "vocab_size", 0)),
        kv_per_token=_kv_per_token(text, hidden),
        inner=_inner(text, hidden),
        outside=_count(outside),
        head=head.weight.numel() if getattr(head, "weight", None) is not None else 0,
        towers=towers,
        trained_towers=trained_towers,
        pictures=_pictures(model, cfg, pictures) if pictures else None,
        trained_outside=_trained(outside),
        upcast=_count(upcast),
        trained_upcast=_trained(upcast),
        embedding=_trained(embeddings),
        experts=stacked,
        layout=_layout(model.config, cfg),
    )


def _count(weights: Iterable[torch.Tensor]) -> int:
    """Returns how many numbers are in weights, each of which counts once."""
    return sum(weight.numel() for weight in {id(weight): weight for weight in weights}.values())


def _trained(weights: Iterable[torch.Tensor]) -> int:
    return _count(weight for weight in weights if weight.requires_grad)


def _upcast(model: Any, cfg: Any) -> list[torch.Tensor]:
    """Returns the weights that the host takes for embeddings and head, by the names of their modules."""
    from axolotl.loaders.utils import get_linear_embedding_layers

    names = get_linear_embedding_layers(cfg.model_config_type)
    parts = [part for name, part in model.named_modules() if any(word in name for word in names)]
    found = [getattr(part, "weight", None) for part in parts]
    return [weight for weight in found if isinstance(weight, torch.nn.Parameter)]


def _layout(config: Any, cfg: Any) -> Layout:
    """Returns the layout that a model's attention should take; a start tries whether it does."""
    if cfg.attn_implementation:
        asked = str(getattr(cfg.attn_implementation, "value", cfg.attn_implementation))
        config = copy.deepcopy(config)  # the model runs over pictures here, where that attention may be missing
        config._attn_implementation = _LOADED_WITH.get(asked, asked)
    return preferred_layout(config, sample_packing=cfg.sample_packing, longest=int(cfg.sequence_len or 0))[0]


def _kv_per_token(text: Any, hidden: int) -> int:
    """Returns how many numbers a token leaves in the cache, over all layers that keep keys and values of their own."""

    def of(name: str) -> int:
        return int(getattr(text, name, 0) or 0)

    heads, layers = of("num_attention_heads"), of("num_hidden_layers")
    each = 2 * (of("num_key_value_heads") or heads) * (of("head_dim") or (hidden // heads if heads else 0))
    if of("kv_lora_rank"):  # keys and values come out of what lies in the cache
        each = of("kv_lora_rank") + of("qk_rope_head_dim")
        if of("index_topk"):  # but for sparse attention, which keeps them, and the keys by which it chooses
            each = heads * (of("qk_nope_head_dim") + of("qk_rope_head_dim") + of("v_head_dim")) + of("index_head_dim")
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * layers)
    own = kinds[: len(kinds) - of("num_kv_shared_layers")]
    return each * sum(kind not in _WITHOUT_KEYS for kind in own)


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


def _adapted(model: Any, cfg: Any) -> Any:
    """Returns a model with the adapter that the host would add; layers are replaced in the model itself."""
    from axolotl.loaders.adapter import load_lora
    from peft import get_peft_model

    if cfg.lora_model_dir:
        settings = saved_adapter(cfg.lora_model_dir)
        settings.inference_mode = False
    else:
        _, settings = load_lora(model, DictDefault(cfg), config_only=True)
    with torch.device("meta"):
        return get_peft_model(model, settings, autocast_adapter_dtype=False)


def checkpointed(cfg: Any) -> bool:
    """Whether activations are computed again in the backward pass."""
    return bool(cfg.gradient_checkpointing or (cfg.fsdp_config or {}).get("activation_checkpointing"))
