"""The default backend: the training model's own `generate`, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import GenerationConfig

from axolotl_spin.generation import Chunk, Completion, Sampling, cut


class TransformersBackend:
    """Answers chunks with `model.generate`, chunk i on rank i modulo the number of ranks.

    Args:
        accelerator: The trainer's.
        sampling: How answers are drawn.
        pad_token_id: Fills the left padding; masked, so its value does not matter.
    """

    def __init__(self, accelerator: Any, sampling: Sampling, pad_token_id: int):
        self.accelerator = accelerator
        self.sampling = sampling
        self.pad_token_id = pad_token_id

    @torch.no_grad()
    def answer(self, model: Any, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Completion]]]:
        """See `Backend.answer`. The model must be in `eval()`; global random state is as before afterwards."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        rounds = -(-len(chunks) // ranks)
        generator = self.accelerator.unwrap_model(model)
        with _generation_config(generator):
            for turn in range(rounds):
                # with sharded weights every forward is collective: a rank without a chunk repeats another's
                position = turn * ranks + rank
                mine = position < len(chunks)
                chunk = chunks[position if mine else turn * ranks]
                completions = self._generate(generator, chunk)
                if mine:
                    yield chunk, completions

    def _generate(self, model: Any, chunk: Chunk) -> list[Completion]:
        device = self.accelerator.device
        width = max(len(prompt) for prompt in chunk.prompts)
        ids = torch.full((len(chunk.prompts), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, prompt in enumerate(chunk.prompts):  # padded on the left, so that answers start together
            ids[index, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[index, width - len(prompt) :] = 1
        sampling = self.sampling
        greedy = sampling.temperature == 0
        config = GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else sampling.top_k or 0,
            max_new_tokens=max(chunk.limits),
            eos_token_id=list(sampling.stop_token_ids) or None,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )
        with _seeded(chunk.seed, device):
            tokens = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                synced_gpus=_collective_forward(self.accelerator),
            )
        drawn = tokens[:, width:].tolist()
        return [cut(row, limit, sampling.stop_token_ids) for row, limit in zip(drawn, chunk.limits, strict=True)]


def _collective_forward(accelerator: Any) -> bool:
    """Whether a forward on one rank needs the others (sharded weights)."""
    if accelerator.num_processes == 1:
        return False
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return kind == DistributedType.FSDP


@contextmanager
def _generation_config(model: Any) -> Iterator[None]:
    """Puts the model's own generation config aside: `generate` fills what a caller leaves unset from it, so a model's
    repetition penalty or top_k would bend the samples away from the model's distribution."""
    owners = [module for module in model.modules() if "generation_config" in vars(module)]  # PEFT: the base model
    kept = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, kept, strict=True):
            owner.generation_config = config


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global random state for sampling and restores it, so that training's is untouched."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
