"""What an engine serves, read from the host's config, and whether it can: all of it before a model is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger

from axolotl_spin.generation.chunks import token_limit
from axolotl_spin.generation.vllm.preflight import check_environment
from axolotl_spin.settings.generation import VllmConfig
from axolotl_spin.settings.spin import SpinConfig

LOG = get_logger(__name__)

# ranks of adapters that vLLM has kernels for
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServedModel:
    """What an engine needs to know of the model that is trained.

    Attributes:
        base_model: The host's key.
        revision: The host's `revision_of_model`.
        trust_remote_code: The host's key.
        dtype: In which the policy computes.
        lora_rank: Of the adapter; None for full fine-tuning.
        quantized: The base is held in 4 bits (QLoRA), so the engine quantizes it in the same way.
        longest: Most tokens of a prompt and its answer together.
        multimodal: The model takes more than text.
        pictures: Most in a prompt; 0 where prompts are text.
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
        if opponent is None and self.revision:
            arguments["revision"] = self.revision
        if self.lora_rank is not None:
            rank = next((rank for rank in _LORA_RANKS if rank >= self.lora_rank), self.lora_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        if self.pictures:
            arguments["skip_tokenizer_init"] = False  # processors read text
            arguments["limit_mm_per_prompt"] = {"image": self.pictures, "video": 0, "audio": 0}
        elif self.multimodal:
            arguments["language_model_only"] = True  # no memory for images, and no processor is asked for
        if self.quantized:
            arguments["quantization"] = "bitsandbytes"
        return {**arguments, **settings.engine_arguments()}


def served_model(cfg: Any, settings: SpinConfig, prompt_lengths: np.ndarray, pictures: int = 0) -> ServedModel:
    """Returns what engines are to serve.

    Args:
        cfg: The host's normalized config.
        settings: Its `spin` block.
        prompt_lengths: (prompts,) tokens, those of pictures among them.
        pictures: Most in a prompt.

    Raises:
        ValueError: vLLM cannot serve this adapter over the base model, or `max_model_len` is too small; names the key.
    """
    generation = settings.generation
    engine = generation.vllm
    refused = _unserved(cfg, pictures)
    if refused:
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
    adapter = bool(cfg.adapter)
    return ServedModel(
        base_model=str(cfg.base_model),
        revision=cfg.revision_of_model,
        trust_remote_code=bool(cfg.trust_remote_code),
        dtype="bfloat16" if cfg.bf16 else "float16" if cfg.fp16 else "float32",
        lora_rank=int(cfg.lora_r) if adapter else None,
        quantized=adapter and bool(cfg.load_in_4bit),
        longest=longest,
        multimodal=bool(cfg.is_multimodal),
        pictures=pictures,
    )


def _unserved(cfg: Any, pictures: int) -> list[str]:
    """Returns what in an adapter vLLM cannot serve over the base model, each with its remedy."""
    instead = "; change it, or set `spin.generation.backend: transformers`"
    if not cfg.adapter:
        return []
    if cfg.adapter not in ("lora", "qlora"):
        return [f"`adapter: {cfg.adapter}`: vLLM serves LoRA adapters alone{instead}"]
    found = []
    for key, why in (
        ("peft_use_dora", "vLLM does not serve DoRA"),
        ("lora_modules_to_save", "vLLM does not serve modules that are trained whole beside an adapter"),
        ("lora_target_parameters", "vLLM does not serve adapters of parameters, only of linear modules"),
    ):
        if cfg.get(key):
            found.append(f"`{key}: {cfg.get(key)}`: {why}{instead}")
    targets = cfg.get("lora_target_modules")
    if pictures and not (isinstance(targets, str) and "language_model" in targets and "vis" not in targets):
        found.append(
            f"`lora_target_modules: {targets}`: vLLM serves adapters of the language model alone; name its layers by a "
            "pattern such as `model.language_model.layers.[\\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj`, or set "
            "`spin.generation.backend: transformers`"
        )
    start = cfg.get("peft_init_lora_weights")
    if start not in (None, True, False, "gaussian", "orthogonal"):
        found.append(
            f"`peft_init_lora_weights: {start}`: it changes the base model, which vLLM loads unchanged{instead}"
        )
    if cfg.lora_r and int(cfg.lora_r) > _LORA_RANKS[-1]:
        found.append(f"`lora_r: {cfg.lora_r}`: vLLM serves ranks up to {_LORA_RANKS[-1]}{instead}")
    return found


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
    here, group = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), settings.tensor_parallel_size
    if here % group:
        raise ValueError(
            f"`spin.generation.vllm.tensor_parallel_size: {group}` does not divide the {here} rank(s) of this node, each "
            "of which brings one GPU to an engine"
        )
    arguments, on_gpu = served.arguments(settings), torch.cuda.is_available()
    version = check_environment(settings.python, arguments, check_model=True, needs_gpu=on_gpu)
    LOG.info(f"answers come from vLLM {version}")
