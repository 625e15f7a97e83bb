"""A tabulated game: what each objective reaches where nothing is left to chance.

    python tests/benchmarks/objectives.py

The vocabulary is the end token and three letters, an answer has at most four tokens: 121 outcomes. The policy is a table of
logits, four for each of the 40 beginnings; start and data are drawn. Every pair of a human and an own answer is weighted by
its probability, so that a gradient is the population's. An iteration is so many steps of Adam. What is told is the total
variation to the data's distribution after each iteration, as a share of the start's. It takes half a minute, and prints the
table of `docs/objectives.md`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_spin.settings.spin import LossType
from axolotl_spin.training.loss import spin_loss

LETTERS, MOST, TOKENS = (1, 2, 3), 4, 4
BEGINNINGS = [letters for length in range(MOST) for letters in itertools.product(LETTERS, repeat=length)]
OUTCOMES = [
    [*letters, 0] if length < MOST else list(letters)
    for length in range(MOST + 1)
    for letters in itertools.product(LETTERS, repeat=length)
]
LENGTHS = torch.tensor([len(outcome) for outcome in OUTCOMES])
SPREAD = 1.5  # of the logits that start and data are drawn with


def _choices() -> Tensor:
    """Returns which entries of the table each outcome takes, (121, 160)."""
    taken = torch.zeros(len(OUTCOMES), len(BEGINNINGS) * TOKENS, dtype=torch.float64)
    for row, outcome in enumerate(OUTCOMES):
        for place, token in enumerate(outcome):
            taken[row, BEGINNINGS.index(tuple(outcome[:place])) * TOKENS + token] = 1
    return taken


CHOICES = _choices()


def logps(table: Tensor) -> Tensor:
    """Returns the log-prob of each outcome, (121,), by the chain rule over a table of logits, (40, 4)."""
    return CHOICES @ table.log_softmax(-1).flatten()


def total_variation(one: Tensor, other: Tensor) -> float:
    """Returns half the L1 distance of two distributions, given as log-probs."""
    return 0.5 * (one.exp() - other.exp()).abs().sum().item()


# from log-probs of policy, opponent, start and data, (121,) each, to the expected loss
Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def objective(kind: LossType, beta: float, per_token: bool = False) -> Objective:
    """Returns the expected loss of `spin_loss` over human answers of the data and own answers of the opponent."""
    human, own = torch.cartesian_prod(torch.arange(len(OUTCOMES)), torch.arange(len(OUTCOMES))).T
    tokens = (LENGTHS[human], LENGTHS[own]) if per_token else None

    def expected(policy: Tensor, opponent: Tensor, start: Tensor, data: Tensor) -> Tensor:
        sides = (policy[human], policy[own], opponent[human], opponent[own])
        losses = spin_loss(*sides, beta=beta, loss_type=kind, tokens=tokens).losses
        return (losses * (data[human] + opponent[own]).exp()).sum()

    return expected


def triplets(policy: Tensor, opponent: Tensor, start: Tensor, data: Tensor) -> Tensor:
    """Returns T-SPIN's expected loss: human answers over the opponent's, and these over the start model's.

    Wang et al. 2026, arXiv 2601.08198. The reward is the policy's log-prob by itself; both terms have the weight 1.
    """

    def over(better: Tensor, worse: Tensor) -> Tensor:
        losses = -F.logsigmoid(policy[:, None] - policy[None])
        return (losses * (better[:, None] + worse[None]).exp()).sum()

    return over(data, opponent) + over(opponent, start)


class Game(NamedTuple):
    """A row of the table: how it is called, its objective, and how long it is played."""

    name: str
    objective: Objective
    iterations: int = 3
    steps: int = 200
    rate: float = 0.05


GAMES = {
    "sigmoid 1": Game("`sigmoid`, beta 1", objective("sigmoid", 1.0)),
    "space 1": Game("`space`, beta 1", objective("space", 1.0)),
    "sigmoid 0.1": Game("`sigmoid`, beta 0.1", objective("sigmoid", 0.1)),
    "space 0.1": Game("`space`, beta 0.1", objective("space", 0.1)),
    "triplets": Game("T-SPIN, beta 1", triplets),
    "short sigmoid 0.1": Game("`sigmoid`, beta 0.1", objective("sigmoid", 0.1), 5, 20),
    "short sigmoid 1": Game("`sigmoid`, beta 1", objective("sigmoid", 1.0), 5, 20),
    "short space 1": Game("`space`, beta 1", objective("space", 1.0), 5, 20),
    "short sigmoid per token": Game("`sigmoid`, beta 1, `length_normalized`", objective("sigmoid", 1.0, True), 5, 20),
    "short space per token": Game("`space`, beta 1, `length_normalized`", objective("space", 1.0, True), 5, 20),
    "small sigmoid 0.1": Game("`sigmoid`, beta 0.1", objective("sigmoid", 0.1), 5, 20, 0.01),
    "small sigmoid 1": Game("`sigmoid`, beta 1", objective("sigmoid", 1.0), 5, 20, 0.01),
}
SEEDS = (0, 1)


def play(game: Game, seed: int) -> list[float]:
    """Plays a game and returns what is left of the distance to the data after each iteration."""
    generator = torch.Generator().manual_seed(seed)
    start, data = (
        SPREAD * torch.randn(len(BEGINNINGS), TOKENS, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    first, truth = logps(start), logps(data)
    table, opponent, left = start.clone().requires_grad_(), first, []
    for _ in range(game.iterations):
        optimizer = torch.optim.Adam([table], lr=game.rate)
        for _ in range(game.steps):
            optimizer.zero_grad()
            game.objective(logps(table), opponent, first, truth).backward()
            optimizer.step()
        opponent = logps(table).detach()
        left.append(total_variation(opponent, truth) / total_variation(first, truth))
    return left


def row(game: Game) -> str:
    """Returns a game's row of the table."""
    cells = (" ".join(f"{share:.3f}".removeprefix("0") for share in play(game, seed)) for seed in SEEDS)
    return f"| {game.name} | {game.steps} at {game.rate:g} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("| objective | steps | left after each iteration | from another start |\n|---|---|---|---|")
    for one in GAMES.values():
        print(row(one), flush=True)
