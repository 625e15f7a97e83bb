"""How the opponent answers (`spin.generation`): keys, bounds and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from axolotl_spin.settings.block import Block

# most tokens of an answer where `spin.generation.max_new_tokens` is not set
DEFAULT_MAX_NEW_TOKENS = 512


class VllmConfig(Block):
    """The vLLM engines (`spin.generation.vllm`): these keys, and any engine argument of vLLM by its own name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    python: str | None = Field(
        default=None,
        description="Path of the Python that has vLLM, possibly in another environment. Default: the one that trains.",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="GPUs of one engine; the ranks of a node are grouped by so many."
    )
    gpu_memory_utilization: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of each GPU's memory for the engine. Default: nine tenths of what training leaves free.",
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="Most tokens of a prompt and its answer together. Default: `sequence_len`."
    )
    offload: bool = Field(
        default=False,
        description="Move weights, gradients and optimizer state to the CPU while the engine runs.",
    )
    stall_seconds: float = Field(
        default=600.0, gt=0, description="An engine without progress for so long is ended, and the run stops."
    )

    @model_validator(mode="after")
    def _ours(self) -> VllmConfig:
        for key in self.model_extra or {}:
            if key in ENGINE_KEYS_OF_OURS:
                raise ValueError(
                    f"spin.generation.vllm.{key} is set by this plugin ({ENGINE_KEYS_OF_OURS[key]}): remove it"
                )
        return self

    def engine_arguments(self) -> dict[str, Any]:
        """Returns what the user gave of vLLM's engine arguments."""
        own = ("gpu_memory_utilization", "max_model_len")
        given = {key: getattr(self, key) for key in own if getattr(self, key) is not None}
        return {**given, **(self.model_extra or {})}


# engine arguments that cannot be the user's, and what they follow from
ENGINE_KEYS_OF_OURS = {
    "model": "from `base_model` or the opponent on disk",
    "tokenizer": "prompts and answers are token ids",
    "skip_tokenizer_init": "prompts and answers are token ids",
    "generation_config": "sampling follows `spin.generation`",
    "override_generation_config": "sampling follows `spin.generation`",
    "logits_processors": "they would bend the samples",
    "enable_lora": "from `adapter`",
    "lora_modules": "from `adapter`",
    "pipeline_parallel_size": "an engine's GPUs are those of `tensor_parallel_size` ranks",
    "data_parallel_size": "there is an engine for every `tensor_parallel_size` ranks",
}


class GenerationConfig(Block):
    """How the opponent answers the prompts (`spin.generation`)."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What generates: the training model itself, on every rank, or vLLM engines in processes of their own.",
    )
    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens in an answer. Default: what `sequence_len` leaves after the "
        f"prompt, at most {DEFAULT_MAX_NEW_TOKENS}. An answer never goes beyond `sequence_len`.",
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=10,
        description="Sampling temperature; the theory assumes 1. 0 is greedy decoding.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling; the theory assumes 1 (off).")
    top_k: int | None = Field(default=None, ge=1, description="Sample among the k likeliest tokens. Default: off.")
    batch_size: int = Field(
        default=32,
        ge=1,
        description="Answers that one rank writes at once; one that has ended makes room for the next prompt.",
    )
    gather_weights: Literal["auto", True, False] = Field(
        default="auto",
        description="ZeRO-3 and FSDP2: hold the whole weights on every rank while answering and scoring, instead of "
        "gathering them at every forward. `auto`: where they take at most half of the free memory.",
    )
    seed: int | None = Field(default=None, ge=0, description="Seed of the sampling. Default: the host's `seed`.")
    vllm: VllmConfig = Field(
        default_factory=VllmConfig,
        description="Used with `backend: vllm`: the keys below, and any other engine argument by vLLM's own name.",
    )
