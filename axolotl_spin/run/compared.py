"""Which of the host's keys a result depends on: all but those that are listed here, each under its reason.

A key that a new host brings is compared until it is listed: a resume that is refused says why, one that goes on with other
settings does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

# a reason, and the keys that it holds for; `*` stands for the rest of a name
NOT_COMPARED: dict[str, tuple[str, ...]] = {
    "the data is compared by its tokens": (
        *("datasets", "test_datasets", "val_set_size", "chat_template", "chat_template_jinja", "train_on_inputs"),
        *("dataset_exact_deduplication", "shuffle_merged_datasets", "shuffle_before_merging_datasets"),
        *("dataset_shard_idx", "dataset_shard_num", "min_sample_len", "excess_length_strategy", "push_dataset_to_hub"),
    ),
    "acts through the plan, which is compared by its iterations": (
        *("learning_rate", "warmup_steps", "warmup_ratio", "num_epochs", "max_steps"),
    ),
    "splits the global batch, which is compared as a whole": (
        *("micro_batch_size", "gradient_accumulation_steps", "batch_size"),
    ),
    "logs and trackers": (
        *("logging_steps", "logging_nan_inf_filter", "include_tkps", "include_tokens_per_second", "profiler_steps*"),
        *("sync_profiler_*", "use_wandb", "wandb_*", "use_mlflow", "mlflow_*", "hf_mlflow_log_artifacts", "use_comet"),
        *("comet_*", "use_trackio", "trackio_*", "use_tensorboard", "use_otel_metrics", "otel_metrics_*"),
        *("use_swanlab", "swanlab_*"),  # which bring keys that must not lie in `plan.json`
        *("generate_samples", "num_generation_samples", "generation_*"),
    ),
    "evaluation": (
        *("eval_*", "evals_per_epoch", "evaluation_strategy", "do_bench_eval", "bench_*", "do_causal_lm_eval"),
        *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    ),
    "saving, and where": (
        *("output_dir", "save_*", "saves_per_epoch", "hub_*", "dynamic_checkpoint", "tokenizer_save_jinja_files"),
        *("fsdp_final_state_dict_type", "merge_lora", "merge_method", "export"),
    ),
    "where a start begins, and what ends it early": (
        *("resume_from_checkpoint", "auto_resume_from_checkpoints", "early_stopping_patience", "loss_watchdog_*"),
    ),
    "caches and workers": (
        *("dataset_prepared_path", "dataset_processes", "dataset_num_proc", "dataset_keep_in_memory", "dataloader_*"),
        *("num_dataset_shards_to_save", "skip_prepare_dataset", "preprocess_iterable", "is_preprocess"),
        *("remove_unused_columns",),
    ),
    "the machine, and how ranks share the work": (
        *("device", "device_map", "local_rank", "world_size", "capabilities", "env_capabilities", "ddp", "ddp_*"),
        *("max_memory", "gpu_memory_limit", "accelerator_config", "deepspeed", "fsdp", "fsdp_config", "fsdp_version"),
        *("dp_*", "tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "ring_attn_func"),
        *("heads_k_stride", "expert_parallel_*", "use_ray", "ray_*", "resources_per_worker", "low_cpu_mem_usage"),
        *("experimental_skip_move_to_device", "lora_on_cpu", "qlora_sharded_model_loading", "torchdistx_path"),
        *("gc_steps", "gc_collect_steps", "torch_empty_cache_steps", "ple_cpu_offload"),
    ),
    "other ways to compute the same numbers": (
        *("attn_implementation", "eager_attention", "flash_attention", "sdp_attention", "xformers_attention"),
        *("flex_attention", "flex_attn_compile_kwargs", "flash_attn_*", "flash_optimum", "fused_attn_kernel"),
        *("sdpa_varlen", "fa_varlen_kwargs_in_collator", "large_head_attention", "gemma4_hybrid_attn_impl"),
        *("lora_*_kernel", "use_kernels", "experts_implementation", "llama4_linearized_experts", "nf4_backend"),
        *("gradient_checkpointing*", "selective_checkpointing", "activation_offloading", "layer_offloading"),
        *("tiled_mlp*", "chunked_cross_entropy*", "torch_compile*", "deepcompile", "tf32", "full_determinism"),
        *("sample_packing*", "batch_flattening", "pad_to_*", "multipack_real_batches", "group_by_length"),
    ),
    "worked out by the host from other keys and the model": (
        *("is_*_derived_model", "is_multimodal", "model_config_type*", "torch_dtype", "total_num_tokens"),
        *("total_supervised_tokens", "attn_decontaminates_packing", "attn_needs_dtype_cast", "attn_supports_packing"),
        *("attn_uses_flash_lib", "processor_config"),
    ),
    "switched off in self-play, or never asked": ("lora_dropout", "trl", "vllm", "gradio_*"),
    "which software, and what it may read": ("axolotl_config_path", "plugins", "strict", "hf_use_auth_token", "rl"),
    "compared key by key": ("spin",),
}
# sections of a DeepSpeed JSON, and of `fsdp_config`, that a result depends on
_DEEPSPEED = ("optimizer", "gradient_clipping", "bf16", "fp16")
_FSDP = ("mixed_precision_policy",)


def reasons(key: str) -> list[str]:
    """Returns why a key of the host's is not compared; none where it is."""
    return [reason for reason, names in NOT_COMPARED.items() if any(fnmatchcase(key, name) for name in names)]


def host_values(cfg: Any) -> dict[str, Any]:
    """Returns all settings of the host's normalised config, and those of the files that it reads.

    Args:
        cfg: The host's.
    """
    values = dict(cfg.items())
    for name, sections in (("deepspeed", _DEEPSPEED), ("fsdp_config", _FSDP)):
        block = values.get(name)
        for section in sections:
            value = block.get(section) if isinstance(block, dict) else None
            automatic = value == "auto" or (isinstance(value, dict) and value.get("enabled") == "auto")
            if value is not None and not automatic:  # else it follows from the host's own key
                values[f"{name}.{section}"] = value
    for name in ("base_model_config", "tokenizer_config"):  # the host's defaults for them
        if values.get(name) == values.get("base_model"):
            values.pop(name, None)
    return values


def host_defaults() -> dict[str, Any]:
    """Returns the default of each key of the host's schema and of its registered plugins."""
    import importlib

    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.config import AxolotlInputConfig

    fields: dict[str, Any] = dict(AxolotlInputConfig.model_fields)
    for plugin in PluginManager.get_instance().plugins.values():
        module, _, name = (plugin.get_input_args() or "").rpartition(".")
        if module:
            fields.update(getattr(importlib.import_module(module), name).model_fields)
    return {
        key: field.get_default(call_default_factory=True) for key, field in fields.items() if not field.is_required()
    }


def compared(keys: Iterable[str]) -> list[str]:
    """Returns those of the host's keys that are compared."""
    return [key for key in keys if not reasons(key)]
