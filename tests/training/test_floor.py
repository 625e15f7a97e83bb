"""The operations by which the benchmark judges a step: counted by hand, and as torch counts them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.once
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "floor.py"


@pytest.fixture(scope="module")
def floor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("floor_of_a_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_pair_takes(floor: ModuleType) -> None:
    """P P C C C R: the prompt's queries see 1 and 2 keys, the human answer's 3, 4 and 5, the opponent's one 3."""
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9]}
    assert floor.of_pairs([pair]) == (6, 1 + 2 + 3 + 4 + 5 + 3, 4)
    assert floor.of_pairs([pair, pair]) == (12, 36, 8)
    assert floor.of_rows(2, 3) == (6, 12, 6)


def test_as_torch_counts(floor: ModuleType, tmp_path: Path) -> None:
    """With scores of whole rows, so that each of 9 queries has 9 keys."""
    folder = tiny.save(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(10, 19)[None], use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops()
    # the angles of positions are a product, too
    assert floor.operations(folder, floor.Work(9, 81, 9)) == pytest.approx(counted, rel=1e-4)
    assert floor.operations(folder, floor.Work(9, 0, 9)) < 0.96 * counted


def test_the_matrix_speed_is_one(floor: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SIDE", 64)
    assert 1e6 < floor.matrix_speed() < 1e15
