"""Parts of a model that text does not reach: towers for images and sound, and what joins them to the language model."""

from __future__ import annotations

from typing import Any

import torch

from axolotl_spin.compat import text_config


def freeze_towers(model: torch.nn.Module) -> list[str]:
    """Leaves what text does not reach as it is: no optimizer holds it, and no rank waits for its gradient.

    It gets no gradient from text, or zeros. DDP waits for those that never come, and a sharded optimizer steps by zeros:
    weight decay would shrink a tower that nothing trains.

    Args:
        model: The policy, with its adapter but no other wrapper; before an optimizer is made for it.

    Returns:
        The names of the modules that were frozen, as they stand beside the language model; empty for a model of text alone.

    Raises:
        ValueError: Nothing else is trained.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if text_config(base.config) is base.config or not hasattr(base, "get_decoder"):
        return []
    parts = [base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()]
    reached = {id(weight) for part in parts if part is not None for weight in part.parameters()}
    frozen = set()
    for name, weight in base.named_parameters():
        if weight.requires_grad and id(weight) not in reached:
            weight.requires_grad_(False)
            frozen.add(name.removeprefix(f"{base.base_model_prefix}.").partition(".")[0])
    if frozen and not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError(
            f"all that is trained lies in {', '.join(sorted(frozen))}, which text does not reach: change "
            "`lora_target_modules` (or `unfrozen_parameters`) so that it takes in the language model"
        )
    return sorted(frozen)
