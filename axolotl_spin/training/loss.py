"""The SPIN losses (Chen et al. 2024, eq. 4.7), as pure functions of log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spin.settings import LossType


class SpinLoss(NamedTuple):
    """Losses and implicit rewards of a batch, each of shape (pairs,); rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def spin_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    opponent_chosen_logps: Tensor,
    opponent_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
) -> SpinLoss:
    """Computes `l(beta*[log p(y|x) - log p_t(y|x)] - beta*[log p(y'|x) - log p_t(y'|x)])` for each pair.

    `l(t)` is `log(1 + exp(-t))` (`sigmoid`) or `relu(1 - t)` (`hinge`), the authors' two choices; beta is their lambda.

    Args:
        chosen_logps: (pairs,) sums of the policy's log-probs over the human answers' tokens, in nats.
        rejected_logps: (pairs,) the same over the opponent's answers.
        opponent_chosen_logps: (pairs,) the opponent's log-probs of the human answers, no gradient.
        opponent_rejected_logps: (pairs,) the opponent's log-probs of its own answers, no gradient.
        beta: Scale of the implicit reward, greater than 0.
        loss_type: `sigmoid` or `hinge`.

    Returns:
        Losses and rewards `beta * (log p - log p_t)`, each (pairs,).
    """
    chosen = beta * (chosen_logps - opponent_chosen_logps)
    rejected = beta * (rejected_logps - opponent_rejected_logps)
    margin = chosen - rejected
    losses = -F.logsigmoid(margin) if loss_type == "sigmoid" else torch.relu(1 - margin)
    return SpinLoss(losses, chosen.detach(), rejected.detach())
