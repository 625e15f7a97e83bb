"""Which layout a model's attention should take, by its config: whether every layer attends to all that a pair has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from axolotl_spin.compat import text_config
from axolotl_spin.training.layouts import Layout

# kinds of layers that attend to so many tokens as a key of the config says, and to all where there are no more
_LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# what names such a key where a config does not tell its layers' kinds
_REACHES = ("window", "attention_chunk", "index_topk")


def preferred_layout(config: Any, *, sample_packing: bool | None, longest: int) -> tuple[Layout, str]:
    """Returns the layout with the least to compute that a model's attention should take, and why.

    Args:
        config: The model's (`transformers.PretrainedConfig`).
        sample_packing: The host's key; False asks for padding.
        longest: Most tokens in a prompt with an answer.
    """
    if sample_packing is False:
        return "padded", "`sample_packing: false`"
    text = text_config(config)
    attention = str(getattr(text, "_attn_implementation", None) or getattr(config, "_attn_implementation", None))
    if "flash" in attention:
        fault = _does_not_see_all(text, longest, known=("sliding_attention",))  # whose window goes to the kernel
        return ("padded", fault) if fault else ("packed", f"{attention} separates sequences by their positions")
    if attention not in ("sdpa", "eager", "flex_attention"):
        return "padded", f"{attention} is not known to take a mask"
    fault = _does_not_see_all(text, longest)
    return ("padded", fault) if fault else ("shared", f"{attention} takes a mask")


def _does_not_see_all(text: Any, longest: int, known: Sequence[str] = ()) -> str:
    """Says which layers do not attend to every token before, or may not; empty where all do.

    Args:
        text: The config of the model's text part.
        longest: Tokens in the longest sequence.
        known: Kinds of layers that need not.
    """
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        names = [name for name in vars(text) if any(part in name for part in _REACHES) and "layers" not in name]
        reaches = {name: getattr(text, name) for name in names if getattr(text, "use_sliding_window", True)}
        kinds = ()
    else:
        kinds = sorted(set(kinds) - {"full_attention", *known})
        reaches = {_LOCAL[kind]: getattr(text, _LOCAL[kind], None) for kind in kinds if kind in _LOCAL}
    for name, reach in reaches.items():
        if isinstance(reach, int) and not isinstance(reach, bool) and 0 < reach < longest:
            return f"attention may reach over `{name}: {reach}` tokens, and pairs may have {longest}"
    unknown = [kind for kind in kinds if not isinstance(reaches.get(_LOCAL.get(kind, "")), int)]
    return f"layers of the kind `{unknown[0]}` are not known to take another layout" if unknown else ""
