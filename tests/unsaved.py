"""A test-only plugin: an optimizer whose state cannot be saved, as some are under FSDP2, of which the host only warns."""

from accelerate.optimizer import AcceleratedOptimizer
from axolotl.integrations.base import BasePlugin


class UnsavedPlugin(BasePlugin):
    def post_trainer_create(self, cfg, trainer):
        def cannot(self):
            raise NotImplementedError("planted")

        AcceleratedOptimizer.state_dict = cannot
