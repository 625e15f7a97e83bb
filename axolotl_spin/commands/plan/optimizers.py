"""What an optimizer keeps beside the weights that it trains, by its name."""

from __future__ import annotations

from typing import Any

from axolotl_spin.commands.plan.size import ModelSize

# buffers as large as the trained weights
_BUFFERS = {"adam": 2, "rmsprop": 1, "lion": 1, "sgd": 0}
# names with one of those words in it that say nothing of buffers so large
_OTHERS = ("galore", "apollo", "4bit", "fp8", "flash", "anyprecision")


def state_bytes(size: ModelSize, cfg: Any, *, width: int, upcast: int, notes: list[str]) -> float | None:
    """Returns the bytes of an optimizer's state for all that is trained; None where that is not known.

    Args:
        size: The model's.
        cfg: The host's normalized config.
        width: Bytes of a trained weight's number.
        upcast: Trained weights that are in fp32 whatever the others are in.
        notes: What is to be said of it is added.
    """
    name, count = str(getattr(cfg.optimizer, "value", cfg.optimizer) or "").lower(), size.trainable
    if "adafactor" in name or "came" in name:
        notes.append(f"`optimizer: {name}` keeps factored state, which is small and not counted")
        return 4.0 * count if "came" in name else 0.0  # CAME's momentum is whole, in fp32
    if name == "grokadamw":
        notes.append(f"`optimizer: {name}` keeps its state in main memory")
        return 0.0
    kind = next((kind for kind in _BUFFERS if kind in name), None)
    if kind is None or any(word in name for word in _OTHERS):
        notes.append(f"how much state `optimizer: {name}` keeps is not known here")
        return None
    if "paged" in name:
        notes.append("a paged optimizer moves its state to main memory where the GPU's runs out")
    buffers, asked = _BUFFERS[kind], _asked(cfg)
    if name in ("sgd", "rmsprop"):
        buffers += asked.get("momentum", "0") not in ("0", "0.0")
        buffers += name == "rmsprop" and asked.get("centered", "").lower() in ("true", "1", "yes")
    if "8bit" in name:
        # the Trainer has bitsandbytes keep 32 bits for embeddings
        embedding = 0 if name.startswith(("adamw_torch", "ao_")) else size.embedding
        return float(buffers * (count + 3 * embedding))
    if name.startswith("paged") or name.endswith("32bit") or name == "rmsprop_bnb":
        return 4.0 * buffers * count  # bitsandbytes' state is in fp32 whatever the weights are in
    state = float(buffers * (width * count + (4 - width) * upcast))
    if name in ("stable_adamw", "optimi_adamw") and width < 4 and asked.get("kahan_sum", "").lower() != "false":
        state += width * (count - upcast)  # what rounding took of each weight
    return state


def _asked(cfg: Any) -> dict[str, str]:
    """Returns `optim_args`, which may be a text: `momentum=0.9, centered=true`."""
    given = cfg.optim_args or {}
    if isinstance(given, str):
        given = dict(part.split("=", 1) for part in given.replace(" ", "").split(",") if "=" in part)
    return {str(key): str(value) for key, value in given.items()}
