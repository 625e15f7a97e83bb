"""Tiny models of every architecture that is tested, from their config classes, with random weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

# by the names that configs have for them; each config takes those that it knows
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 64, "ffn_hidden_size": 64, "n_inner": 64},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4},
    **{"num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 4, "sliding_window": 8},
    **{"max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "initializer_range": 0.2},
    **{"hidden_size_per_layer_input": 8, "global_head_dim": 8, "pad_token_id": 0, "bos_token_id": 2},
    **{"eos_token_id": 6},
    # mixtures of experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_k": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1},
    **{"moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # latent attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    # state-space and linear attention
    **{"state_size": 8, "time_step_rank": 4, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_n_groups": 1, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "mamba_dt_rank": 4, "mamba_expand": 2},
    **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"layer_types": None},
}
# parts of a model that no text reaches
TOWER: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1},
    **{"image_size": 16, "patch_size": 8, "num_channels": 3, "out_hidden_size": 32, "num_heads": 2},
    **{"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
}


@dataclass(frozen=True)
class Architecture:
    """One that is tested.

    Attributes:
        changes: To the text part's config.
        outer: To the config of a model of several parts, beside its text part's.
        tower: To the configs of its other parts.
        run: To the config of the run.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] = field(default_factory=dict)
    tower: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


FULL_AND_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
# layers that take the keys and values of earlier ones
SHARED_KV = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
LATENT = {"num_key_value_heads": 4}
EAGER = {"attn_implementation": "eager"}  # with sdpa transformers adds a mask of truth values to the indexer's scores
UNLIMITED = {"sliding_window": None}

# by the type of their configs: those that are trained most, then the others
ARCHITECTURES: dict[str, Architecture] = {
    "gemma3": Architecture(FULL_AND_SLIDING, {"mm_tokens_per_image": 1}),
    "gemma3_text": Architecture(FULL_AND_SLIDING),
    "gemma4": Architecture(SHARED_KV, tower={"head_dim": 8, "subsampling_conv_channels": [4, 4]}),
    "gemma4_text": Architecture(SHARED_KV),
    "gemma4_unified": Architecture(FULL_AND_SLIDING, tower={"mm_embed_dim": 16, "mm_posemb_size": 16}),
    "llama4": Architecture({"attention_chunk_size": 8, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]}),
    "mistral3": Architecture(UNLIMITED),
    "qwen3_5": Architecture(LINEAR_AND_FULL),
    "qwen3_5_moe": Architecture(LINEAR_AND_FULL),
    "voxtral": Architecture(),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(),
    "gpt_oss": Architecture(FULL_AND_SLIDING),
    "olmo3": Architecture(FULL_AND_SLIDING),
    "glm4": Architecture(),
    "phi3": Architecture(UNLIMITED),
    "granitemoehybrid": Architecture(LINEAR_AND_FULL),
    "lfm2": Architecture({"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": Architecture(),
    "nemotron_h": Architecture(),
    "apertus": Architecture(),
    "arcee": Architecture(),
    "bitnet": Architecture(),
    "cohere": Architecture(),
    "cohere2": Architecture(FULL_AND_SLIDING),
    "dbrx": Architecture(
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v2": Architecture(LATENT),
    "deepseek_v3": Architecture(LATENT),
    "deepseek_v4": Architecture(
        {
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            **{
                "mlp_layer_types": ["hash_moe", "moe"],
                "index_topk": 2,
                "index_head_dim": 16,
                "index_n_heads": 16,
            },  # few heads tie
        }
    ),
    "ernie4_5": Architecture(),
    "ernie4_5_moe": Architecture(),
    "exaone4": Architecture(FULL_AND_SLIDING),
    "falcon": Architecture(),
    "falcon_mamba": Architecture(),
    "gemma": Architecture(),
    "gemma2": Architecture(FULL_AND_SLIDING),
    "gemma3n": Architecture({**SHARED_KV, "laurel_rank": 8}),
    "gemma3n_text": Architecture({**SHARED_KV, "laurel_rank": 8, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}),
    "glm4_moe": Architecture(),
    "glm_moe_dsa": Architecture({**LATENT, "index_topk": 4, "index_n_heads": 16, "index_head_dim": 16}, run=EAGER),
    "gpt2": Architecture(),
    "gptj": Architecture(),
    "gpt_neox": Architecture(),
    "granite": Architecture(),
    "granitemoe": Architecture(),
    "hunyuan_v1_dense": Architecture(),
    "hunyuan_v1_moe": Architecture(),
    "jamba": Architecture({"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "kimi_linear": Architecture(LATENT),
    "llama": Architecture(),
    "mamba": Architecture(),
    "mamba2": Architecture({"num_heads": 4, "head_dim": 16}),
    "minimax_m2": Architecture(),
    "ministral": Architecture(),
    "ministral3": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(UNLIMITED),
    "nemotron": Architecture(),
    "olmo2": Architecture(),
    "olmo_hybrid": Architecture(LINEAR_AND_FULL),
    "phi": Architecture(),
    "phimoe": Architecture(UNLIMITED),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(),
    "qwen2_5_vl": Architecture(
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    ),
    "qwen3_next": Architecture(LINEAR_AND_FULL),
    "qwen3_vl": Architecture(),
    "seed_oss": Architecture(),
    "smollm3": Architecture(),
    "stablelm": Architecture(),
    "starcoder2": Architecture(),
}
# what a host itself cannot train, up to which version, and why
HOST_CANNOT: dict[str, tuple[str, str]] = {
    "voxtral": ("0.21", "the host's patch of it asks for a part that the model does not have"),
}


@functools.cache
def lacking(name: str) -> str:
    """Returns what an architecture needs that is not here; empty where it runs."""
    if name not in CONFIG_MAPPING:
        return "its transformers does not know it"
    try:
        build(name, 47)(input_ids=torch.tensor([[7, 8, 9]]), use_cache=False)
    except ImportError as error:
        needed, but, _ = str(error).strip().partition(" but it was not found in your environment")  # transformers'
        if not but:
            raise
        return needed
    except RuntimeError as error:
        if "active drivers" not in str(error):  # Triton's
            raise
        return "its kernels that are installed need a GPU"
    return ""


def config_of(name: str, vocabulary: int) -> Any:
    """Returns the small config of an architecture.

    Raises:
        KeyError: The installed transformers does not know it.
    """
    kind, how = CONFIG_MAPPING[name], ARCHITECTURES[name]
    plain = kind()
    text = plain.get_text_config()
    sizes = {**SIZES, "vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}

    def small(part: Any, sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        names = {*vars(part), *getattr(type(part), "__annotations__", {}), *part.attribute_map}
        chosen = {key: value for key, value in sizes.items() if key in names}
        if chosen.get("layer_types", 1) is None:
            del chosen["layer_types"]
        return {**chosen, **changes}

    if text is plain:
        return kind(**small(plain, sizes, how.changes))
    parts = {}
    for key, part_kind in kind.sub_configs.items():
        part = getattr(plain, key) or part_kind()
        wanted = small(part, sizes, how.changes) if part is text else small(part, TOWER, how.tower)
        parts[key] = {"model_type": part.model_type, **wanted}
    return kind(**parts, **small(plain, {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 6}, {}), **how.outer)


def model_class(name: str) -> Any:
    """Returns what loads a model of an architecture, as the host chooses it."""
    if name not in MULTIMODAL_AUTO_MODEL_MAPPING:
        return AutoModelForCausalLM
    kind = MULTIMODAL_AUTO_MODEL_MAPPING[name]
    return AutoModelForImageTextToText if isinstance(kind, str) else kind


def build(name: str, vocabulary: int, seed: int = 0) -> Any:
    """Returns a tiny model, all of whose weights are random and large."""
    torch.manual_seed(seed)
    kind, config = model_class(name), config_of(name, vocabulary)
    return enlarged(kind.from_config(config) if hasattr(kind, "from_config") else kind(config))


def enlarged(model: Any) -> Any:
    """Gives a model random weights so large that a wrong mask or a lost input shows; returns it, in fp32."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
            else:
                weight.add_(torch.randn(weight.shape), alpha=0.05)
    return model.float()


def save(name: str, folder: Path) -> Any:
    """Writes a tiny model with its tokenizer, and with a processor where it takes more than text; returns the model."""
    tokenizer = tiny.tokenizer()
    model = build(name, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name in MULTIMODAL_AUTO_MODEL_MAPPING:
        save_processor(tokenizer, folder)
    return model


def save_processor(tokenizer: Any, folder: Path) -> None:
    """Writes a processor that needs no library beyond Pillow, whatever the model is."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    LlavaProcessor(
        CLIPImageProcessorPil(), tokenizer, patch_size=8, image_token="<|user|>", chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
