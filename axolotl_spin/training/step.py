"""The mathematics of a step: from a micro-batch of pairs to what is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from axolotl_spin.settings.spin import LossType
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.loss import SpinLoss, spin_loss


class PairLosses(NamedTuple):
    """What a micro-batch of pairs gives.

    Attributes:
        spin: Losses and rewards as `spin_loss` gives them, (pairs,) each.
        losses: (pairs,) what is trained on: those, with the human answer's NLL where `spin.sft_weight` asks for it.
        logps: (2 * pairs,) the policy's, in nats: all human answers, then all of the opponent's.
        drift: (2 * pairs,) how far they are from the opponent's, in nats per token; detached.
        weight: (pairs,) 0 for a pair that only fills the batch.
    """

    spin: SpinLoss
    losses: Tensor
    logps: Tensor
    drift: Tensor
    weight: Tensor


def pair_losses(
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    beta: float,
    loss_type: LossType,
    sft_weight: float,
    length_normalized: bool,
    in_head: bool,
) -> PairLosses:
    """Computes the loss of each pair of a micro-batch.

    Args:
        model: The policy as the trainer wraps it.
        batch: As `PairCollator` makes it, with `opponent_logps` and `weight`.
        beta: The paper's lambda.
        loss_type: See `spin_loss`.
        sft_weight: Of the human answer's negative log-likelihood per token.
        length_normalized: Whether rewards are divided by the answers' tokens.
        in_head: See `completion_logps`.
    """
    logps = completion_logps(model, batch, in_head)
    chosen, rejected = logps.chunk(2)
    opponent = batch["opponent_logps"].to(logps.dtype)
    counts = batch["completion_lengths"].chunk(2)
    tokens = (counts[0], counts[1]) if length_normalized else None
    spin = spin_loss(chosen, rejected, *opponent.chunk(2), beta=beta, loss_type=loss_type, tokens=tokens)
    losses = spin.losses
    if sft_weight:
        losses = losses - sft_weight * chosen / counts[0]
    drift = (logps.detach() - batch["opponent_logps"]).abs() / batch["completion_lengths"].clamp(min=1)
    return PairLosses(spin, losses, logps, drift, batch["weight"].to(losses.dtype))
