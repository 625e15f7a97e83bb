"""Which backend answers a run's prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl_spin.generation import Backend, Sampling
from axolotl_spin.generation.transformers import TransformersBackend
from axolotl_spin.generation.vllm import VllmBackend
from axolotl_spin.run import SpinRun
from axolotl_spin.tally import Tally


def chosen_backend(
    run: SpinRun,
    accelerator: Any,
    sampling: Sampling,
    pad_token_id: int,
    tally: Tally,
    *,
    save: Callable[[Path], None],
    optimizer: Callable[[], Any],
) -> Backend:
    """Returns the backend that `spin.generation.backend` names.

    Args:
        run: Settings, and what an engine would serve.
        accelerator: The trainer's.
        sampling: How answers are drawn.
        pad_token_id: Fills the padding of prompts.
        tally: Shows the progress.
        save: Writes the policy to a folder; every rank calls it.
        optimizer: Returns the trainer's optimizer, which exists when training has begun.
    """
    generation = run.settings.generation
    if run.served is None:
        size, gather = generation.batch_size, generation.gather_weights
        return TransformersBackend(accelerator, sampling, pad_token_id, size, gather, tally.pulse, tally.count)
    engine, directory = generation.vllm, run.directory
    return VllmBackend(
        accelerator, sampling, engine, run.served, directory, save=save, optimizer=optimizer, tally=tally
    )
