"""A test-only plugin: several ranks on a CPU take the path that accelerate keeps for accelerators (ZeRO, FSDP2)."""

import os

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import ModelLoader

_set_device = PartialState.set_device


def _plain_cpu(self):
    # accelerate numbers CPU devices, and torch cannot load an optimizer's state onto `cpu:0`
    _set_device(self)
    self.device = torch.device("cpu")


PartialState.set_device = _plain_cpu

if os.environ.get("CPU_CLUSTER"):

    def _backend(self, cpu, sagemaker_dp=False, backend=None):
        if "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_GPU
        return None, DistributedType.NO

    _build_device_mesh = ParallelismConfig.build_device_mesh
    PartialState._prepare_backend = _backend
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    ParallelismConfig.build_device_mesh = lambda self, kind: _build_device_mesh(self, "cpu")

    _all_gather_into_tensor = torch.distributed.all_gather_into_tensor

    @torch.no_grad()
    def _gather(output_tensor, input_tensor, *args, **kwargs):
        # gloo of torch 2.13 writes into views of ZeRO-2's flat parameters, which autograd forbids (DeepSpeed <0.19)
        work = _all_gather_into_tensor(output_tensor.detach(), input_tensor, *args, **kwargs)
        # DeepSpeed waits for the last of several only, which with an accelerator's stream means all; gloo's threads end in
        # any order, and weights that have not come yet would be computed with
        if work is not None:
            work.wait()
        return work

    torch.distributed.all_gather_into_tensor = _gather

    _set_device_map = ModelLoader._set_device_map_config

    def _on_the_cpu(self):
        _set_device_map(self)
        if isinstance(self.model_kwargs.get("device_map"), dict):  # QLoRA under FSDP: an accelerator's number
            self.model_kwargs["device_map"] = {"": "cpu"}

    ModelLoader._set_device_map_config = _on_the_cpu

if "DS_ACCELERATOR" in os.environ:
    import deepspeed.comm.torch

    # an all-reduce of its own through shared memory, compiled at the first use (a minute, and a lock that outlives a kill);
    # gloo's serves as well
    deepspeed.comm.torch.build_shm_op = lambda: None

    _init_distributed = deepspeed.comm.init_distributed

    def _over_gloo(*args, **kwargs):
        # of a single rank the host asks for NCCL, whatever the device
        return _init_distributed(*args, **{**kwargs, "dist_backend": "gloo"})

    deepspeed.comm.init_distributed = _over_gloo

torch.cuda.can_device_access_peer = lambda *devices: True  # hosts 0.20 and 0.21 ask, also without an accelerator


class CpuClusterPlugin(BasePlugin):
    """Does nothing but be imported first."""
