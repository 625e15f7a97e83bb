"""The exact game of `test_game.py` with another seed, and with defects.

A wrong opponent, wrong generations or swapped answers keep the policy from the data's distribution: each is planted, and
the check has to fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_game import as_near, converges, play
from warm import Warm

pytestmark = [pytest.mark.host, pytest.mark.game, pytest.mark.once]


def test_the_first_seed_was_no_accident(warm: Warm, tmp_path: Path) -> None:
    left, of_space = (play(tmp_path / loss, warm, 5, iterations=3, loss=loss) for loss in ("sigmoid", "space"))
    assert converges(left), left
    assert as_near(of_space, left), (of_space, left)


@pytest.mark.parametrize("defect", ["frozen_opponent", "stale_generations", "swapped_answers"])
def test_the_check_sees_a_planted_defect(warm: Warm, tmp_path: Path, defect: str) -> None:
    left = play(tmp_path, warm, seed=3, iterations=2, defect=defect)
    assert not converges(left), left
