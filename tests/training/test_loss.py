"""The loss against Theorem 5.4's closed form, with figures worked out from it, and against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from axolotl_spin.settings import LOSS_AT_START
from axolotl_spin.training.loss import spin_loss

START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # the opponent p_t
DATA = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # p_data


def population_loss(policy: torch.Tensor, opponent: torch.Tensor, beta: float) -> torch.Tensor:
    """The expected loss over a human answer from DATA and an own answer from the opponent, independently."""
    chosen, rejected = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    loss = spin_loss(
        policy.log()[chosen], policy.log()[rejected], opponent.log()[chosen], opponent.log()[rejected], beta=beta
    ).losses
    return (DATA[chosen] * opponent[rejected] * loss).sum()


def best_policy(opponent: torch.Tensor, beta: float) -> tuple[torch.Tensor, float]:
    """Minimises the population loss over all distributions on three outcomes."""
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits.softmax(0), opponent, beta)
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = logits.detach().softmax(0)
    return policy, population_loss(policy, opponent, beta).item()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(1.0, [0.2, 0.3, 0.5]), (2.0, [0.339134, 0.321731, 0.339134]), (5.0, [0.435207, 0.313643, 0.25115])],
)
def test_theorem_5_4(beta: float, expected: list[float]) -> None:
    """The minimiser is p_t * (p_data/p_t)^(1/beta), and the least loss is 0.568631 whatever beta is."""
    policy, loss = best_policy(START, beta)
    assert policy.tolist() == pytest.approx(expected, abs=2e-5)
    assert loss == pytest.approx(0.568631, abs=1e-6)


def test_repeated_iterations_reach_the_data() -> None:
    """With beta 2, KL(p_data || p_t) runs .067510 .016504 .004067 .001009 over three exact iterations."""
    policy, divergences = START, []
    for _ in range(4):
        divergences.append((DATA * (DATA / policy).log()).sum().item())
        policy, _ = best_policy(policy, 2.0)
    # the first is KL at the start
    assert divergences == pytest.approx([0.274887, 0.067510, 0.016504, 0.004067], abs=2e-5)


def test_at_the_start_policy_is_opponent() -> None:
    logps = torch.tensor([-3.0, -250.0])
    for kind, expected in (("sigmoid", math.log(2)), ("hinge", 1.0)):
        result = spin_loss(logps, logps * 2, logps, logps * 2, beta=0.7, loss_type=kind)
        assert result.losses.tolist() == pytest.approx([expected] * 2)
        assert LOSS_AT_START[kind] == expected
        assert result.chosen_rewards.tolist() == result.rejected_rewards.tolist() == [0.0, 0.0]


def test_values_by_hand() -> None:
    """Margins 0.5*((-1+2) - (-4+3)) = 1 and 0.5*((-2+1) - (-1+4)) = -2."""
    arguments = [torch.tensor(v) for v in ([-1.0, -2.0], [-4.0, -1.0], [-2.0, -1.0], [-3.0, -4.0])]
    result = spin_loss(*arguments, beta=0.5)
    assert result.losses.tolist() == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(2))])
    assert spin_loss(*arguments, beta=0.5, loss_type="hinge").losses.tolist() == pytest.approx([0.0, 3.0])
    assert result.chosen_rewards.tolist() == [0.5, -0.5]
    assert result.rejected_rewards.tolist() == [-0.5, 1.5]


def test_equal_answers_have_no_gradient() -> None:
    logp = torch.tensor([-5.0], requires_grad=True)
    spin_loss(logp, logp, torch.tensor([-4.0]), torch.tensor([-4.0]), beta=0.3).losses.sum().backward()
    assert logp.grad.item() == 0.0
