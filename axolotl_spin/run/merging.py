"""Whether what is saved is the model that was trained, or has to be made so: by `axolotl merge-lora`, from shards."""

from __future__ import annotations

from typing import Any

from axolotl_spin.compat import text_config
from axolotl_spin.launched import saves_sharded

# what models call their input and output embeddings
_EMBEDDINGS = frozenset({"lm_head", "embed_tokens", "embed_out", "embed_in", "wte", "output"})


def describe_merge(cfg: Any) -> str:
    """Returns a line that says how a trained embedding or head is lost by merging where the two are tied; else nothing.

    The host's default way of merging goes through the base model's files, in which a tied head does not exist: a head of
    its own is dropped. PEFT's way unties whole modules, but merges a LoRA on one of them into both.

    Args:
        cfg: The host's normalized config.
    """
    from axolotl.loaders.utils import load_model_config

    if not cfg.adapter:
        return ""
    found = {}
    for key in ("lora_modules_to_save", "lora_target_modules"):
        names = cfg[key] if isinstance(cfg[key], (list, tuple)) else []
        found[key] = sorted({name.rpartition(".")[2] for name in names} & _EMBEDDINGS)
    if not any(found.values()) or not getattr(text_config(load_model_config(cfg)), "tie_word_embeddings", False):
        return ""
    trained, targeted = found["lora_modules_to_save"], found["lora_target_modules"]
    if targeted:
        return (
            f"`lora_target_modules: [{', '.join(targeted)}]` with tied embeddings: `axolotl merge-lora` gives another "
            "model than the one that is trained, by either `merge_method`; keep the adapter, or take them out"
        )
    if cfg.peft_ensure_weight_tying or cfg.merge_method == "legacy":
        return ""
    return (
        f"`lora_modules_to_save: [{', '.join(trained)}]` with tied embeddings: `axolotl merge-lora` drops what is trained "
        "there, unless `merge_method: legacy` is set (or `peft_ensure_weight_tying: true` keeps both one)"
    )


def describe_shards(cfg: Any) -> str | None:
    """Says how a model that DeepSpeed saves as shards is made whole; None where models are saved whole.

    Args:
        cfg: The host's normalized config.
    """
    if cfg.get("adapter") or not saves_sharded(cfg.get("deepspeed")):
        return None
    return (
        "the `deepspeed` config does not gather weights where a model is saved: each iteration's model, and the last, is a "
        "DeepSpeed checkpoint with the optimizer's state. `python zero_to_fp32.py . . --safe_serialization`, run in its "
        "folder, makes it a model that loads; or set `gather_16bit_weights_on_model_save: true` under `zero_optimization`"
    )
