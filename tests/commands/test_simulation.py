"""What `axolotl spin plan` says of memory, against PyTorch's tracker on simulated ranks, and the simulation itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from axolotl_spin.commands.plan.memory import Load, estimate_memory
from axolotl_spin.commands.plan.size import model_size

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from simulation import ANSWER, FIGURES, LORA, PROMPT, SHAPES, TARGETS, Case, Step, seconds, simulate

TINY = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip


class Cfg(dict):
    """A config as the host gives it: missing keys are None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def planned(case: Case, shape: dict[str, int], folder: Path) -> int:
    """Returns the bytes that `plan` says a training step needs."""
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], tie_word_embeddings=False).save_pretrained(folder)
    cfg = Cfg(
        base_model=str(folder),
        base_model_config=str(folder),
        torch_dtype=torch.bfloat16,
        bf16=True,
        optimizer="adamw_torch_fused",
        gradient_accumulation_steps=case.accumulation,
        fsdp_config={"activation_checkpointing": case.checkpointing},
    )
    if case.adapter:
        names = {"r": "lora_r"}
        cfg.update(adapter="lora", lora_target_modules=TARGETS, **{names.get(key, key): LORA[key] for key in LORA})
    load = Load(case.ranks, "FSDP2", case.pairs * (PROMPT + 2 * ANSWER), case.pairs * 2 * ANSWER, 0)
    return estimate_memory(model_size(cfg), cfg, load)["training"]


@pytest.mark.once
@pytest.mark.parametrize("adapter", [False, True])
def test_fake_tensors_take_what_real_ones_take(adapter: bool) -> None:
    """The same step, with numbers and without: the same peak, and the same bytes to communicate."""
    case = Case("tiny", 4, pairs=1, adapter=adapter)
    real, fake = (simulate(case, TINY, real=kind) for kind in (True, False))
    assert fake.peak == real.peak and fake.traffic == real.traffic
    assert fake.flops == real.flops > 0


FOUND = json.loads(FIGURES.read_text())["figures"]


@pytest.mark.once
@pytest.mark.parametrize("entry", FOUND, ids=lambda entry: "-".join(map(str, entry["case"].values())))
def test_the_plan_agrees_with_the_figures_of_large_models(entry: dict[str, Any], tmp_path: Path) -> None:
    case = Case(**entry["case"])
    assert planned(case, SHAPES[case.model], tmp_path) == pytest.approx(entry["step"]["peak"], rel=0.1)


@pytest.mark.once
def test_seconds_by_hand() -> None:
    """989 GFLOP at half the peak take 2 ms. Of 40 GB 7/8 come from other ranks, at 360 GB/s by NVLink; on two nodes
    15/16, at 40 GB/s."""
    found = seconds(Step(0, {}, 989e9, 40e9), 8)
    assert found["compute"] == pytest.approx(0.002) and found["step"] == found["network"] == pytest.approx(35 / 360)
    assert seconds(Step(0, {}, 0, 40e9), 16)["step"] == pytest.approx(15 / 16)
