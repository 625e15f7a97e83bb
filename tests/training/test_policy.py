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
    """Of two replicas of two shards those of the first count."""
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), process_index=0, reduce=lambda total, how: total)
    shard = torch.randn(3, 4)
    alone = weights_digest(ParameterDict({"weight": Parameter(shard)}), accelerator)
    # torch keeps a mesh that it has seen, with the rank's place in it: so each of the two has one of its own
    for replicas, rank, expected in ((1, 1, alone), (2, 3, "0")):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2 * replicas)
        try:
            mesh = init_device_mesh("cpu", (replicas, 2))
            held = DTensor.from_local(shard, mesh, [Replicate(), Shard(0)], run_check=False)
            assert weights_digest(ParameterDict({"weight": Parameter(held)}), accelerator) == expected
        finally:
            dist.destroy_process_group()
