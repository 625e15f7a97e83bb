"""Quantised weights: their bits are not read as numbers, policy and opponent compute alike, and the host trains on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import host
import numpy as np
import pytest
import tiny
import torch
from torch import nn
from warm import Ranks, Warm

from axolotl_spin.training.policy import frozen, nonfinite_weights
from axolotl_spin.training.quantised import compute_as_in_training

REPACKS = bool(bnb.functional.has_avx512bf16())


def four_bits(size: int = 64) -> bnb.nn.Linear4bit:
    """Returns a layer as the host loads it: its packed bits are kept as bfloat16, some of which spell NaN."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=torch.float32)
    kept = {"quant_type": "nf4", "quant_storage": torch.bfloat16, "compress_statistics": True}
    layer.weight = bnb.nn.Params4bit(torch.randn(size, size).clamp(-1, 1), requires_grad=False, module=layer, **kept)
    return layer.to("cpu")


def eight_bits(size: int = 64) -> bnb.nn.Linear8bitLt:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(size, size, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(size, size)})
    return layer.to("cpu")


def as_sharded(layer: bnb.nn.Linear4bit) -> bnb.nn.Linear4bit:
    """Returns the layer with a weight that has lost its class, as a shard of it may."""
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer


def as_hqq() -> nn.Module:
    """Returns what HQQ's layer with `view_as_float` looks like from outside: its weight spells NaN throughout."""
    kind = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})
    layer = kind()
    layer.W_q = nn.Parameter(torch.full((4, 4), math.nan, dtype=torch.bfloat16), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "layer", [four_bits, eight_bits, lambda: as_sharded(four_bits()), as_hqq], ids=["4 bits", "8 bits", "a shard", "HQQ"]
)  # fmt: skip
def test_packed_bits_are_not_read_as_numbers(layer: Any) -> None:
    made = layer()
    spelt = [p for p in made.parameters() if p.is_floating_point() and not p.data.isfinite().all()]
    assert spelt or isinstance(made, bnb.nn.Linear8bitLt)  # else the case shows nothing
    model = nn.ModuleDict({"quantised": made, "norm": nn.LayerNorm(64)}).requires_grad_(False)
    assert nonfinite_weights(model, frozen=True) == []
    with torch.no_grad():
        model["norm"].weight[3] = math.nan
    assert nonfinite_weights(model, frozen=True) == ["norm.weight"]
    assert nonfinite_weights(model) == []
    model["norm"].weight.requires_grad_()
    assert nonfinite_weights(model) == ["norm.weight"]


@pytest.mark.parametrize("layer", [four_bits, eight_bits], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("starts", [True, False], ids=["training", "eval"])
def test_opponent_computes_as_the_policy_and_leaves_it_its_gradient(layer: Any, starts: bool) -> None:
    """bitsandbytes takes another kernel in `eval()`; of 4-bit weights for good, where the processor has AVX512-BF16."""
    model = nn.Sequential(layer(), nn.Dropout(0.5)).train(starts)
    compute_as_in_training(model)
    x = torch.randn(3, 64, requires_grad=True)
    with frozen(model), torch.no_grad():
        assert not model[1].training
        opponent = model(x.detach())
    assert [module.training for module in model.modules()] == [starts] * 3
    with torch.no_grad():
        model.eval()(x.detach())  # as the host evaluates
    policy = model[0].train()(x)
    assert torch.equal(opponent, policy)
    policy.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, model[0](torch.eye(64)).sum(-1).expand(3, 64))


@pytest.mark.skipif(not REPACKS, reason="this processor has no AVX512-BF16, where bitsandbytes packs weights anew")
def test_what_bitsandbytes_does_by_itself() -> None:
    """Why `compute_as_in_training` is there; where this fails, bitsandbytes has mended it and that can go."""
    layer, x = four_bits(), torch.randn(3, 64, requires_grad=True)
    before = layer(x).detach()
    with torch.no_grad():
        layer.eval()(x.detach())
    after = layer.train()(x)
    after.sum().backward()
    assert x.grad is None
    assert (after.detach() - before).abs().max() > 0.01


QLORA = {"adapter": "qlora", "load_in_4bit": True}
EIGHT = {"adapter": "lora", "load_in_8bit": True}
EXACT = 1e-8  # of a loss: the number of fp32 that is closest to ln 2 is 1.9e-9 from it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("quantised")
    host.config(made, rows=12)
    tiny.adapter(made / "model", made / "adapter")
    return made


def train(folder: Path, name: str, warm: Warm, *plugins: str, **changes: Any) -> host.Run:
    """Two iterations of 3 and 6 steps over a quantised tiny model, from one adapter."""
    own = {
        "plugins": [*plugins, *host.OURS],
        "output_dir": str(folder / name),
        "lora_model_dir": str(folder / "adapter"),
    }
    return host.train(host.config(folder, **{**host.LORA, **own, **changes}), by=warm)


@pytest.mark.host
def test_qlora_plays_two_iterations_whether_bitsandbytes_packs_anew_or_not(folder: Path, warm: Warm) -> None:
    """A GPU never packs anew: with it and without, every loss is the same."""
    run, plain = (
        train(folder, name, warm, *plugins, **QLORA)
        for name, plugins in (("packs", []), ("plain", ["half.PlainBitsPlugin"]))
    )
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=EXACT)
    assert len(run.losses()) == 3 + 6
    assert run.losses() == plain.losses()
    assert run.pairs(1)["rejected_ids"] == plain.pairs(1)["rejected_ids"]
    assert min(run.losses()) < 0.69
    assert "is off by" not in run.output
    assert (run.out / "adapter_model.safetensors").exists()


@pytest.mark.host
def test_eight_bits_play_two_iterations(folder: Path, warm: Warm) -> None:
    """The host loads the rest of the model in half precision, which rounds both alike in the same micro-batches."""
    run = train(folder, "eight", warm, **EIGHT)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=EXACT)
    assert min(run.losses()) < 0.69
    assert "is off by" not in run.output


@pytest.mark.host
@pytest.mark.parametrize("kind", [QLORA, EIGHT], ids=["4 bits", "8 bits"])
def test_quantised_weights_under_bf16(folder: Path, warm: Warm, kind: dict[str, Any]) -> None:
    """As users train: activations in bf16 too."""
    run = train(folder, f"half-{kind['adapter']}", warm, "half.HalfPlugin", **kind, bfloat16=True)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=EXACT)
    assert min(run.losses()) < 0.69


@pytest.mark.host
@pytest.mark.ranks
@pytest.mark.once
def test_qlora_sharded_by_fsdp2_plays_as_on_one_process(folder: Path, warm: Warm, warm_ranks: Ranks) -> None:
    """Shards of packed bits: answers, opponents and losses are those of one process, which 16-bit weights' are not."""
    changes = {**QLORA, "lora_dropout": 0.0}
    sharded = {**host.layout("fsdp2", folder), **changes, "lora_model_dir": str(folder / "adapter")}
    run = host.train(host.config(folder, **{**host.LORA, **sharded}), "fsdp2", by=warm_ranks)
    alone = train(folder, "alone", warm, **changes)
    plain = train(folder, "unpacked", warm, **{**changes, "adapter": "lora", "load_in_4bit": False})
    for iteration in range(2):
        pairs, expected = run.pairs(iteration), alone.pairs(iteration)
        assert pairs["rejected_ids"] == expected["rejected_ids"]
        for name in ("opponent_chosen_logp", "opponent_rejected_logp"):
            np.testing.assert_allclose(pairs[name], expected[name], rtol=0, atol=1e-3)
    assert run.losses() == pytest.approx(alone.losses(), abs=1e-4)
    assert [run.metrics(i)["loss_first"] for i in range(2)] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    bits, numbers = (np.array(made.pairs(0)["opponent_chosen_logp"]) for made in (alone, plain))
    assert np.abs(bits - numbers).max() > 0.1
