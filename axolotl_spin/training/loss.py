"""The losses of a pair, as pure functions of log-probabilities: eq. 4.7 of Chen et al. 2024, and SPACE's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spin.settings.spin import LossType


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
    tokens: tuple[Tensor, Tensor] | None = None,
) -> SpinLoss:
    """Computes the loss of each pair from the rewards of its answers, `beta * (log p(u|x) - log p_t(u|x))`.

    With the human answer's reward c, the other's r, and the sigmoid s:

        sigmoid: -log s(c - r)            eq. 4.7 of Chen et al. 2024, arXiv 2401.01335, with the logistic loss
        hinge:   relu(1 - (c - r))        the same with the authors' other choice
        space:   -log s(c) - log s(-r)    SPACE, arXiv 2512.07175, with as many answers of one kind as of the other

    Beta is the lambda of Chen et al. The gap c - r leaves open how high both rewards are; `space` has a term for each.

    Args:
        chosen_logps: (pairs,) sums of the policy's log-probs over the human answers' tokens, in nats.
        rejected_logps: (pairs,) the same over the opponent's answers.
        opponent_chosen_logps: (pairs,) the opponent's log-probs of the human answers, no gradient.
        opponent_rejected_logps: (pairs,) the opponent's log-probs of its own answers, no gradient.
        beta: Scale of the implicit reward, greater than 0.
        loss_type: `sigmoid`, `hinge` or `space`.
        tokens: (pairs,) tokens of the human's and of the opponent's answers, by which rewards are divided; an answer
            without any has the reward 0. None leaves them sums.

    Returns:
        Losses and rewards, each (pairs,).
    """
    chosen = beta * (chosen_logps - opponent_chosen_logps)
    rejected = beta * (rejected_logps - opponent_rejected_logps)
    if tokens is not None:
        chosen, rejected = chosen / tokens[0].clamp(min=1), rejected / tokens[1].clamp(min=1)
    if loss_type == "space":
        losses = -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
    else:
        margin = chosen - rejected
        losses = -F.logsigmoid(margin) if loss_type == "sigmoid" else torch.relu(1 - margin)
    return SpinLoss(losses, chosen.detach(), rejected.detach())
