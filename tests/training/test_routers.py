"""Mixtures of experts whose config asks for router logits: every forward leaves them out, and the run says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import host
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rows import PAIR
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)
from warm import Warm

from axolotl_spin.generation.backend import Sampling
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.decoding import decode
from axolotl_spin.training.layouts import Layout, PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.routers import leave_out_router_logits

SIZE: dict[str, Any] = {
    "vocab_size": 47, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "output_router_logits": True,
}  # fmt: skip
CONFIGS = {
    "Mixtral": MixtralConfig(**SIZE, num_local_experts=4),
    "Qwen2-MoE": Qwen2MoeConfig(**SIZE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "OLMoE": OlmoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2),
    "GPT-OSS": GptOssConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}  # fmt: skip


def made(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def answers(model: Any) -> list[list[int]]:
    prompts = (PAIR["prompt_ids"], PAIR["prompt_ids"][:2])
    chunk = Chunk(index=0, seed=3, rows=(0, 1), prompts=prompts, limits=(4, 4))
    return [answer.ids for answer in decode(model, chunk, Sampling(0.0, 1.0, None, ()), 2, 0, "cpu")]


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_and_log_probs_are_those_without_router_logits(name: str) -> None:
    model = made(CONFIGS[name])
    with pytest.raises((RuntimeError, ValueError)):
        answers(model)  # why: it balances the tokens of the whole mask, and this forward has the last alone
    assert leave_out_router_logits(model)
    assert model.config.output_router_logits
    plain = made(type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "output_router_logits": False}))
    assert not leave_out_router_logits(plain)
    assert answers(model) == answers(plain)
    layouts: tuple[Layout, ...] = ("padded", "shared") if name != "GPT-OSS" else ("padded",)
    for layout in layouts:
        batch = PairCollator(0, layout)([PAIR, PAIR])
        assert torch.equal(completion_logps(model, batch), completion_logps(plain, batch))
    assert model(input_ids=torch.tensor([[5, 6]])).aux_loss is None
    adapted = get_peft_model(made(CONFIGS[name]), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert leave_out_router_logits(adapted)
    assert answers(adapted) == answers(plain)  # an adapter begins as nothing


@pytest.mark.host
@pytest.mark.parametrize(("name", "adapter"), [("Mixtral", {}), ("Qwen2-MoE", host.LORA)], ids=["whole", "adapter"])
def test_mixtures_play_through_the_host(name: str, adapter: dict[str, Any], tmp_path: Path, warm: Warm) -> None:
    settings = host.config(tmp_path, rows=8, experts_implementation="eager", **adapter)
    made(CONFIGS[name]).save_pretrained(tmp_path / "model")
    run = host.train(settings, by=warm)
    assert run.output.count("the auxiliary loss that balances experts is no part of SPIN's") == 1
    assert "laid out shared" in run.output
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
