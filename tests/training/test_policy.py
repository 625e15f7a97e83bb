"""What is looked at of the policy as a module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import Parameter, ParameterDict
from torch.testing._internal.distributed.fake_pg import FakeStore

from axolotl_spin.training.policy import weights_digest

pytestmark = pytest.mark.once


def test_the_digest_counts_each_shard_once() -> None:
    """On four ranks that hold two replicas of two shards: what they add up to is the digest of the whole."""
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), process_index=0, reduce=lambda total, how: total)
    weight, found = torch.randn(6, 4), 0
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2))
            held = DTensor.from_local(weight.chunk(2)[rank % 2], mesh, [Replicate(), Shard(0)], run_check=False)
            found += int(weights_digest(ParameterDict({"weight": Parameter(held)}), accelerator), 16)
        finally:
            dist.destroy_process_group()
    assert found == int(weights_digest(ParameterDict({"weight": Parameter(weight)}), accelerator), 16)
