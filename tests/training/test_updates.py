"""The share of weights that a step changes, by a sample, and where rounding loses the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from axolotl_spin.training.updates import UpdateSample


def stepped(weight: Tensor, optimizer: Any = torch.optim.SGD, step: float = 1.0, **settings: Any) -> UpdateSample:
    """Returns the sample of a weight after a step of a size that is the same for all its elements."""
    parameter = nn.Parameter(weight)
    made = optimizer([parameter], lr=step, **settings)
    sample = UpdateSample(made)
    parameter.grad = torch.ones_like(parameter)
    made.step()
    return sample


def shares(sample: UpdateSample) -> list[float | None]:
    """Returns what was changed of the weights in half precision, and of the others."""
    return [changed / count if count else None for changed, count in sample.counts().tolist()]


def test_a_step_below_half_the_spacing_changes_nothing() -> None:
    """bf16 has 8 bits: below 1 it is spaced by 2^-8, so that a step of 2^-10 leaves 0.75 where it is, and moves 0.1."""
    half = torch.tensor([0.75] * 3000 + [0.1] * 1000)
    assert shares(stepped(half.bfloat16(), step=2**-10)) == [pytest.approx(0.25, abs=0.03), None]
    assert shares(stepped(half, step=2**-10)) == [None, 1.0]


def test_a_large_weight_is_sampled_and_counts_by_its_size() -> None:
    """A million weights that stay, and a hundred thousand that move: 1/11, by 2^18 of them."""
    large, small = nn.Parameter(torch.full((1000, 1000), 0.75).bfloat16()), nn.Parameter(torch.full((100_000,), 0.75))
    optimizer = torch.optim.SGD([large, small], lr=2**-10)
    sample = UpdateSample(optimizer)
    for weight in (large, small):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert sample.counts().tolist() == [[0, 1_000_000], [100_000, 100_000]]
    assert 2**18 - 10 < sum(len(values) for values in sample._before) <= 2**18


def test_a_part_that_gets_no_gradient_does_not_move() -> None:
    weight = nn.Parameter(torch.rand(4000, 4) + 1)
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0)
    sample = UpdateSample(optimizer)
    weight.grad = torch.zeros_like(weight)
    weight.grad[:1000] = 1.0
    optimizer.step()
    assert shares(sample)[1] == pytest.approx(0.25, abs=0.02)


def test_an_optimizer_that_rounds_by_chance_loses_nothing() -> None:
    from torchao.optim import AdamW8bit

    weight = torch.full((64, 64), 0.75).bfloat16()
    for asked in (False, True):
        sample = stepped(weight.clone(), AdamW8bit, step=2**-11, weight_decay=0.0, bf16_stochastic_round=asked)
        assert sample.keeps_remainders is asked
        # 2^-11 is an eighth of the spacing: by chance one of eight moves
        assert shares(sample)[0] == pytest.approx(0.125 if asked else 0.0, abs=0.03)


@pytest.mark.parametrize(("library", "name"), [("optimi", "AdamW"), ("flashoptim", "FlashAdamW")])
def test_an_optimizer_that_keeps_the_remainder_loses_nothing(library: str, name: str) -> None:
    """Where they are installed, which the host leaves to the user."""
    kind = getattr(pytest.importorskip(library), name)
    on_a_cpu = {"quantize": False} if library == "flashoptim" else {}
    assert stepped(torch.full((64, 64), 0.75).bfloat16(), kind, step=2**-11, **on_a_cpu).keeps_remainders


def test_a_state_with_a_remainder_is_known() -> None:
    """As optimi, torchdistx and flashoptim name it; the libraries themselves are not the host's."""
    for name in ("kahan_comp", "compensation", "error_bits"):
        sample = stepped(torch.ones(64).bfloat16())
        assert not sample.keeps_remainders
        weight = sample._optimizer.param_groups[0]["params"][0]
        sample._optimizer.state[weight][name] = None
        assert not sample.keeps_remainders
        sample._optimizer.state[weight][name] = torch.zeros(64)
        assert sample.keeps_remainders
