"""What an evaluation changes in a process, and what puts it back, so that training does not notice."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch

# lm-eval computes a standard error in as many processes as the machine has cores, forked from this one, unless it is set
_ONE_PROCESS = "DISABLE_MULTIPROC"


@contextmanager
def unmoved(device: Any) -> Iterator[None]:
    """Puts back global random state and environment variables.

    Args:
        device: The model's.
    """
    python, numpy = random.getstate(), np.random.get_state()
    environment, variables = os.environ, dict(os.environ)
    gpu: dict[str, Any] = {"devices": [device], "device_type": device.type} if device.type != "cpu" else {"devices": []}
    try:
        with torch.random.fork_rng(**gpu):
            os.environ[_ONE_PROCESS] = "1"
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        os.environ = environment  # noqa: B003 - `datasets` puts another object in its place
        for name in [name for name in environment if name not in variables]:
            del environment[name]
        environment.update(variables)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps lm-eval's bars, prints and warnings from the terminal: a bar of the run's own shows how far it is."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
