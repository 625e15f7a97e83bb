"""The tabulated game: the figures in the documentation are those of the code, and say what the text makes of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

# plain torch: no host takes part
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "objectives.py"


@pytest.fixture(scope="module")
def objectives() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tabulated_objectives", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def played(objectives: ModuleType) -> dict[str, list[list[float]]]:
    """What is left of the distance after each iteration, for each seed of each game."""
    return {name: [objectives.play(game, seed) for seed in objectives.SEEDS] for name, game in objectives.GAMES.items()}


def test_outcomes(objectives: ModuleType) -> None:
    """40 answers that end by themselves and 81 that are cut; whatever the table, their probabilities are all of it."""
    import torch

    assert len(objectives.OUTCOMES) == 121 == len({tuple(outcome) for outcome in objectives.OUTCOMES})
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    found = objectives.logps(table)
    assert found.exp().sum().item() == pytest.approx(1)
    probabilities = table.softmax(-1)
    # the letters 2 and 1, then the end: from the beginnings (), (2,) and (2, 1)
    at = [objectives.BEGINNINGS.index(beginning) for beginning in ((), (2,), (2, 1))]
    by_hand = probabilities[at[0], 2] * probabilities[at[1], 1] * probabilities[at[2], 0]
    assert found.exp()[objectives.OUTCOMES.index([2, 1, 0])].item() == pytest.approx(by_hand.item())


def test_the_table_in_the_documentation(objectives: ModuleType, played: dict[str, list[list[float]]]) -> None:
    """Row by row; games that swing amplify the last digits, so other versions of torch may round otherwise."""
    text = (ROOT / "docs" / "objectives.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| \d+ at 0\.\d+ \|", line)]
    assert len(rows) == len(played)
    for (name, steps, *cells), (key, game) in zip(rows, objectives.GAMES.items(), strict=True):
        assert (name, steps) == (game.name, f"{game.steps} at {game.rate:g}")
        shares = [[float(share) for share in cell.split()] for cell in cells]
        for found, expected in zip(shares, played[key], strict=True):
            assert found == pytest.approx(expected, abs=0.01), name


def test_what_the_text_says_of_it(played: dict[str, list[list[float]]]) -> None:
    for seed in range(2):
        left = {name: games[seed] for name, games in played.items()}
        # both reach the data; the first iteration of `space` gets further
        assert max(left["sigmoid 1"][1:] + left["space 1"][1:]) < 0.01
        assert left["space 1"][0] < 0.7 * left["sigmoid 1"][0]
        # at beta 0.1 both swing
        for name in ("sigmoid 0.1", "space 0.1"):
            assert max(left[name][1:]) > 2 * left[name][0] or max(left[name]) > 1
            assert min(left[name][1:]) > 0.2
        assert min(left["triplets"]) > 0.39 and max(left["triplets"]) < 0.64
        # few steps: beta 1 arrives, beta 0.1 and rewards per token do not
        assert max(left["short sigmoid 1"][-1], left["short space 1"][-1]) < 0.02
        for name in ("short sigmoid 0.1", "short sigmoid per token", "short space per token"):
            assert left[name][-1] > 0.15
        # and at a small rate beta is next to nothing
        assert left["small sigmoid 0.1"] == pytest.approx(left["small sigmoid 1"], abs=0.02)
