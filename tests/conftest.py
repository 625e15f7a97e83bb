import os

# before any test imports the host: no hub, no telemetry
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
os.environ.setdefault("AXOLOTL_DATASET_NUM_PROC", "1")  # few rows: the host would fork a process for each core

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def rows_are_saved_here() -> None:
    """What a test prepares in its own process is written by that process."""
    from warm import save_rows_here

    save_rows_here()


@pytest.fixture(scope="session")
def warm() -> Iterator[Any]:
    """A process that has imported the host and forks."""
    import host
    from warm import Warm

    with Warm(host.environment(ACCELERATE_USE_CPU="true")) as server:
        yield server


@pytest.fixture(scope="session")
def warm_ranks(warm: Any) -> Iterator[Any]:
    """Two such processes, from which runs on two ranks are forked."""
    import host
    from warm import Ranks, Warm

    with Warm(host.environment(ACCELERATE_USE_CPU="true")) as other:
        yield Ranks([warm, other])


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model and data of the runs lie that are stopped and started again."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def whole(shared: Path, warm: Any) -> dict[str, Any]:
    """The outcome of the run that was never stopped; the run itself is in `shared/whole`."""
    import host
    from recovery import outcome, settings_in

    folder = shared / "whole"
    folder.mkdir()
    settings_in(folder, shared)
    code, output = warm.run("axolotl.cli.train", "run.yml", env=host.environment(ACCELERATE_USE_CPU="true"), cwd=folder)
    assert code == 0, output[-6000:]
    return outcome(folder / "out")
