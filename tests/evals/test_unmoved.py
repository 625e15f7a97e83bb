"""What an evaluation leaves as it was: random state, environment, the terminal."""

from __future__ import annotations

import logging
import os
import random

import numpy as np
import pytest
import torch

from axolotl_spin.evals.unmoved import quiet, unmoved

pytestmark = pytest.mark.once


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_random_numbers_go_on_where_they_were() -> None:
    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    seed()
    expected = drawn(), drawn()
    seed()
    first = drawn()
    with pytest.raises(KeyError), unmoved(torch.device("cpu")):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        raise KeyError
    assert (first, drawn()) == expected


def test_the_environment_is_the_same_object_with_the_same_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIN_CHANGED", "before")
    monkeypatch.setenv("SPIN_REMOVED", "before")
    environment = os.environ
    before = dict(environment)
    with unmoved(torch.device("cpu")):
        assert os.environ["DISABLE_MULTIPROC"]  # lm-eval forks no processes from one that holds a GPU
        os.environ["SPIN_CHANGED"] = os.environ["SPIN_ADDED"] = "within"
        del os.environ["SPIN_REMOVED"]
        os.environ = dict(os.environ)  # type: ignore[assignment]  # noqa: B003
    assert os.environ is environment and dict(environment) == before


def test_the_terminal_stays_clear(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with quiet():
        print("a bar")
        logger.warning("a warning")
    print("after")
    assert capfd.readouterr().out == "after\n" and logger.level == level
