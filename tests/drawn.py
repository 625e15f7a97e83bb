"""A test-only plugin: weights that are others at each start, as those that a host draws unseeded when it loads a model."""

from __future__ import annotations

import os

import torch
from axolotl.integrations.base import BasePlugin


class DrawnPlugin(BasePlugin):
    """Draws the first row of the embedding."""

    def post_model_load(self, cfg, model):
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big"))
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight[0] = torch.randn(weight.shape[1], generator=generator)


class UnseededPlugin(BasePlugin):
    """Seeds from the clock, as what the host imports does once in a fresh process."""

    def get_input_args(self):
        torch.seed()
        return None
