"""A policy that draws random numbers in training is refused: it would not agree with itself as its opponent."""

from __future__ import annotations

from typing import Any

import torch

from axolotl_spin.compat import text_config
from axolotl_spin.data.images import ImageRows
from axolotl_spin.game.health import Finding, act_on
from axolotl_spin.ranks.bare import bare
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.noise import noise, noisy
from axolotl_spin.training.tried_pairs import pictured_pairs

# nats per token between two forwards: sums in another order stay below, a dropout of 1% does not
_MOST, _MOST_IN_HALF = 1e-3, 0.05


def refuse_noise(
    model: Any, prompts: Any, pad: int, ranks: Ranks, *, half: bool, images: ImageRows | None = None
) -> None:
    """Makes two forwards in training mode on a pair or two, and stops a run in which they differ.

    Args:
        model: The policy as the trainer wraps it; every rank must call.
        prompts: Prompts and human answers.
        pad: Fills the padding.
        ranks: All of them.
        half: Whether the forward is in half precision, whose sums are rounded more.
        images: Where the prompts' pictures are.

    Raises:
        UnhealthyRunError: They differ.
    """
    rows = prompts.select(range(min(2, len(prompts))))
    pairs = [
        {"prompt_ids": prompt[-64:], "chosen_ids": answer[:64], "rejected_ids": answer[:64]}
        for prompt, answer in zip(rows["prompt_ids"][:], rows["chosen_ids"][:], strict=True)
    ]
    if images is not None:
        pairs = pictured_pairs(rows, images)
    batch = {name: tensor.to(ranks.device) for name, tensor in PairCollator(pad)(pairs).items()}
    off = torch.tensor([noise(model, batch)], device=ranks.device)
    far = float(ranks.accelerator.gather(off).max())
    policy = bare(model, ranks.accelerator)
    most = _MOST_IN_HALF if half or policy.dtype.itemsize < 4 else _MOST
    act_on(check_noise(far, noisy(vars(text_config(policy.config))), most=most), main=True)


def check_noise(far: float, keys: dict[str, float], *, most: float) -> list[Finding]:
    """Looks at how far two forwards in training mode are from each other.

    Args:
        far: In nats per token.
        keys: What the model's config has that may draw random numbers, with its rate.
        most: Up to here it is rounding.
    """
    if far <= most:
        return []
    named = ", ".join(f"`{name}: {rate:g}`" for name, rate in sorted(keys.items()))
    remedy = (
        f"The model's config has {named}; set these to 0 under `overrides_of_model_config:`"
        if named
        else "None of the keys of the model's config says so, so it is its code that does; use another model, or change it"
    )
    text = (
        f"two forwards on the same pairs in training mode differ by {far:.3g} nats per token: the model draws random "
        f"numbers, which could not be switched off, and the policy would not agree with its opponent. {remedy}"
    )
    return [Finding(text, fatal=True)]
