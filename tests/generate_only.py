"""A test-only plugin: the policy answers by `generate`, as a state-space or hybrid model does, whatever its cache is."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


class GenerateOnlyPlugin(BasePlugin):
    """Plants it as late as our own modules are imported anyway."""

    def get_input_args(self):
        import axolotl_spin.generation.transformers as backend

        backend.can_decode = lambda model: False
        return None
