"""Which backend answers a run's prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl_spin.disk.directory import RunDirectory
from axolotl_spin.generation.backend import Backend, Sampling
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.generation.vllm.backend import VllmBackend
from axolotl_spin.generation.vllm.served import ServedModel
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.settings.generation import GenerationConfig


def chosen_backend(
    generation: GenerationConfig,
    served: ServedModel | None,
    directory: RunDirectory,
    ranks: Ranks,
    sampling: Sampling,
    pad_token_id: int,
    *,
    save: Callable[[Path], None],
    optimizer: Callable[[], Any],
) -> Backend:
    """Returns the backend that `spin.generation.backend` names.

    Args:
        generation: The `spin.generation` block.
        served: What an engine would serve; None where the model itself answers.
        directory: The run's.
        ranks: All of them.
        sampling: How answers are drawn.
        pad_token_id: Fills the padding of prompts.
        save: Writes the policy to a folder; every rank calls it.
        optimizer: Returns the trainer's optimizer, which exists when training has begun.
    """
    if served is None:
        return TransformersBackend(ranks, sampling, pad_token_id, generation.batch_size, generation.gather_weights)
    return VllmBackend(ranks, sampling, generation.vllm, served, directory, save=save, optimizer=optimizer)
