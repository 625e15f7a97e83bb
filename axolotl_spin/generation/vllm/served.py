"""What an engine serves, read from the host's config, and whether it can: all of it before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.logging import get_logger
from packaging.version import Version

from axolotl_spin.compat import text_config
from axolotl_spin.generation.adapter import LORA_RANKS, Adapter, adapter_of, largest_rank, served_rank
from axolotl_spin.generation.chunks import token_limit
from axolotl_spin.generation.vllm.preflight import check_environment
from axolotl_spin.ranks.nodes import ranks_here
from axolotl_spin.settings.generation import VllmConfig
from axolotl_spin.settings.spin import SpinConfig

LOG = get_logger(__name__)

# settings of adapters, by PEFT's names, that no vLLM serves
_UNSERVED = (
    ("use_dora", "vLLM does not serve DoRA"),
    ("modules_to_save", "vLLM does not serve modules that are trained whole beside an adapter"),
    ("target_parameters", "vLLM does not serve adapters of parameters, only of linear modules"),
    ("trainable_token_indices", "vLLM does not serve tokens that are trained beside an adapter"),
    ("layer_replication", "vLLM does not serve adapters that repeat layers"),
    # of a saved adapter alone: the host has no keys for them
    ("lora_bias", "vLLM does not serve adapters with biases"),
    ("alora_invocation_tokens", "vLLM does not serve adapters that begin at a token"),
    ("use_bdlora", "vLLM does not serve block-diagonal LoRA"),
    ("use_qalora", "vLLM does not serve QALoRA"),
)
# how vLLM's plugin for bitsandbytes quantizes a base model, whatever is asked for
_BITSANDBYTES: dict[str, Any] = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
}
# what changes the base model under an adapter, by the host's keys, and an engine that reads `base_model` does not see
_CHANGES_BASE = ("overrides_of_model_kwargs", "base_model_config", "reinit_weights", "fix_untrained_tokens")
_INSTEAD = "; change it, or set `spin.generation.backend: transformers`"
# the first version, by minor, that scales each module of an adapter by its own rank and alpha (`vllm/lora/peft_helper.py`)
_BY_MODULE = Version("0.32")


@dataclass(frozen=True)
class ServedModel:
    """What an engine needs to know of the model that is trained.

    Attributes:
        base_model: The host's key.
        revision: The host's `revision_of_model`.
        trust_remote_code: The host's key.
        dtype: In which the policy computes.
        lora_rank: Of the adapter, the largest of its modules; None for full fine-tuning.
        quantized: The base is held in 4 bits (QLoRA), so the engine quantizes it in the same way.
        longest: Most tokens of a prompt and its answer together.
        multimodal: The model takes more than text.
        pictures: Most in a prompt; 0 where prompts are text.
        by_module: What gives modules of the adapter a rank or alpha of their own, for people; None where nothing does.
        config: The host's `base_model_config`, where it is another than `base_model`.
        overrides: The host's `overrides_of_model_config`.
    """

    base_model: str
    revision: str | None
    trust_remote_code: bool
    dtype: str
    lora_rank: int | None
    quantized: bool
    longest: int
    multimodal: bool = False
    pictures: int = 0
    by_module: str | None = None
    config: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, settings: VllmConfig, opponent: Path | None = None) -> dict[str, Any]:
        """Returns arguments of `vllm.EngineArgs`; those that the user gave come last, and count.

        Args:
            settings: The `spin.generation.vllm`.
            opponent: The whole model to be served; None with an adapter, or to look at the base model.
        """
        arguments: dict[str, Any] = {
            "model": str(opponent or self.base_model),
            "dtype": self.dtype,
            "max_model_len": self.longest,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "trust_remote_code": self.trust_remote_code,
            "skip_tokenizer_init": True,  # ids in, ids out
            "generation_config": "vllm",  # not the model's own, whose top_k or penalties would bend the samples
            # a prompt that is read in parts moves its answer's random numbers on, so that they would depend on the batch
            # (and vLLM's build for CPUs fails on it: "CPU Generator does not use offset")
            "enable_chunked_prefill": False,
            "disable_log_stats": True,
        }
        given = settings.engine_arguments()
        if opponent is None:  # a whole model's files say all that follows
            own = given.get("hf_overrides") or {}
            if self.overrides and isinstance(own, Mapping):
                given["hf_overrides"] = {**self.overrides, **own}
            if self.config:
                arguments["hf_config_path"] = self.config
            if self.revision:
                arguments["revision"] = self.revision
        if self.lora_rank is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": served_rank(self.lora_rank), "max_loras": 1}
        if self.pictures:
            arguments["skip_tokenizer_init"] = False  # processors read text
            arguments["limit_mm_per_prompt"] = {"image": self.pictures, "video": 0, "audio": 0}
        elif self.multimodal:
            arguments["language_model_only"] = True  # no memory for images, and no processor is asked for
        if self.quantized:
            arguments["quantization"] = "bitsandbytes"
        return {**arguments, **given}


def served_model(
    cfg: Any, settings: SpinConfig, prompt_lengths: np.ndarray, pictures: int = 0, tokens: int | None = None
) -> ServedModel:
    """Returns what engines are to serve.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        prompt_lengths: (prompts,) tokens, those of pictures among them.
        pictures: Most in a prompt.
        tokens: In the tokenizer; None where that is not to be looked at.

    Raises:
        ValueError: vLLM cannot serve this adapter over the base model, or `max_model_len` is too small; names the key.
    """
    generation = settings.generation
    engine = generation.vllm
    if cfg.adapter and cfg.adapter not in ("lora", "qlora"):
        raise ValueError(f"`adapter: {cfg.adapter}`: vLLM serves LoRA adapters alone{_INSTEAD}")
    for key in ("qat", "nvfp4_merge_aware"):
        if cfg.get(key):
            raise ValueError(f"`{key}`: vLLM serves the weights as they are, not as quantised in training{_INSTEAD}")
    adapter = adapter_of(cfg) if cfg.adapter else None
    if refused := [*_unserved(adapter, pictures), *_changed(cfg), *_resized(cfg, tokens)] if adapter else []:
        raise ValueError("\n".join(refused))
    limits = (
        int(length) + token_limit(int(length), max_new_tokens=generation.max_new_tokens, sequence_len=cfg.sequence_len)
        for length in np.unique(prompt_lengths)
    )
    longest = max(limits)
    if engine.max_model_len is not None and engine.max_model_len < longest:
        raise ValueError(
            f"`spin.generation.vllm.max_model_len: {engine.max_model_len}` is less than {longest}, the tokens of the "
            "longest prompt with its answer: raise or remove it, or lower `spin.generation.max_new_tokens`"
        )
    if cfg.load_in_8bit:
        LOG.warning(
            "`load_in_8bit: true`: vLLM serves the base model unquantized, so that answers are drawn from a slightly other "
            "distribution than the policy's"
        )
    quantized = bool(adapter and cfg.load_in_4bit)
    for key, own in _BITSANDBYTES.items() if quantized else ():
        given = (cfg.bnb_config_kwargs or {}).get(key, own)
        if given != own:
            LOG.warning(
                f"`bnb_config_kwargs.{key}: {given}`: vLLM quantizes the base model with `{own}` there, so that answers "
                "are drawn from a slightly other distribution than the policy's"
            )
    return ServedModel(
        base_model=str(cfg.base_model),
        revision=cfg.revision_of_model,
        trust_remote_code=bool(cfg.trust_remote_code),
        dtype="bfloat16" if cfg.bf16 or cfg.bfloat16 else "float16" if cfg.fp16 or cfg.float16 else "float32",
        lora_rank=largest_rank(adapter.settings) if adapter else None,
        quantized=quantized,
        longest=longest,
        multimodal=bool(cfg.is_multimodal),
        pictures=pictures,
        by_module=adapter.named(adapter.by_module) if adapter and adapter.by_module else None,
        config=_other_config(cfg),
        overrides=dict(cfg.overrides_of_model_config or {}),
    )


def _unserved(adapter: Adapter, pictures: int) -> list[str]:
    """Returns what in an adapter vLLM cannot serve over the base model, each with its remedy."""
    settings = adapter.settings
    if adapter.saved and settings.get("peft_type") != "LORA":
        return [f"{adapter.named('peft_type')}: vLLM serves LoRA adapters alone{_INSTEAD}"]
    found = [f"{adapter.named(name)}: {why}{_INSTEAD}" for name, why in _UNSERVED if settings.get(name)]
    if settings.get("bias") not in (None, "none"):
        found.append(f"{adapter.named('bias')}: vLLM does not serve adapters with biases{_INSTEAD}")
    targets = settings.get("target_modules")
    names = [targets] if isinstance(targets, str) else list(targets or [])
    if pictures and not (names and all("language_model" in name and "vis" not in name for name in names)):
        found.append(
            f"{adapter.named('target_modules')}: vLLM serves adapters of the language model alone; name its layers by a "
            "pattern such as `model.language_model.layers.[\\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj`, or set "
            "`spin.generation.backend: transformers`"
        )
    if settings.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal"):
        found.append(
            f"{adapter.named('init_lora_weights')}: it changes the base model, which vLLM loads unchanged{_INSTEAD}"
        )
    rank = largest_rank(settings)
    if rank is None:
        found.append("`lora_r` is not set: give the rank of the adapter")
    elif rank > LORA_RANKS[-1]:
        name = "rank_pattern" if rank > int(settings.get("r") or 0) else "r"
        found.append(f"{adapter.named(name)}: vLLM serves ranks up to {LORA_RANKS[-1]}{_INSTEAD}")
    return found


def _other_config(cfg: Any) -> str | None:
    """Returns the host's `base_model_config` where it is another than `base_model`, which the host puts there otherwise."""
    return cfg.base_model_config if cfg.base_model_config != cfg.base_model else None


def _changed(cfg: Any) -> list[str]:
    """Returns which of the host's keys may make another base model of what an engine reads, each with its remedy."""
    values = {key: cfg.get(key) for key in _CHANGES_BASE} | {"base_model_config": _other_config(cfg)}
    return [
        f"`{key}: {value}`: it changes the base model under the adapter, which vLLM loads unchanged{_INSTEAD}"
        for key, value in values.items()
        if value
    ]


def _resized(cfg: Any, tokens: int | None) -> list[str]:
    """Returns why the rows that the host makes for a tokenizer's tokens cannot be served beside an adapter."""
    vocabulary = tokens and getattr(text_config(load_model_config(cfg)), "vocab_size", None)
    if not tokens or not vocabulary:
        return []
    rows = -(-tokens // 32) * 32 if cfg.resize_token_embeddings_to_32x else tokens
    if rows <= vocabulary and not (rows < vocabulary and cfg.shrink_embeddings):
        return []
    return [
        f"the run makes {rows} rows of embeddings for the {tokens} tokens of its tokenizer, and the model of `base_model: "
        f"{cfg.base_model}` has {vocabulary}: vLLM serves adapters over the base model's own rows; leave out what changes "
        "them (`special_tokens`, `tokens`, `resize_token_embeddings_to_32x`, `shrink_embeddings`), take a base model that "
        "has been changed so, or set `spin.generation.backend: transformers`"
    ]


def check_serving(served: ServedModel, settings: VllmConfig) -> None:
    """Checks, on one rank of each node, that engines can serve there; takes seconds.

    Args:
        served: The model.
        settings: The `spin.generation.vllm`.

    Raises:
        ValueError: They cannot; names the key to change.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return
    here, group = ranks_here(otherwise=1), settings.tensor_parallel_size
    if here % group:
        raise ValueError(
            f"`spin.generation.vllm.tensor_parallel_size: {group}` does not divide the {here} rank(s) of this node, each "
            "of which brings one GPU to an engine"
        )
    arguments, on_gpu = served.arguments(settings), torch.cuda.is_available()
    version = check_environment(settings.python, arguments, check_model=True, needs_gpu=on_gpu)
    if served.by_module and Version(Version(version).base_version) < _BY_MODULE:
        raise ValueError(
            f"{served.by_module}: vLLM {version} scales all modules of an adapter alike, so that answers would be another "
            f"model's: install vLLM {_BY_MODULE} or later, or set `spin.generation.backend: transformers`"
        )
    LOG.info(f"answers come from vLLM {version}")
