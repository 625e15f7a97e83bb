"""The default backend: the training model itself answers, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from axolotl_spin.generation.backend import Completion, Keep, Sampling, cut
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.decoding import Draw, can_decode, decode, left_padded, takes_padding
from axolotl_spin.generation.frequencies import switch_lengths
from axolotl_spin.generation.grouped import grouped
from axolotl_spin.ranks.bare import bare
from axolotl_spin.ranks.gather import Gather, whole_weights
from axolotl_spin.ranks.main import Ranks

LOG = get_logger(__name__)


class TransformersBackend:
    """Answers chunks with the policy, chunk i on rank i modulo the number of ranks.

    Args:
        ranks: All of them; asked between forwards whether another has failed.
        sampling: How answers are drawn.
        pad_token_id: Fills the left padding; masked, so its value does not matter.
        batch_size: Answers that one rank writes at once; halved where memory runs out.
        gather: The `spin.generation.gather_weights`.
    """

    def __init__(
        self,
        ranks: Ranks,
        sampling: Sampling,
        pad_token_id: int,
        batch_size: int = 32,
        gather: Gather = "auto",
    ):
        self.ranks = ranks
        self.sampling = sampling
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.gather = gather

    @torch.no_grad()
    def answer(self, model: Any, chunks: Sequence[Chunk], keep: Keep, iteration: int = 0) -> dict[str, float]:
        """See `Backend.answer`. The model must be in `eval()`; global random state is not touched."""
        ranks = self.ranks
        policy = bare(model, ranks.accelerator)
        with whole_weights(model, ranks.accelerator, self.gather) as coupled:
            pictured = getattr(chunks, "images", None) is not None
            if pictured and coupled:
                raise ValueError(
                    "`spin.generation.gather_weights`: ranks that gather weights for each forward together cannot answer "
                    "prompts with pictures, whose towers not every forward needs: set it to `true`"
                )
            decodes = can_decode(policy) and not pictured
            answer = self._decode if decodes else self._generate
            for position in range(ranks.rank, len(chunks), ranks.count):
                chunk = chunks[position]
                completions = answer(policy, chunk, coupled)
                ranks.made(len(completions), sum(len(completion.ids) for completion in completions))
                keep(chunk, completions)
            called = policy if decodes else generating(policy)  # as those ranks do that go on
            while coupled and self._any_rank_goes_on(False):
                called(input_ids=torch.full((1, 1), self.pad_token_id, device=ranks.device))
        if ranks.device.type != "cpu":
            torch.accelerator.empty_cache()  # the keys' and values' memory is training's again
        return {}

    def _any_rank_goes_on(self, this: bool) -> bool:
        """Whether a rank has a forward to make, where all must make it together."""
        return bool(self.ranks.sum(torch.tensor([float(this)], device=self.ranks.device)).item())

    def _decode(self, policy: Any, chunk: Chunk, coupled: bool) -> list[Completion]:
        """Answers by continuous batching."""

        def forward(**inputs: Any) -> Any:
            self._before_forward(coupled)
            return policy(**inputs)

        device, switches = self.ranks.device, switch_lengths(policy.config)
        while True:
            try:
                with grouped(policy):
                    return decode(forward, chunk, self.sampling, self.batch_size, self.pad_token_id, device, switches)
            except torch.OutOfMemoryError:
                # where the ranks' forwards are one, a rank cannot start again by itself
                if coupled or self.batch_size == 1:
                    raise
            self._halve()

    def _generate(self, policy: Any, chunk: Chunk, coupled: bool) -> list[Completion]:
        """Answers by `generate`, a batch at a time: for models whose cache has no plain keys and values."""
        longest = max(len(prompt) + limit for prompt, limit in zip(chunk.prompts, chunk.limits, strict=True))
        for most in switch_lengths(policy.config):
            if longest > most:  # of a text model that is known only now that it is loaded
                raise ValueError(
                    f"`sequence_len`: this model has other frequencies (`rope_type: longrope`) beyond {most} tokens, "
                    f"where answers by `generate` cannot go on, and a prompt and its answer may have {longest}: "
                    f"set it to at most {most}, or lower `spin.generation.max_new_tokens`"
                )
        # ahead of what gathers shards: ranks that have ended ask first, too
        hook = generating(policy).register_forward_pre_hook(lambda *_: self._before_forward(coupled), prepend=True)
        try:
            with _generation_config(policy), without(policy, "generate"):
                while True:
                    try:
                        parts = self._batches(chunk, alike=not takes_padding(policy))
                        return [completion for part in parts for completion in self._generate_batch(policy, part)]
                    except torch.OutOfMemoryError:  # as in `_decode`
                        if coupled or self.batch_size == 1:
                            raise
                    self._halve()
        finally:
            hook.remove()

    def _halve(self) -> None:
        """Goes on with fewer answers at once; to be called when nothing holds the failed ones any longer."""
        self.batch_size //= 2
        torch.accelerator.empty_cache()
        LOG.warning(
            f"out of memory while answering: going on with {self.batch_size} answers at once; a lower "
            "`spin.generation.batch_size` avoids the second try",
            main_process_only=False,
        )

    def _batches(self, chunk: Chunk, alike: bool) -> list[Chunk]:
        """Cuts a chunk into what `generate` answers at once: prompts of one length, where none may be padded."""
        parts, start, lengths = [], 0, [len(prompt) for prompt in chunk.prompts]
        while start < len(lengths):
            end = min(start + self.batch_size, len(lengths))
            if alike:
                end = next((place for place in range(start, end) if lengths[place] != lengths[start]), end)
            parts.append(chunk.part(start, end))
            start = end
        return parts

    def _generate_batch(self, policy: Any, chunk: Chunk) -> list[Completion]:
        device = self.ranks.device
        prompts = [torch.as_tensor(prompt).long() for prompt in chunk.prompts]
        ids, mask = left_padded(prompts, self.pad_token_id), left_padded([torch.ones_like(ids) for ids in prompts], 0)
        config = GenerationConfig(
            do_sample=False,  # the processor draws
            max_new_tokens=max(chunk.limits),
            eos_token_id=list(self.sampling.stop_token_ids) or None,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )
        tokens = policy.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            **(_of_pictures(policy, chunk, device) if chunk.images else {}),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Drawing(Draw(self.sampling, chunk), ids.shape[1])]),
            # under ZeRO-3 it asks all ranks before each token whether one goes on, which here the ranks do not do together:
            # each has chunks of its own, and `_before_forward` asks where forwards are one
            synced_gpus=False,
        )
        drawn = tokens[:, ids.shape[1] :].tolist()
        return [cut(row, limit, self.sampling.stop_token_ids) for row, limit in zip(drawn, chunk.limits, strict=True)]

    def _before_forward(self, coupled: bool) -> None:
        self.ranks.check()
        if coupled:
            self._any_rank_goes_on(True)


def _of_pictures(policy: Any, chunk: Chunk, device: Any) -> dict[str, torch.Tensor]:
    """Returns what `generate` takes beside left-padded ids where the prompts have pictures."""
    assert chunk.images is not None
    found = chunk.images.inputs(chunk.sources, chunk.prompts)
    given = {name: values.to(device) for name, values in found.of_images.items()}
    # where nothing casts for a forward, what the processor gives in fp32 does not fit weights in half precision
    given = {name: values.to(policy.dtype) if values.is_floating_point() else values for name, values in given.items()}
    return given | {name: left_padded(rows, 0).to(device) for name, rows in found.of_tokens.items()}


class _Drawing(LogitsProcessor):
    """Leaves `generate` no choice but the token that `Draw` takes."""

    def __init__(self, draw: Draw, width: int):
        self.draw, self.width = draw, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        count = input_ids.shape[1] - self.width
        tokens = self.draw(scores, range(len(scores)), [count] * len(scores))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


def generating(policy: Any) -> Any:
    """Returns the module of which `generate` calls the forwards: past an adapter, so that no hook of that one runs.

    DeepSpeed's, at the root, compare the ranks: where forwards are one, all ranks have to call the same module.
    """
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


@contextmanager
def without(model: Any, name: str) -> Iterator[None]:
    """Puts aside what hangs on a model's instances in place of a method of their class.

    Under FSDP2 the host wraps `generate` in the gathering and resharding of the root's weights: collectives that a rank
    with fewer chunks does not take part in, and a reshard of weights that were gathered for the phase.
    """
    owners = [(module, vars(module).pop(name)) for module in model.modules() if name in vars(module)]
    try:
        yield
    finally:
        for owner, method in owners:
            setattr(owner, name, method)


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
