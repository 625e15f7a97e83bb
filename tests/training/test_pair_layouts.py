"""Padded, packed and shared: the same log-probs and gradients, from the same function."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate.utils import convert_outputs_to_fp32
from largest import Largest
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import create_mask
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    PhiConfig,
)

from axolotl_spin.settings.spin import LossType
from axolotl_spin.training.head import selected_logps
from axolotl_spin.training.layouts import PairCollator, _balanced_rows, _cheapest_rows, token_multiple
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.masks import shared_block_mask, shared_mask
from axolotl_spin.training.step import pair_losses


def pairs(count: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> np.ndarray:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(7, 47, (length,), generator=generator).numpy().astype(np.int32)

    return [{"prompt_ids": ids(1, 12), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


ROW = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}
OTHER = {"prompt_ids": [9], "chosen_ids": [2], "rejected_ids": [3, 4, 2]}


def as_lists(layout: Any, rows: list[dict]) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in PairCollator(0, layout)(rows).items()}


def test_padded_worked_example() -> None:
    """Human answers first, then the opponent's; padding on the right; the masks know lengths, not ids."""
    assert as_lists("padded", [ROW, OTHER]) == {
        "input_ids": [[5, 6, 7, 2], [9, 2, 0, 0], [5, 6, 8, 0], [9, 3, 4, 2]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        "columns": [0, 1, 2],
        "picks": [1, 2, 3, 7, 9, 10, 11],
        "targets": [7, 2, 2, 8, 3, 4, 2],
        "completion_lengths": [2, 1, 1, 3],
    }


def test_packed_worked_example() -> None:
    assert as_lists("packed", [ROW, OTHER]) == {
        "input_ids": [[5, 6, 7, 2, 5, 6, 8, 9, 2, 9, 3, 4, 2]],
        "position_ids": [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2, 3]],
        "columns": [1, 2, 7, 5, 9, 10, 11],
        "picks": list(range(7)),
        "targets": [7, 2, 2, 8, 3, 4, 2],
        "completion_lengths": [2, 1, 1, 3],
    }


def test_shared_worked_example() -> None:
    assert as_lists("shared", [ROW, OTHER]) == {
        "input_ids": [[5, 6, 7, 2, 8, 9, 2, 3, 4, 2]],
        "position_ids": [[0, 1, 2, 3, 2, 0, 1, 1, 2, 3]],
        "segments": [[0, 0, 1, 1, 2, 3, 4, 5, 5, 5]],
        "columns": [1, 2, 5, 1, 5, 7, 8],
        "picks": list(range(7)),
        "targets": [7, 2, 2, 8, 3, 4, 2],
        "completion_lengths": [2, 1, 1, 3],
    }


def test_what_sees_what() -> None:
    """P P C C R, and one token of padding that sees itself alone."""
    mask = shared_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    assert mask.shape == (1, 1, 6, 6)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_rows_hold_whole_pairs_evenly() -> None:
    assert _balanced_rows([5, 4, 3, 2, 6], 2) == [[2, 3, 4], [0, 1]]  # 6; 5; 5 + 4; 6 + 3; 9 + 2
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    rows = _balanced_rows(lengths, 12)
    assert sorted(index for row in rows for index in row) == list(range(200))
    sums = [sum(lengths[index] for index in row) for row in rows]
    assert max(sums) <= 1.02 * sum(lengths) / 12


def test_rows_are_as_long_as_pays() -> None:
    """A large model's rows may be long; a small one's attention over them costs more than padding."""
    assert [len(_cheapest_rows([100] * 8, hidden)) for hidden in (10**6, 1)] == [1, 8]
    # 800 * (1 + width / 3600) in 1, 2, 4 and 8 rows: 978, 889, 844, 822
    assert len(_cheapest_rows([100] * 8, 600)) == 8
    # 1 row: 1000 * (1 + 1000 / 3600) = 1278; 2 rows of 510: 1165; 3 of 340: 1116, the least; 4 of 300: 1300
    ragged = [300, 90, 100, 110, 60, 40, 150, 150]
    rows = _cheapest_rows(ragged, 600)
    assert sorted(index for row in rows for index in row) == list(range(8))
    assert sorted(sum(ragged[index] for index in row) for row in rows) == [320, 340, 340]


def gradients(model: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps))
    (logps * weights).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("hidden_size", [10**6, 1], ids=["one row", "several rows"])
@pytest.mark.parametrize("in_head", [False, True])
def test_layouts_agree(attention: str, layout: Any, hidden_size: int, in_head: bool) -> None:
    model = tiny.model(47, seed=3, attn_implementation=attention).train()
    assert model.config._attn_implementation == attention
    made = pairs()
    expected = completion_logps(model, PairCollator(0, "padded")(made))
    batch = PairCollator(0, layout, hidden_size)(made)
    assert (len(batch["input_ids"]) > 1) == (layout != "packed" and (layout == "padded" or hidden_size == 1))
    found = completion_logps(model, batch, in_head)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
    theirs, ours = gradients(model, expected), gradients(model, found)
    assert theirs.keys() == ours.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 1
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5 * largest), name


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["sigmoid", "space"])
def test_every_layout_gives_the_same_loss_per_token(layout: Any, adapter: bool, kind: LossType) -> None:
    """The loss, its rewards and its gradients, from lengths that are the layout's own; an empty answer among them."""
    model: Any = tiny.model(47, seed=3).train()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    rows = [{**pair, "opponent_chosen_logp": -9.0, "opponent_rejected_logp": -20.0, "weight": 1.0} for pair in pairs()]
    rows[2] |= {"rejected_ids": np.zeros(0, dtype=np.int32), "opponent_rejected_logp": 0.0}

    def losses(of: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        batch = PairCollator(0, of)(rows)
        settings: dict[str, Any] = {"beta": 2.0, "loss_type": kind, "sft_weight": 0.5, "length_normalized": True}
        found = pair_losses(model, batch, **settings, in_head=False)
        return found, gradients(model, found.losses)

    (expected, theirs), (found, ours) = losses("padded"), losses(layout)
    by_hand = (expected.logps[:7].detach() + 9.0) * 2.0 / torch.tensor([len(row["chosen_ids"]) for row in rows])
    assert torch.allclose(expected.spin.chosen_rewards, by_hand, atol=1e-6)
    assert expected.spin.rejected_rewards[2] == 0.0 and expected.spin.rejected_rewards.abs().max() > 0.1
    assert torch.allclose(found.losses, expected.losses, atol=1e-5)
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-5 * max(1, gradient.abs().max().item())), name


def test_an_eager_model_whose_config_names_its_type() -> None:
    """As one does that was read from a file and has been through the host."""
    model = tiny.model(47, seed=3, attn_implementation="eager").eval()
    expected = completion_logps(model, PairCollator(0, "shared")(pairs()))
    model.config.dtype = "float32"
    assert torch.equal(completion_logps(model, PairCollator(0, "shared")(pairs())), expected)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("in_parts", [False, "always"])
def test_a_batchs_tokens_may_be_a_multiple(layout: Any, in_parts: Any) -> None:
    """As fp8's products over them ask: the rest is padding, which changes no log-prob."""
    model = tiny.model(47, seed=3).eval()
    collator = PairCollator(0, layout)
    collator.multiple, collator.in_parts = token_multiple("fp8"), in_parts
    batch = collator(pairs())
    assert batch["input_ids"].numel() % 16 == 0 < PairCollator(0, layout)(pairs())["input_ids"].numel() % 16
    expected = completion_logps(model, PairCollator(0, "padded")(pairs()))
    assert torch.allclose(completion_logps(model, batch), expected, atol=1e-5)
    assert token_multiple("bf16") == token_multiple("no") == 1


SMALL = {"vocab_size": 47, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.3),
        CohereConfig(**SMALL, num_key_value_heads=2, logit_scale=3.0),
        PhiConfig(**SMALL),
    ],
    ids=["soft-capped", "scaled", "biased"],
)
def test_heads_that_do_more_than_project(config: Any, layout: Any) -> None:
    """Against the chain rule over each sequence by itself; and what the head adds is no trifle."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    rows = pairs()
    expected, bare = [], []
    for kind in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([[*row["prompt_ids"], *row[kind]]])
            places = torch.arange(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
            hidden = model.model(input_ids=ids).last_hidden_state
            for logits, sums in ((model(ids).logits, expected), (hidden @ head.weight.T, bare)):
                logps = logits[0, places].log_softmax(-1).gather(-1, ids[0, places + 1, None])
                sums.append(logps.sum())
    found = completion_logps(model, PairCollator(0, layout)(rows))
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert (torch.stack(expected) - torch.stack(bare)).abs().max() > 0.01


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layouts_agree_under_gradient_checkpointing(layout: Any, adapter: bool, reentrant: bool) -> None:
    model: Any = tiny.model(47, seed=3).train()
    if adapter:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
        model.enable_input_require_grads()
    rows = pairs()
    expected = completion_logps(model, PairCollator(0, "padded")(rows))
    plain = gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    forwards = 0
    first = model.get_base_model().model.layers[0] if adapter else model.model.layers[0]

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    first.input_layernorm.register_forward_hook(count)
    found = completion_logps(model, PairCollator(0, layout)(rows))
    assert torch.allclose(found, expected, atol=1e-5)
    checkpointed = gradients(model, found)
    assert forwards == 2  # once more in the backward pass
    assert checkpointed.keys() == plain.keys() and len(plain) == (28 if adapter else 21)
    largest = max(gradient.abs().max().item() for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, atol=1e-5 * largest), name


def test_flex_attention_gives_the_same_log_probs() -> None:
    """Its kernel has no backward pass on a CPU, so there are no gradients to compare here."""
    model = tiny.model(47, seed=3, attn_implementation="sdpa").eval()
    made = pairs(40)
    expected = completion_logps(model, PairCollator(0, "padded")(made)).detach()
    model.set_attn_implementation("flex_attention")
    batch = PairCollator(0, "shared", hidden_size=10**6)(made)
    assert batch["segments"].shape[1] > 256
    with torch.no_grad():
        found = completion_logps(model, batch)
    assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
    mask = shared_block_mask(batch["segments"])
    assert 0 < mask.sparsity() < 100  # blocks in which nothing is seen are left out
    assert torch.equal(
        create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu"), shared_mask(batch["segments"])
    )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_selected_logps_and_their_gradient(kind: torch.dtype, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's log-softmax of everything, with chunks of three tokens."""
    monkeypatch.setattr("axolotl_spin.training.head._CHUNK", 3 * 11)
    torch.manual_seed(0)
    logits = (4 * torch.randn(10, 11)).to(kind).requires_grad_()
    targets = torch.randint(11, (10,))
    weights = torch.randn(10)
    given = logits.clone()  # as a head gives them: no leaf
    found = selected_logps(given, targets, overwrite=overwrite)
    (found * weights).sum().backward()
    assert torch.equal(given, logits) != overwrite
    ours, logits.grad = logits.grad, None
    expected = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * weights).sum().backward()
    assert found.dtype == torch.float32 and ours.dtype == kind
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(ours.float(), logits.grad.float(), atol=1e-6 if kind == torch.float32 else 1e-2)


@pytest.mark.parametrize("in_head", [True, False])
def test_no_fp32_copy_of_the_logits_under_mixed_precision(in_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate makes one of the forward's output: what is taken in the head never becomes output."""
    monkeypatch.setattr("axolotl_spin.training.head._CHUNK", 40_000)
    model: Any = tiny.model(4000, seed=3).train()
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    model.forward = convert_outputs_to_fp32(context(model.forward))  # as `Accelerator.prepare` wraps it
    batch = PairCollator(0, "shared")(pairs(30))
    logits = len(batch["targets"]) * 4000
    assert logits > 1.5 * max(weight.numel() for weight in model.parameters())
    with Largest(lambda tensor: tensor.numel() if tensor.dtype == torch.float32 else 0) as largest:
        completion_logps(model, batch, in_head).sum().backward()
    assert (largest.found < logits) == in_head


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_model_that_cannot_leave_out_logits(layout: Any) -> None:
    model, rows = tiny.model(47, seed=3).eval(), pairs()
    expected = completion_logps(model, PairCollator(0)(rows))
    forward = model.forward

    def older(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None) -> Any:
        return forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)

    model.forward = older
    assert torch.allclose(completion_logps(model, PairCollator(0, layout)(rows)), expected, atol=1e-5)
