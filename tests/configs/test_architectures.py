"""Every architecture plays two iterations through the host's command and is compared with the plainest way to compute it.

`SPIN_CONFIGS_FIGURES` names the file that the figures are written to, of which the table in `docs/models.md` is made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import played
import pytest
from host import HOST
from warm import Warm

pytestmark = pytest.mark.host

# very different ones, which every run of the tests plays: towers and windows, experts, a state, a head that scales
SAMPLE = ("gemma3", "phimoe", "granitemoehybrid", "cohere")


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """What was measured, by architecture, or why it was left out; what did not run now stays as it was written."""
    found: dict[str, Any] = {}
    yield found
    if path := os.environ.get("SPIN_CONFIGS_FIGURES"):
        file = Path(path)
        before = json.loads(file.read_text()) if file.exists() else {}
        kept = before["figures"] if before.get("host") == str(HOST) else {}
        rows = {name: {**kept, **found}[name] for name in architectures.ARCHITECTURES if name in {*kept, *found}}
        file.write_text(json.dumps({"host": str(HOST), "figures": rows}, indent=1) + "\n")


def left_out(name: str) -> str:
    """Returns why the host cannot train an architecture here; empty where it can."""
    last, why = architectures.HOST_CANNOT.get(name, ("0.0", ""))
    concerned = HOST.release[:2] <= tuple(map(int, last.split(".")))
    return architectures.lacking(name) or (why if concerned else "")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.configs) for name in architectures.ARCHITECTURES],
)
def test_two_iterations(name: str, tmp_path: Path, warm: Warm, figures: dict[str, Any]) -> None:
    if why := left_out(name):
        figures[name] = why
        pytest.skip(why)
    found = played.play(name, tmp_path / "run", warm)
    shutil.rmtree(tmp_path / "run")
    figures[name] = found.measured()
    assert found.first_losses == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert found.off < 1e-5
    assert found.same == found.asked > 0
    assert not found.missing
    assert found.moved and not any(part in name for name in found.moved for part in ("vision", "audio", "projector"))


# what other tests build, and what of it a pinned host cannot
BUILT = {*SAMPLE, "gemma3_text", "gemma4", "gemma4_unified", "llama", "llama4", "mistral3", "voxtral"}
BUILT |= {"qwen2_5_vl", "qwen3_5", "mixtral", "qwen3_moe", "deepseek_v3", "gemma3n_text"}
LACKING: dict[str, set[str]] = {"0.19.0": set(), "0.21.0": {"qwen3_5"}}  # whose kernels there need a GPU


@pytest.mark.skipif(str(HOST) not in LACKING, reason="what is lacking is known of the pinned hosts alone")
def test_no_test_is_left_out_unnoticed() -> None:
    """Tests of an architecture that a host lacks are left out."""
    assert {name for name in BUILT if architectures.lacking(name)} == LACKING[str(HOST)]
