"""A test-only plugin: the last rank takes DAWDLE seconds longer to answer the first iteration's prompts."""

from __future__ import annotations

import os
import time
from typing import Any

from axolotl.integrations.base import BasePlugin


class DawdlePlugin(BasePlugin):
    """Plants it as late as our own modules are imported anyway."""

    def get_input_args(self) -> None:
        from axolotl_spin.generation.transformers import TransformersBackend

        answer = TransformersBackend.answer

        def late(self: Any, model: Any, chunks: Any, keep: Any, iteration: int = 0) -> Any:
            if iteration == 0 and self.ranks.rank == self.ranks.count - 1:
                time.sleep(float(os.environ["DAWDLE"]))
            return answer(self, model, chunks, keep, iteration)

        TransformersBackend.answer = late
