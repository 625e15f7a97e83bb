"""A test-only plugin: workers of Ray Train, for which the host asks for GPUs, meet on a CPU.

RAY_OVERRIDE_RESOURCES says how many GPUs Ray is to believe in.
"""

from axolotl.integrations.base import BasePlugin
from ray.train.torch import TorchConfig

# the host leaves the backend to Ray, which takes NCCL where a worker asks for a GPU
TorchConfig.__init__.__defaults__ = ("gloo", *TorchConfig.__init__.__defaults__[1:])


class OnRayPlugin(BasePlugin):
    """Does nothing but be imported first."""
