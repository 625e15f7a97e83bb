"""What a model draws in training is off, wherever it reads its rate, or the run is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host
import pytest
import tiny
import torch
from accelerate import Accelerator
from datasets import Dataset
from rows import PAIR
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    PersimmonConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from warm import Warm

from axolotl_spin.game.health import UnhealthyRunError
from axolotl_spin.game.noise import refuse_noise
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.noise import disable_dropout, noise, noisy

SIZE = {"vocab_size": 47, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# rates that are read at each forward, or go by another name
CONFIGS = {
    "Falcon": FalconConfig(**SIZE, hidden_dropout=0.2, attention_dropout=0.1, new_decoder_architecture=True),
    "Falcon, parallel": FalconConfig(**SIZE, hidden_dropout=0.2, parallel_attn=False, alibi=False),
    "Persimmon": PersimmonConfig(**SIZE, intermediate_size=64, attention_dropout=0.2),
    "GPT-J": GPTJConfig(vocab_size=47, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, attn_pdrop=0.3, resid_pdrop=0.1),
    "GPT-Neo": GPTNeoConfig(
        vocab_size=47, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], attention_dropout=0.3
    ),
    "BioGPT": BioGptConfig(**SIZE, intermediate_size=64, layerdrop=0.7),
}  # fmt: skip


def pairs() -> dict[str, torch.Tensor]:
    return PairCollator(0)([PAIR, {**PAIR, "prompt_ids": [5, 9, 12]}])


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, "eager") for name in CONFIGS] + [("Falcon", "sdpa"), ("Falcon, parallel", "sdpa"), ("Persimmon", "sdpa")],
)
def test_rates_of_every_kind_are_switched_off(name: str, attention: str) -> None:
    config: PreTrainedConfig = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for weight in model.parameters():  # so that what is dropped matters
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else None
    kept = model.config.to_dict()
    loud = max(noise(model, pairs()) for _ in range(4))
    assert disable_dropout(model)
    assert noise(model, pairs()) == 0.0
    # GPT-J and GPT-Neo read their config in flash attention alone, which needs a GPU: what it would read is 0
    held = [vars(module).get("config") for module in model.modules() if not isinstance(module, PreTrainedModel)]
    assert not [rates for config in filter(None, held) if (rates := noisy(vars(config)))]
    assert disable_dropout(model) == []
    assert model.config.to_dict() == kept  # as it is saved
    assert loud > 1e-3  # else the case shows nothing


def test_a_router_without_its_noise_is_the_same_router() -> None:
    """Phi-MoE draws its experts in training; its rate is also how near to the best one an expert must come to count."""
    config = PhimoeConfig(
        **SIZE, intermediate_size=64, num_local_experts=4, num_key_value_heads=2, router_jitter_noise=0.3
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else None
    with torch.no_grad():
        plain = completion_logps(model.eval(), pairs())
        assert noise(model, pairs()) > 1e-3
        assert disable_dropout(model) == ["router_jitter_noise=0.3"]
        assert noise(model, pairs()) == 0.0
        assert torch.equal(completion_logps(model.train(), pairs()), plain)
        assert torch.equal(completion_logps(model.eval(), pairs()), plain)


def test_modes_and_the_random_state_are_as_before() -> None:
    model = tiny.model(47).eval()
    model.model.layers[0].train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert noise(tiny.model(47, attention_dropout=0.5), pairs()) > 0.01
    torch.set_rng_state(state)
    assert noise(model, pairs()) == 0.0
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


class Loud(torch.nn.Module):
    """A head that draws, under no name that tells."""

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden + 0.1 * torch.randn_like(hidden) * self.training)


@pytest.mark.parametrize("keys", [{}, {"router_jitter_noise": 0.1}])
def test_what_stays_on_is_refused_with_the_key(keys: dict[str, float]) -> None:
    model = tiny.model(47)
    model.config.update(keys)
    ranks: Any = SimpleNamespace(accelerator=Accelerator(cpu=True), device=torch.device("cpu"))
    prompts = Dataset.from_list([PAIR] * 3)
    refuse_noise(model, prompts, 0, ranks, half=False)
    model.lm_head = Loud(model.lm_head)
    named = (
        "has `router_jitter_noise: 0.1`; set these to 0 under `overrides_of_model_config:`"
        if keys
        else "its code that does"
    )
    with pytest.raises(UnhealthyRunError, match="draws random numbers") as error:
        refuse_noise(model, prompts, 0, ranks, half=False)
    assert named in str(error.value)


@pytest.mark.host
def test_falcon_with_dropout_plays_through_the_host(tmp_path: Path, warm: Warm) -> None:
    settings = host.config(tmp_path, rows=8)
    torch.manual_seed(0)
    falcon = AutoModelForCausalLM.from_config(CONFIGS["Falcon"])
    falcon.save_pretrained(tmp_path / "model")
    run = host.train(settings, by=warm)
    assert "hidden_dropout=0.2" in run.output
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    saved = FalconConfig.from_pretrained(run.out)
    assert (saved.hidden_dropout, saved.attention_dropout) == (0.2, 0.1)
