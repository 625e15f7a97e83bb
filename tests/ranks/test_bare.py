"""What is left of a policy without its wrappers, and that the wrapper which trains keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.parallel import DistributedDataParallel

from axolotl_spin.ranks.bare import as_trained, bare
from axolotl_spin.training.logprobs import _keeps_some_logits

ACCELERATOR = SimpleNamespace(
    unwrap_model=extract_model_from_parallel,
    state=SimpleNamespace(dynamo_plugin=SimpleNamespace(to_kwargs=lambda: {"backend": "eager"})),
)


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_compiled_ddp_goes_on_training_through_ddp(group: None) -> None:
    """accelerate's own way takes DDP out of the module that trains, and its forward goes through DDP all the same."""
    policy = tiny.model(47)
    wrapped = DistributedDataParallel(policy)
    compiled = torch.compile(wrapped, backend="eager")
    through: list[str] = []
    wrapped.register_forward_pre_hook(lambda *_: through.append("DDP"))
    ids = torch.tensor([[1, 2, 3]])
    assert bare(compiled, ACCELERATOR) is policy
    again = as_trained(compiled, ACCELERATOR)
    torch.testing.assert_close(again(input_ids=ids).logits, policy(input_ids=ids).logits)
    assert type(again) is type(compiled)
    assert through == []
    assert compiled._orig_mod is wrapped
    compiled(input_ids=ids)
    assert through == ["DDP"]


def test_what_is_not_compiled_stays_so() -> None:
    policy = tiny.model(47)
    assert as_trained(policy, ACCELERATOR) is policy


def test_a_compiled_model_is_asked_for_the_logits_that_are_needed() -> None:
    assert _keeps_some_logits(torch.compile(tiny.model(47), backend="eager"))
