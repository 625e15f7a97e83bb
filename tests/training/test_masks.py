"""Attention over a shared row: pair by pair as under the mask of tokens x tokens, what it holds, and flex's blocks."""

from __future__ import annotations

from typing import Any

import architectures
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from largest import Largest
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from axolotl_spin.training.layouts import PairCollator, masks_in_parts
from axolotl_spin.training.logprobs import completion_logps
from axolotl_spin.training.masks import SharedMask, Span, _sees, shared_block_mask, shared_mask

# rows of pairs, with a single token of everything, empty answers, and padding behind the second row
SPANS = [[Span(5, 4, 7), Span(1, 1, 1), Span(6, 3, 0)], [Span(3, 0, 9), Span(2, 5, 3)]]


def segments(spans: list[list[Span]]) -> Tensor:
    rows = [
        [3 * place + kind for place, span in enumerate(row) for kind, count in enumerate(span) for _ in range(count)]
        for row in spans
    ]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


@pytest.fixture(params=[False, True], ids=["a mask in a vector", "a triangle at the last key"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to an answer's attention; on a CPU torch makes a mask for the second."""
    monkeypatch.setattr("axolotl_spin.training.masks._aligns_with_the_last_key", lambda _: request.param)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 24)], ids=["one size", "larger values"])
def test_parts_are_the_masked_attention(grouped: bool, scale: float | None, sizes: tuple[int, int]) -> None:
    """Forward and backward; queries, keys and values as models give them, tokens before heads in memory."""
    where = segments(SPANS)
    torch.manual_seed(0)
    rows, length = where.shape
    shapes = [(4, sizes[0]), (2 if grouped else 4, sizes[0]), (2 if grouped else 4, sizes[1])]
    given = [torch.randn(rows, length, *shape).transpose(1, 2).requires_grad_() for shape in shapes]
    weights = torch.randn(rows, 4, length, sizes[1]) * (where != -1)[:, None, :, None]

    def attend(mask: Tensor) -> list[Tensor]:
        found = F.scaled_dot_product_attention(*given, attn_mask=mask, scale=scale, enable_gqa=grouped)
        found = found * (where != -1)[:, None, :, None]
        return [found, *torch.autograd.grad((found * weights).sum(), given)]

    expected, found = attend(shared_mask(where)), attend(SharedMask(where, SPANS))
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1
        assert torch.allclose(ours, theirs, atol=1e-5), (ours - theirs).abs().max()


def test_padding_is_finite() -> None:
    where = segments(SPANS)
    given = [torch.randn(*where.shape, 2, 8).transpose(1, 2) for _ in range(3)]
    found = F.scaled_dot_product_attention(*given, attn_mask=SharedMask(where, SPANS))
    assert not found.transpose(1, 2)[where == -1].any() and found.transpose(1, 2).is_contiguous()


def test_it_is_the_mask_for_whatever_else_is_done_with_it() -> None:
    """What only looks at the mask, or takes all of it, leaves it as it is; anything else makes it, once."""
    where = segments(SPANS)
    mask, real = SharedMask(where, SPANS), shared_mask(where)
    assert (mask.shape, mask.dtype, mask.device, mask.dim()) == (real.shape, torch.bool, real.device, 4)
    rows, _, length, _ = mask.shape
    for same in (mask.detach(), mask[:, :, :, :length], mask.expand(rows, 1, length, length), mask.to("cpu"), mask[:]):
        assert isinstance(same, SharedMask) and same.shape == real.shape and same.whole is None
    assert mask.whole is None
    scores = torch.randn(rows, 4, length, length)
    for ask in (
        lambda it: torch.where(it, scores, -1.0),
        lambda it: it.float().sum(-1),
        lambda it: scores.masked_fill(~it, 0.0),
        lambda it: it[:, :, 2:5],
        lambda it: it.expand(rows, 4, length, length) & (scores > 0),
    ):
        found = ask(mask)
        assert type(found) is Tensor and torch.equal(found, ask(real))
    assert torch.equal(mask.made(), real) and mask.made() is mask.made()
    # attention that is asked for a part of the queries alone
    query, key = torch.randn(rows, 4, 3, 8), torch.randn(rows, 4, length, 8)
    found = F.scaled_dot_product_attention(query, key, key, attn_mask=mask[:, :, -3:])
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, key, attn_mask=real[:, :, -3:]))


def pairs(count: int = 5, longest: int = 30, vocabulary: int = 47) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, longest, (count, 3))
    kinds = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{kind: draw.integers(7, vocabulary, size) for kind, size in zip(kinds, row, strict=True)} for row in sizes]


def results(model: Any, in_parts: Any, hidden_size: int = 10**6, in_head: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Returns log-probs and the gradients of a weighted sum of them."""
    collator = PairCollator(0, "shared", hidden_size)
    collator.in_parts = in_parts
    batch = collator(pairs())
    assert ("spans" in batch) == (in_parts == "always")
    logps = completion_logps(model, batch, in_head)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return logps.detach(), [weight.grad.clone() for weight in weights if weight.grad is not None]


def assert_alike(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.allclose(found[0], expected[0], atol=1e-5 * max(1, expected[0].abs().max().item()))
    assert len(found[1]) == len(expected[1]) > 0
    largest = max(gradient.abs().max().item() for gradient in expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * largest)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("hidden_size", [10**6, 1], ids=["one row", "several rows"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_model_learns_the_same_from_parts(hidden_size: int, checkpointing: bool | None, adapter: bool) -> None:
    model: Any = tiny.model(47, seed=3, attn_implementation="sdpa").train()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.enable_input_require_grads()
    expected = results(model, False, hidden_size)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_alike(results(model, "always", hidden_size, in_head=True), expected)


# latent attention; a part of a head turned; heads of another kind; several towers
@pytest.mark.parametrize("kind", ["deepseek_v3", "phi", "gpt2", "cohere", "falcon", "qwen3_vl"])
def test_architectures_learn_the_same_from_parts(kind: str) -> None:
    model = architectures.build(kind, 47).eval()
    model.set_attn_implementation("sdpa")
    assert_alike(results(model, "always"), results(model, False))


def test_parts_under_autocast() -> None:
    """In the types that autocast gives; no further from fp32 than the masked attention is."""
    model = tiny.model(47, seed=3, attn_implementation="sdpa").eval()
    exact, _ = results(model, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = results(model, "always")[0], results(model, False)[0]
    off, theirs = (found - exact).abs().mean(), (expected - exact).abs().mean()
    assert 0 < off < 1.5 * theirs


def stored(tensor: Tensor) -> int:
    """Returns the bytes of a tensor; a `SharedMask` has none."""
    return tensor.untyped_storage().nbytes() if type(tensor) is Tensor else 0


@pytest.mark.parametrize("in_parts", [True, False])
def test_long_rows_have_no_mask_of_tokens_by_tokens(in_parts: bool) -> None:
    model = tiny.model(47, seed=3, attn_implementation="sdpa", max_position_embeddings=4096).train()
    collator = PairCollator(0, "shared", 10**6)
    collator.in_parts = in_parts
    batch = collator([{kind: np.arange(1000) % 40 for kind in ("prompt_ids", "chosen_ids", "rejected_ids")}])
    with Largest(stored) as largest:
        completion_logps(model, batch, in_head=True).sum().backward()
    assert (largest.found < 3000**2) == in_parts


def test_when_attention_is_computed_in_parts() -> None:
    """Above a MiB of mask, and 128 KiB of it for each pair."""
    assert [masks_in_parts(2**20, 1), masks_in_parts(2**20 + 1, 8), masks_in_parts(2**20 + 1, 9)] == [
        False,
        True,
        False,
    ]
    row = {"prompt_ids": [5] * 600, "chosen_ids": [6] * 300, "rejected_ids": [7] * 125}
    short = {**row, "rejected_ids": [7] * 124}  # 1,024 tokens
    collator = PairCollator(0, "shared", 10**6)
    assert collator([row])["spans"].tolist() == [[0, 600, 300, 125]] and "spans" not in collator([short])
    assert collator([row, short])["spans"].tolist() == [[0, 600, 300, 125], [0, 600, 300, 124]]
    collator.hidden_size = 1
    assert collator([row, short])["spans"].tolist() == [[0, 600, 300, 125], [1, 600, 300, 124]]
    collator.in_parts = False
    assert "spans" not in collator([row])


@pytest.mark.parametrize(
    "spans", [SPANS, [[Span(300, 200, 140), Span(1, 128, 600)], [Span(128, 128, 128)]]], ids=["short", "long"]
)
def test_flex_attention_has_the_blocks_that_torch_finds(
    spans: list[list[Span]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the mask of tokens x tokens, from which `create_block_mask` counts them."""
    monkeypatch.setattr("axolotl_spin.training.masks._AT_ONCE", 2 * 128 * 1500)
    where = segments(spans)
    rows, length = where.shape

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(where[row, query], where[row, key]) & (query >= key)

    expected, found = create_block_mask(seen, rows, None, length, length, device="cpu"), shared_block_mask(where)
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (found, expected))
        assert torch.equal(counts, wanted), kind
        for ours, theirs, count in zip(
            getattr(found, f"{kind}_indices").flatten(0, 2), getattr(expected, f"{kind}_indices").flatten(0, 2),
            counts.flatten(), strict=True,
        ):  # fmt: skip
            assert torch.equal(ours[:count], theirs[:count]), kind


def test_flex_attentions_blocks_are_counted_some_at_a_time() -> None:
    where = segments([[Span(3000, 500, 596)]])
    with Largest(stored) as largest:
        shared_block_mask(where)
    assert largest.found < 4096**2
