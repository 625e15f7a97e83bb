"""The losses against closed forms of their optima, with figures worked out from these, and against plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from axolotl_spin.settings.spin import LOSS_AT_START, LossType, SpinConfig
from axolotl_spin.training.loss import spin_loss

START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # the opponent p_t
DATA = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # p_data


def population_loss(policy: torch.Tensor, opponent: torch.Tensor, beta: float, kind: LossType) -> torch.Tensor:
    """The expected loss over a human answer from DATA and an own answer from the opponent, independently."""
    chosen, rejected = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    logps = [side.log()[answer] for side in (policy, opponent) for answer in (chosen, rejected)]
    loss = spin_loss(*logps, beta=beta, loss_type=kind).losses
    return (DATA[chosen] * opponent[rejected] * loss).sum()


def best_policy(opponent: torch.Tensor, beta: float, kind: LossType = "sigmoid") -> tuple[torch.Tensor, float]:
    """Minimises the population loss over all distributions on three outcomes."""
    logits = opponent.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits.softmax(0), opponent, beta, kind)
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = logits.detach().softmax(0)
    return policy, population_loss(policy, opponent, beta, kind).item()


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
    for kind, expected in (("sigmoid", math.log(2)), ("hinge", 1.0), ("space", 2 * math.log(2))):
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


def test_the_optimum_of_space_is_the_datas_distribution() -> None:
    """At beta 1, wherever the opponent stands: 2 ln 2 less twice the Jensen-Shannon divergence, 1.253466 from START.

    0.2 ln(7/2) + 0.3 ln 2 + 0.5 ln(7/5) = 0.626733 of the human answers, and as much of the opponent's.
    """
    policy, loss = best_policy(START, 1.0, "space")
    assert policy.tolist() == pytest.approx(DATA.tolist(), abs=2e-5)
    assert loss == pytest.approx(1.253466, abs=1e-6)
    for opponent in (torch.tensor([0.8, 0.1, 0.1]), torch.tensor([0.05, 0.05, 0.9])):
        assert best_policy(opponent.double(), 1.0, "space")[0].tolist() == pytest.approx(DATA.tolist(), abs=2e-5)
    assert best_policy(START, 0.1, "space")[0][2] > 0.6  # beyond the data's 0.5


def test_the_optimum_of_space_is_a_fixed_point() -> None:
    """At the game's end human and own answers come from one distribution: the loss is 2 ln 2, and nothing moves."""
    policy, loss = best_policy(DATA, 1.0, "space")
    assert policy.tolist() == pytest.approx(DATA.tolist(), abs=1e-6)
    assert loss == pytest.approx(2 * math.log(2))


LOGPS = ([-1.0, -2.0], [-4.0, -1.0], [-2.0, -1.0], [-3.0, -4.0])


def test_space_by_hand() -> None:
    """Rewards 0.5 and -0.5, then -0.5 and 1.5: log(1 + e^-0.5) + log(1 + e^-0.5), log(1 + e^0.5) + log(1 + e^1.5)."""
    result = spin_loss(*map(torch.tensor, LOGPS), beta=0.5, loss_type="space")
    expected = [2 * math.log1p(math.exp(-0.5)), math.log1p(math.exp(0.5)) + math.log1p(math.exp(1.5))]
    assert result.losses.tolist() == pytest.approx(expected)
    assert result.chosen_rewards.tolist() == [0.5, -0.5]
    assert result.rejected_rewards.tolist() == [-0.5, 1.5]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("tokens", [None, ([2, 4], [1, 3])])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "space"])
def test_gradients_by_hand(kind: LossType, tokens: tuple[list[int], list[int]] | None) -> None:
    """The derivatives by both log-probs, worked out from the losses, with a beta of 0.7."""
    logps = [torch.tensor(values, dtype=torch.float64) for values in LOGPS]
    chosen, rejected = logps[0].requires_grad_(), logps[1].requires_grad_()
    counts = None if tokens is None else (torch.tensor(tokens[0]), torch.tensor(tokens[1]))
    spin_loss(*logps, beta=0.7, loss_type=kind, tokens=counts).losses.sum().backward()
    for row in range(2):
        scales = [0.7 / (1 if tokens is None else tokens[side][row]) for side in range(2)]
        c, r = (scale * (LOGPS[side][row] - LOGPS[side + 2][row]) for side, scale in enumerate(scales))
        if kind == "space":
            slopes = (-sigmoid(-c), sigmoid(r))
        else:
            slope = sigmoid(r - c) if kind == "sigmoid" else float(c - r < 1)
            slopes = (-slope, slope)
        assert chosen.grad[row].item() == pytest.approx(scales[0] * slopes[0])
        assert rejected.grad[row].item() == pytest.approx(scales[1] * slopes[1])


def test_rewards_per_token_by_hand() -> None:
    """Sums of 1 and -1 over 2 and 4 tokens at beta 2: rewards 1 and -0.5, a margin of 1.5."""
    logps = [torch.tensor([value]) for value in (-3.0, -9.0, -4.0, -8.0)]
    tokens = (torch.tensor([2]), torch.tensor([4]))
    for kind, expected in (
        ("sigmoid", math.log1p(math.exp(-1.5))),
        ("hinge", 0.0),
        ("space", math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5))),
    ):
        result = spin_loss(*logps, beta=2.0, loss_type=kind, tokens=tokens)
        assert result.losses.item() == pytest.approx(expected)
        assert (result.chosen_rewards.item(), result.rejected_rewards.item()) == (1.0, -0.5)


def test_an_answer_without_tokens_has_no_reward() -> None:
    """An empty answer whose end takes no part: its log-prob is 0, under policy and opponent alike."""
    logps = [torch.tensor([value], requires_grad=True) for value in (-3.0, 0.0, -4.0, 0.0)]
    result = spin_loss(*logps, beta=1.0, loss_type="space", tokens=(torch.tensor([2]), torch.tensor([0])))
    result.losses.sum().backward()
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(-0.5)) + math.log(2))
    assert all(math.isfinite(tensor.grad.item()) for tensor in logps)


def test_equal_answers_hold_space_where_it_is() -> None:
    """No gradient at the start; once their log-prob has moved, one that brings it back, from either side."""
    for moved, sign in ((0.0, 0), (1.0, 1), (-1.0, -1)):
        logp = torch.tensor([-5.0 + moved], requires_grad=True)
        opponent = torch.tensor([-5.0])
        spin_loss(logp, logp, opponent, opponent, beta=1.0, loss_type="space").losses.sum().backward()
        assert math.copysign(1, logp.grad.item()) == sign if sign else logp.grad.item() == 0


def test_beta_is_by_default_that_of_the_loss() -> None:
    assert [SpinConfig(loss=kind).betas() for kind in ("sigmoid", "hinge", "space")] == [
        [0.1] * 3,
        [0.1] * 3,
        [1.0] * 3,
    ]
    assert SpinConfig(loss="space", beta=0.1).beta == 0.1
    again = SpinConfig.model_validate(SpinConfig(loss="space").model_dump())  # as the host does
    assert again.betas() == [1.0] * 3
