"""A test-only plugin: Ray Train's workers, for which the host asks for GPUs, meet on a CPU.

RAY_OVERRIDE_RESOURCES counts the GPUs that Ray is to believe in.
"""

from axolotl.integrations.base import BasePlugin
from ray.train.torch import TorchConfig

# the host leaves it to Ray, which takes NCCL where a worker asks for a GPU
TorchConfig.__init__.__defaults__ = ("gloo", *TorchConfig.__init__.__defaults__[1:])


class RayClusterPlugin(BasePlugin):
    """Does nothing but be imported first."""
