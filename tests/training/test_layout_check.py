"""Which layout a model takes and where its log-probs are taken: by its config, and by trying it, in fp32 and in bf16."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from typing import Any

import architectures
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.attention.bias import causal_upper_left
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from axolotl_spin.training.layout_check import (
    head_off,
    layout_off,
    rounded_otherwise,
    settle_layout,
    tried_pairs,
)
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.preferred_layout import preferred_layout

BOTH = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SMALL = {"vocab_size": 47, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}

# -- by its config ----------------------------------------------------------------------------------------------------


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{"attn_implementation": "sdpa", "num_hidden_layers": 2, **changes})


@pytest.mark.parametrize(
    ("config", "packing", "layout", "why"),
    [
        (llama(), None, "shared", "sdpa takes a mask"),
        (llama(attn_implementation="eager"), True, "shared", "eager takes a mask"),
        (llama(), False, "padded", "`sample_packing: false`"),
        (llama(attn_implementation="flash_attention_2"), None, "packed", "by their positions"),
        (llama(attn_implementation="kernels-community/flash-attn3"), True, "packed", "by their positions"),
        (llama(attn_implementation="flex_attention"), None, "shared", "flex_attention takes a mask"),
        (llama(attn_implementation="paged|sdpa"), None, "padded", "not known to take a mask"),
        (MistralConfig(sliding_window=64, attn_implementation="sdpa"), None, "padded", "`sliding_window: 64`"),
        (MistralConfig(sliding_window=100, attn_implementation="sdpa"), None, "shared", "takes a mask"),
        (Qwen2Config(sliding_window=64, use_sliding_window=False, attn_implementation="sdpa"), None, "shared", "mask"),
        (Gemma3TextConfig(sliding_window=64, attn_implementation="sdpa"), None, "padded", "`sliding_window: 64`"),
        (Gemma3TextConfig(sliding_window=64, attn_implementation="flash_attention_2"), None, "packed", "positions"),
        (
            Llama4TextConfig(attention_chunk_size=64, attn_implementation="sdpa"),
            None,
            "padded",
            "`attention_chunk_size: 64`",
        ),
        (
            Llama4TextConfig(attention_chunk_size=64, attn_implementation="flash_attention_2"),
            None,
            "padded",
            "chunk_size",
        ),
        (Llama4TextConfig(attention_chunk_size=100, attn_implementation="sdpa"), None, "shared", "takes a mask"),
        (Qwen3NextConfig(attn_implementation="sdpa"), None, "padded", "`linear_attention` are not known"),
        (Qwen3NextConfig(attn_implementation="flash_attention_2"), None, "padded", "`linear_attention` are not known"),
        (GPTNeoConfig(window_size=64, attn_implementation="eager"), None, "padded", "`window_size: 64`"),
        (GPTNeoConfig(window_size=256, attn_implementation="eager"), None, "shared", "takes a mask"),
    ],
)
def test_what_the_attention_should_take(config: Any, packing: bool | None, layout: str, why: str) -> None:
    found, reason = preferred_layout(config, sample_packing=packing, longest=100)
    assert found == layout and why in reason


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({"layer_types": ["full_attention", "a_kind_of_next_year"]}, "padded"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "padded"),  # over so many tokens as nothing tells
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "shared"),
        ({"attention_window_size": 99}, "padded"),
        ({"attention_window_size": 99, "use_sliding_window": False}, "shared"),
        ({"index_topk": 64}, "padded"),
        ({"max_window_layers": 28}, "shared"),
        ({}, "shared"),
    ],
)
def test_kinds_of_layers_that_nobody_knows(given: dict[str, Any], layout: str) -> None:
    """As code of a model's own may name them; its config is any."""
    config = PreTrainedConfig()
    config._attn_implementation = "sdpa"
    for name, value in given.items():
        setattr(config, name, value)
    assert preferred_layout(config, sample_packing=None, longest=100)[0] == layout


# -- by trying it -----------------------------------------------------------------------------------------------------


def prompts(
    rows: int = 20, prompt: tuple[int, int] = (1, 12), answer: tuple[int, int] = (1, 9), seed: int = 0
) -> Dataset:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(7, 47) for _ in range(draw.randint(low, high))]

    return Dataset.from_list([{"prompt_ids": ids(*prompt), "chosen_ids": ids(*answer)} for _ in range(rows)])


class Ranks:
    """What a single process shows of `accelerate.Accelerator`."""

    device = torch.device("cpu")

    @staticmethod
    def unwrap_model(model: Any, **_: Any) -> Any:
        return model

    @staticmethod
    def gather(value: torch.Tensor) -> torch.Tensor:
        return value


def settled(model: Any, data: Dataset, longest: int = 64) -> tuple[str, PairCollator]:
    collator = PairCollator(0)
    return settle_layout(collator, model, data, Ranks, sample_packing=None, longest=longest), collator


def test_the_pairs_that_are_tried() -> None:
    """The two longest of the run come first, cut to 1,024 tokens, then others spread over it, cut to 64."""
    draw = random.Random(0)
    rows = [{"prompt_ids": [draw.randrange(99) for _ in range(90)], "chosen_ids": [5]} for _ in range(50)]
    rows[17]["chosen_ids"] = list(range(3000))
    rows[31]["prompt_ids"] = list(range(200))
    found = tried_pairs(Dataset.from_list(rows))
    lengths = [(len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in found]
    assert lengths == [(896, 128, 100), (101, 100, 32), (32, 32, 32), (32, 32, 32), (32, 32, 32), (32, 32, 128)]
    assert found[0]["prompt_ids"] + found[0]["chosen_ids"] == [*rows[17]["prompt_ids"], *range(1024 - 90)]
    assert found[1]["prompt_ids"] + found[1]["chosen_ids"] == [*range(200), 5]
    [pair] = tried_pairs(Dataset.from_list([{"prompt_ids": [7], "chosen_ids": [8]}]))
    assert pair == {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [8]}


@BOTH
@pytest.mark.parametrize("answer", [(1, 2), (20, 60)], ids=["a token or two", "long"])
@pytest.mark.parametrize("seed", range(6))
def test_a_sound_model_takes_the_shared_layout(kind: torch.dtype, answer: tuple[int, int], seed: int) -> None:
    """bf16's rounding is no defect, however few tokens there are to tell them apart."""
    model = tiny.model(47, seed=seed, attn_implementation="sdpa").to(kind).train()
    line, collator = settled(model, prompts(answer=answer, seed=seed))
    assert (
        line == "pairs are laid out shared: sdpa takes a mask; log-probs are taken where the LM head gives its logits"
    )
    assert (collator.layout, collator.in_head) == ("shared", True)
    assert model.training


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_run_of_a_few_pairs(rows: int) -> None:
    line, _ = settled(tiny.model(47, attn_implementation="sdpa").bfloat16(), prompts(rows, (1, 2), (1, 1)))
    assert "laid out shared" in line


def ignores_masks(model: Any) -> Any:
    """As linear attention, or a state-space model: every token sees all before it."""
    inner = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, position_ids=None, **kwargs: inner(*args, **kwargs)
    return model


def ignores_positions(model: Any) -> Any:
    inner = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    return model


@BOTH
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("defect", [ignores_masks, ignores_positions])
def test_a_model_that_does_not_keep_to_the_layout(kind: torch.dtype, layout: Any, defect: Callable) -> None:
    """By 7 times its noise and more; a sound one by less than it."""
    pairs = tried_pairs(prompts())
    figures = [
        layout_off(spoil(tiny.model(47, seed=3).to(kind).eval()), pairs, PairCollator(0, layout, 10**6), "cpu")
        for spoil in (lambda model: model, defect)
    ]
    (sound, noise), (off, _) = figures
    assert sound <= max(noise, 1e-4)
    assert off > 7 * max(noise, 1e-3)


def scales_its_logits(model: Any) -> Any:
    """As a temperature does it, after the LM head."""
    inner = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = 3 * out.logits
        return out

    scaled.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    model.forward = scaled
    return model


class ByKeyword(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(input=hidden)


def calls_its_head_by_keyword(model: Any) -> Any:
    """So that what the head is given is not seen where it is expected."""
    head = model.lm_head
    model.lm_head, model.get_output_embeddings = ByKeyword(head), lambda: head
    return model


def gives_no_numbers(model: Any) -> Any:
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    return model


@BOTH
@pytest.mark.parametrize(
    ("spoil", "layout", "in_head"),
    [
        (calls_its_head_by_keyword, "shared", False),
        (scales_its_logits, "shared", False),
        (ignores_masks, "padded", True),
        (gives_no_numbers, "padded", False),
    ],
)
def test_a_model_that_does_not_take_it_falls_back(
    kind: torch.dtype, spoil: Callable, layout: str, in_head: bool
) -> None:
    """One question's answer does not change another's."""
    line, collator = settled(spoil(tiny.model(47, seed=3, attn_implementation="sdpa").to(kind)), prompts())
    assert (collator.layout, collator.in_head) == (layout, in_head), line
    where = "where the LM head gives its logits" if in_head else "from the forward's output"
    assert line.startswith(f"pairs are laid out {layout}: ") and line.endswith(f"log-probs are taken {where}")
    assert ("nats per root of a token" in line) == (layout == "padded")


def caps_its_logits(model: Any) -> Any:
    """As Gemma 2 does it, without a word in its config."""
    inner = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        out.logits = torch.tanh(out.logits / 30.0) * 30.0
        return out

    capped.__signature__ = inspect.signature(inner)  # type: ignore[attr-defined]
    model.forward = capped
    return model


@BOTH
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("capped", ["not", "by its config", "in silence"])
def test_the_head_is_taken_where_it_gives_the_models_logits_exactly(
    kind: torch.dtype, layout: Any, capped: str
) -> None:
    """A cap of 30 on logits of a few is less than bf16's noise between layouts; within one it shows."""
    pairs, collator = tried_pairs(prompts(answer=(20, 60)))[:2], PairCollator(0, layout, 10**6)
    torch.manual_seed(0)
    cap = 30.0 if capped == "by its config" else None
    shape = {**SMALL, "head_dim": 8, "initializer_range": 0.2, "attn_logit_softcapping": None}
    config = Gemma2Config(**shape, final_logit_softcapping=cap)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(kind).eval()
    if capped == "in silence":
        model = caps_its_logits(model)
    off = head_off(model, pairs, collator, "cpu")
    assert off > 1e-3 if capped == "in silence" else off == 0.0
    if layout == "shared":
        line, found = settled(model, prompts(answer=(20, 60)))
        assert "laid out shared" in line and found.in_head == (capped != "in silence")


@BOTH
def test_rows_without_a_mask_are_tried(
    kind: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that aligns an answer's triangle with the first key gives it a mask again, of which the log tells."""
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    model = tiny.model(47, seed=3, attn_implementation="sdpa").to(kind)
    collator = settled(model, prompts(answer=(5, 9)))[1]
    assert collator.layout == "shared" and collator.in_parts and "tokens x tokens" not in caplog.text
    monkeypatch.setattr("axolotl_spin.training.masks._aligns_with_the_last_key", lambda _: True)
    monkeypatch.setattr("axolotl_spin.training.masks.causal_lower_right", causal_upper_left)
    line, collator = settled(model, prompts(answer=(5, 9)))
    assert line.startswith("pairs are laid out shared") and collator.layout == "shared" and not collator.in_parts
    assert "long rows have a mask of tokens x tokens" in caplog.text


def test_another_attention_is_not_asked_about_parts() -> None:
    model = tiny.model(47, seed=3, attn_implementation="eager")
    assert settled(model, prompts())[1].in_parts is False


def test_a_head_whose_logits_cannot_but_be_held_is_told() -> None:
    model = get_peft_model(
        tiny.model(47, attn_implementation="sdpa"), LoraConfig(target_modules=["lm_head"], use_dora=True)
    )
    line, collator = settled(model, prompts())
    assert collator.in_head and line.endswith("gives its logits, all of which are held: it is more than linear layers")


def test_a_model_that_does_not_repeat_itself_is_given_its_own_noise() -> None:
    """As kernels that add in any order do it (a mixture's experts on a GPU)."""
    model = tiny.model(47, seed=3).eval()
    draw = torch.Generator().manual_seed(0)
    model.model.norm.register_forward_hook(lambda _, __, out: out + 1e-4 * torch.randn(out.shape, generator=draw))
    pairs, collator = tried_pairs(prompts(answer=(20, 60)))[:2], PairCollator(0, "shared", 10**6)
    assert head_off(model, pairs, collator, "cpu") < 1e-3 < head_off(scales_its_logits(model), pairs, collator, "cpu")


def test_another_rounding_is_within_a_unit_and_leaves_the_random_state() -> None:
    layer, x = torch.nn.Linear(8, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    plain, state = layer(x), torch.get_rng_state()
    with rounded_otherwise(layer):
        moved = layer(x)
    apart = ((moved - plain).abs() / plain.abs()).float()
    assert 0 < apart.max() <= 2**-7
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(x), plain)


def test_a_state_space_model_is_found_out() -> None:
    """A real Mamba2 on a CPU: whatever it makes of masks and positions, it ends in the padded layout."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=47, num_hidden_layers=2, **shape)).eval()
    line, collator = settled(model, prompts())
    assert "pairs are laid out padded" in line and collator.layout == "padded"


@BOTH
def test_an_attention_that_does_not_heed_padding_is_told(
    kind: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token sees its whole row, as in a sparse attention that chooses among masked tokens too; others are quiet."""
    monkeypatch.setattr(logging.getLogger("axolotl"), "propagate", True)
    blurred = tiny.model(47, seed=3, attn_implementation="sdpa")
    blurred.model.norm.register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True))
    for model, told in (
        (tiny.model(47, seed=3, attn_implementation="sdpa"), False),
        (architectures.build("gemma2", 47), False),
        (architectures.build("mamba2", 47), False),
        (blurred, True),
    ):
        caplog.clear()
        collator = PairCollator(0)
        settle_layout(collator, model.to(kind), prompts(answer=(5, 9)), Ranks, sample_packing=False, longest=64)
        assert ("padding moves the model's log-probs" in caplog.text) == told, type(model).__name__
