"""What a model does to its logits, and log-probs that hold none of them, against torch's log-softmax of everything."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_pair_layouts import pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from axolotl_spin.training.head import (
    Change,
    Product,
    TiledHead,
    logit_change,
    logits_held,
    selected_logps,
    tiled_logps,
)
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps

CHANGES = [Change(), Change(factor=0.7), Change(divisor=3.0), Change(cap=2.0), Change(factor=1.5, cap=4.0)]
SHAPE = {
    "vocab_size": 47,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.5,
}


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).requires_grad_()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("chunk", [10 * 3, 10 * 47, 10 * 1000])
def test_tiles_against_all_logits(change: Change, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tokens, tiles of 3 of 47 tokens of the vocabulary, and a low-rank product beside the head's own."""
    monkeypatch.setattr("axolotl_spin.training.head._CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight, bias, low, up = drawn(10, 16), drawn(47, 16), drawn(47), drawn(10, 3), drawn(47, 3, scale=0.5)
    targets, weights = torch.randint(47, (10,)), torch.randn(10)
    leaves = [hidden, weight, bias, low, up]
    found = tiled_logps([Product(hidden, weight), Product(low, up)], bias, targets, change)
    ours = torch.autograd.grad((found * weights).sum(), leaves)
    logits = change(hidden @ weight.T + bias + low @ up.T)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    assert torch.allclose(found, expected, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5), (mine - other).abs().max()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_selected_logits_are_changed(change: Change, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axolotl_spin.training.head._CHUNK", 3 * 47)
    torch.manual_seed(0)
    logits, targets, weights = drawn(10, 47, scale=3), torch.randint(47, (10,)), torch.randn(10)
    found = selected_logps(logits.clone(), targets, change, overwrite)
    (ours,) = torch.autograd.grad((found * weights).sum(), logits)
    expected = change(logits).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(ours, theirs, atol=1e-5)


def test_nothing_is_computed_for_what_is_frozen() -> None:
    hidden, weight = drawn(4, 8), drawn(11, 8).detach()
    tiled_logps([Product(hidden, weight)], None, torch.tensor([1, 2, 3, 10])).sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_in_half_precision_it_is_rounded_as_a_head_rounds() -> None:
    """Under autocast the products are bf16, whatever the weights are; the gradient of the weight has the weight's type."""
    torch.manual_seed(0)
    hidden, weight, targets = drawn(10, 16), drawn(47, 16), torch.randint(47, (10,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tiled_logps([Product(hidden, weight)], None, targets)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    assert torch.allclose(found, expected, atol=1e-5)
    ours = torch.autograd.grad(found.sum(), [hidden, weight])
    theirs = torch.autograd.grad(expected.sum(), [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert torch.allclose(mine, other, atol=0.05)


class Sizes(TorchDispatchMode):
    """Notes how many numbers there are in each tensor that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        parts = found if isinstance(found, (tuple, list)) else [found]
        self.found |= {tensor.numel() for tensor in parts if isinstance(tensor, Tensor)}
        return found


# -- in models ---------------------------------------------------------------------------------------------------------


def model_of(kind: str) -> Any:
    torch.manual_seed(5)
    if kind == "cohere":
        return AutoModelForCausalLM.from_config(CohereConfig(**SHAPE, logit_scale=0.4))
    if kind == "gemma2":
        return AutoModelForCausalLM.from_config(Gemma2Config(**SHAPE, final_logit_softcapping=3.0))
    if kind == "granite":
        return AutoModelForCausalLM.from_config(GraniteConfig(**SHAPE, logits_scaling=5.0))
    model: Any = tiny.model(47, seed=3)
    if kind == "bias":
        head = model.lm_head
        model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
        torch.nn.init.normal_(model.lm_head.bias)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
        torch.nn.init.normal_(model.get_output_embeddings().lora_B["default"].weight)
    if kind == "modules_to_save":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return model


@pytest.mark.parametrize("kind", ["llama", "bias", "lora", "modules_to_save", "cohere", "gemma2", "granite"])
def test_models_give_the_same_in_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the forward's output, from the head's logits and in tiles: log-probs and all gradients are the same."""
    model = model_of(kind).eval()
    batch = PairCollator(0, "shared" if kind != "gemma2" else "padded")(pairs())
    weights = torch.randn(2 * 7)
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def ask(in_head: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        logps = completion_logps(model, batch, in_head)
        return logps, torch.autograd.grad((logps * weights).sum(), trained)

    output = ask(in_head=False)
    with Sizes() as held:
        head = ask(in_head=True)
    monkeypatch.setattr("axolotl_spin.training.head._HELD", 0)
    monkeypatch.setattr("axolotl_spin.training.head._CHUNK", len(batch["targets"]) * 5)
    with Sizes() as sizes:
        tiled = ask(in_head=True)
    for logps, gradients in (head, tiled):
        assert torch.allclose(logps, output[0], atol=1e-5), kind
        for mine, other in zip(gradients, output[1], strict=True):
            assert torch.allclose(mine, other, atol=1e-5), kind
    logits = len(batch["targets"]) * 47
    assert logits in held.found and logits not in sizes.found
    assert torch.equal(ask(in_head=True)[0], tiled[0])  # the head is as it was
    monkeypatch.undo()
    assert torch.equal(ask(in_head=True)[0], head[0])


def test_logits_that_fit_are_held() -> None:
    head = torch.nn.Linear(8, 131_072, bias=False, device="meta")
    tiled = TiledHead.of(head)
    assert tiled is not None
    assert [tiled.pays(tokens) for tokens in (512, 513)] == [False, True]  # 256 MiB are 512 * 131072 * 4 bytes


def test_what_a_step_holds_of_its_logits() -> None:
    """All of them up to 256 MiB; above, three tiles of 64 MiB."""
    assert logits_held(512, 131_072, 4) == 2**28
    assert logits_held(513, 131_072, 4) == 3 * 2**26


def test_a_head_that_is_more_than_a_product_is_left_alone() -> None:
    class Quantised(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden).round()

    assert TiledHead.of(Quantised(2, 3)) is None
    replaced = torch.nn.Linear(2, 3)
    replaced.forward = lambda hidden: hidden  # type: ignore[method-assign]
    assert TiledHead.of(replaced) is None
    dora = get_peft_model(tiny.model(47), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    assert TiledHead.of(dora.get_output_embeddings()) is None


def test_a_config_says_what_is_done_to_logits() -> None:
    assert logit_change(CohereConfig(logit_scale=0.25)) == Change(factor=0.25)
    assert logit_change(Gemma2Config()) == Change(cap=30.0)
    assert logit_change(GraniteConfig(logits_scaling=8.0)) == Change(divisor=8.0)
    assert logit_change(tiny.model(47).config) == Change()
