"""Where a step's time goes: by hand, and of a real step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace as Event

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from axolotl_spin.training.layouts import PairCollator

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from operators import PARTS, shares, speeds, step_of, table

pytestmark = pytest.mark.once


def test_what_each_takes_itself_by_hand() -> None:
    """In two steps 30 of 40 us are products, of which 10 forward; 9 of them belong to the log-probs' own function."""
    forward = Event(name="forward", cpu_parent=None, self_cpu_time_total=0)
    linear = Event(name="aten::linear", cpu_parent=forward, self_cpu_time_total=1)
    backward = Event(name="backward", cpu_parent=None, self_cpu_time_total=0)
    function = Event(name="autograd::engine::evaluate_function: _SelectedLogpsBackward", cpu_parent=backward,
                     self_cpu_time_total=2)  # fmt: skip
    events = [
        forward, linear, backward, function,
        Event(name="aten::mm", cpu_parent=linear, self_cpu_time_total=10),
        Event(name="aten::bmm", cpu_parent=backward, self_cpu_time_total=20),
        Event(name="aten::exp_", cpu_parent=function, self_cpu_time_total=7),
    ]  # fmt: skip
    taken = {key: count for key, count in shares(events).items() if count}
    assert taken == {
        ("forward", "products"): 10,
        ("forward", "aten::linear"): 1,
        ("backward", "products"): 20,
        ("backward", "log-probs of logits"): 9,
    }
    scaled = {key: 1000 * count for key, count in taken.items()}
    assert table(scaled, least=0.005, steps=2, smallest=0.1).splitlines()[2:] == [
        "| backward | products | 10 | 50.0% |",
        "| forward | products | 5 | 25.0% |",
        "| backward | log-probs of logits | 4 | 22.5% |",
        "| forward | rest | 0 | 2.5% |",
        "| all | | 20 | 100% |",
        "| least | | 5 | 25.0% |",
    ]


def test_a_real_step(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "model"), dtype=torch.float32)
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [9], "opponent_chosen_logp": -3.0,
            "opponent_rejected_logp": -4.0}  # fmt: skip
    step = step_of(model, PairCollator(0, "shared", 16)([pair]), torch.optim.AdamW(model.parameters(), fused=True))
    before = model.get_output_embeddings().weight.detach().clone()
    step()
    assert not torch.equal(before, model.get_output_embeddings().weight)
    with profile(activities=[ProfilerActivity.CPU]) as noted:
        step()
    taken = shares(noted.events())
    for expected in (
        *((part, "products") for part in ("forward", "backward")),
        *((part, "log-probs of logits") for part in ("forward", "backward")),
        ("optimizer", "aten::_fused_adamw_"),
    ):
        assert taken[expected] > 0
    assert {part for part, _ in taken} >= set(PARTS)


def test_the_speed_of_products_by_hand() -> None:
    """2 * 4 * 5 * 6 operations, twice a step: 480 in 2 us are 240 million a second, half of what the machine does."""
    linear = Event(name="aten::addmm", input_shapes=[[6], [4, 5], [5, 6], [], []], self_cpu_time_total=1)
    plain = Event(name="aten::mm", input_shapes=[[4, 5], [5, 6]], self_cpu_time_total=1)
    other = Event(name="aten::mul", input_shapes=[[4, 5], [4, 5]], self_cpu_time_total=9)
    found = speeds([linear, plain, other], machine=480e6, steps=1).splitlines()[2:]
    assert found == ["| 4 x 5 x 6 | 2 | 0 | 50% |"]
