"""Continuous batching inside a chunk: an answer that has ended makes room for the next prompt.

`generate` goes on until a batch's longest answer ends, and computes every row until then. Here ended rows leave the batch
and waiting prompts join it, so that its rows are answers still being written:

    prompts of the chunk, longest first -> prefill -> join the batch -> a token for each row, again and again -> leave it

What an answer is depends on the model, its prompt and its own seed alone, whatever stands beside it in the batch. Where a
model turns longer sequences by other frequencies (LongRoPE), those that reach its length are set aside until the shorter
ones have ended, and then are prefilled anew.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from axolotl_spin.generation.backend import Completion, Sampling
from axolotl_spin.generation.chunks import Chunk
from axolotl_spin.generation.rows import Rows

Forward = Callable[..., Any]

# of the batch, rows that are free at most before new ones join
_MOST_FREE = 0.5
# of the rows, those that leave at once at the least: what the others have in the cache is then copied
_WORTH_A_COPY = 0.25


class Draw:
    """Draws tokens from logits, each row with its own stream of uniform numbers: by the inverse of the distribution.

    Args:
        sampling: How answers are drawn.
        chunk: Whose answers; the stream of an answer depends on the chunk's seed and the prompt's row alone.
    """

    def __init__(self, sampling: Sampling, chunk: Chunk):
        self.greedy = sampling.temperature == 0
        # a token that stands for a picture, without one, is nothing that a forward could take
        self.never = list(chunk.images.placeholders) if chunk.images else []
        self.warpers: list[Any] = []
        if self.greedy:
            return
        if sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        streams = [np.random.Generator(np.random.Philox(key=[chunk.seed, row])) for row in chunk.rows]
        self.uniform = [stream.random(limit) for stream, limit in zip(streams, chunk.limits, strict=True)]

    def __call__(self, logits: Tensor, places: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Returns the next token of each row.

        Args:
            logits: (rows, vocabulary).
            places: The rows' positions in the chunk.
            counts: How many tokens each answer has so far.

        Returns:
            (rows,) ids.

        Raises:
            FloatingPointError: The logits are not numbers.
        """
        scores = logits.float()
        if self.never:
            known = [token for token in self.never if token < scores.shape[-1]]
            scores = scores.index_fill(-1, torch.tensor(known, device=scores.device), -torch.inf)
        if self.greedy:
            tokens = scores.argmax(-1)
            total = scores.gather(-1, tokens[:, None]).squeeze(-1)
        else:
            for warper in self.warpers:
                scores = warper(None, scores)
            cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
            total = cumulative[:, -1]
            uniform = [self._number(place, count) for place, count in zip(places, counts, strict=True)]
            below = total * torch.tensor(uniform, dtype=torch.float64, device=logits.device)
            # a token without probability is never the first to exceed the threshold, unless rounding lifts that to the top
            threshold = torch.minimum(below, torch.nextafter(total, torch.zeros_like(total)))
            tokens = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(-1)
        if not bool(total.isfinite().all()):
            raise FloatingPointError(
                "the model's logits are NaN or infinite while it answers: `fp16: true` with a model trained in bf16 "
                "overflows (use `bf16: true`), and so do damaged weights"
            )
        return tokens

    def _number(self, place: int, count: int) -> float:
        """Returns the number that draws an answer's token; of an answer that has ended, any."""
        numbers = self.uniform[place]
        return float(numbers[min(count, len(numbers) - 1)])


def can_decode(model: Any) -> bool:
    """Whether a model keeps plain keys and values for each token, so that rows can leave and join its cache.

    Linear attention, state-space and encoder-decoder models cannot; `generate` answers for them.

    Args:
        model: A causal language model, with its adapter but no other wrapper.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False  # its virtual tokens are in the cache, but not in the mask
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "_is_stateful", False) or base.config.is_encoder_decoder:
        return False
    layers = DynamicCache(config=base.config).layers
    plain = bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    taken = inspect.signature(base.forward).parameters
    return plain and {"position_ids", "past_key_values", "logits_to_keep"} <= set(taken)


def takes_padding(model: Any) -> bool:
    """Whether prompts of other lengths may stand padded beside each other where `generate` answers.

    The library's own caches go by the mask. A model that brings a kind of its own may count places instead: DeepSeek 4
    compresses the keys of every so many places, padding included.

    Args:
        model: A causal language model, with its adapter but no other wrapper.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return all(type(layer).__module__ == DynamicCache.__module__ for layer in DynamicCache(config=base.config).layers)


def left_padded(prompts: Sequence[Tensor], pad: int) -> Tensor:
    """Returns prompts as (rows, width) ids that all end in the last column, where their answers start."""
    return torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_value=pad, padding_side="left")


def decode(
    forward: Forward,
    chunk: Chunk,
    sampling: Sampling,
    batch_size: int,
    pad: int,
    device: Any,
    switches: Sequence[int] = (),
) -> list[Completion]:
    """Answers a chunk's prompts.

    Args:
        forward: The model's forward, of a causal language model for which `can_decode`.
        chunk: What is asked.
        sampling: How answers are drawn.
        batch_size: Most answers that are written at once.
        pad: Fills the padding of prompts; masked, so its value does not matter.
        device: Where the model is.
        switches: Lengths beyond which the model's frequencies are others (`switch_lengths`): rows on both sides of one
            share neither a forward nor a cache.

    Returns:
        An answer for each prompt, in order.

    Raises:
        FloatingPointError: The logits are not numbers.
    """
    draw, stops = Draw(sampling, chunk), set(sampling.stop_token_ids)
    drawn: list[list[int]] = [[] for _ in chunk.prompts]
    waiting: deque[int] = deque()
    places = range(len(chunk.prompts))
    rows: Rows | None = None
    most: float = math.inf  # tokens of a row in this pass

    def length(place: int) -> int:
        return len(chunk.prompts[place]) + len(drawn[place])

    def ended(place: int) -> bool:
        ids = drawn[place]
        return bool(ids) and (ids[-1] in stops or len(ids) >= chunk.limits[place])

    def rests(place: int) -> bool:
        """Whether no token comes in this pass."""
        return ended(place) or length(place) > most

    def take(places: Sequence[int], logits: Tensor) -> Tensor:
        """Draws a token for each row; one whose answer rests is only carried along."""
        tokens = draw(logits, places, [len(drawn[place]) for place in places])
        for place, token in zip(places, tokens.tolist(), strict=True):
            if not rests(place):
                drawn[place].append(token)
        return tokens

    def prefill(places: list[int]) -> Rows:
        written = [torch.as_tensor(chunk.prompts[place]).long() for place in places]
        written = [torch.cat([ids, ids.new_tensor(drawn[place])]) for ids, place in zip(written, places, strict=True)]
        lengths = [len(row) for row in written]
        ids = left_padded(written, pad)
        cache = DynamicCache()
        out = forward(**_inputs(ids.to(device), lengths), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Rows(places, cache, lengths, take(places, out.logits[:, -1]))

    for most in (*switches, math.inf):  # noqa: B007 (`rests` reads it)
        left = [place for place in places if not rests(place)]
        waiting, rows = deque(sorted(left, key=length, reverse=True)), None
        while waiting or rows:
            staying: list[int] = [row for row, place in enumerate(rows.places) if not rests(place)] if rows else []
            room = batch_size - len(staying)
            gone = len(rows.places) - len(staying) if rows else 0
            if waiting and room and room >= batch_size * worth_joining(sum(map(len, drawn)), sum(map(ended, places))):
                new = prefill([waiting.popleft() for _ in range(min(room, len(waiting)))])
                if rows and staying:
                    rows.join(staying, new)
                else:
                    rows = new
                continue
            if not staying:
                break
            assert rows is not None
            if gone and gone >= _WORTH_A_COPY * len(rows.places):
                rows.leave(staying)
                staying = list(range(len(staying)))
            lengths = rows.step(staying)
            out = forward(
                **_inputs(rows.tokens[:, None], lengths),
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            rows.tokens = take(rows.places, out.logits[:, -1])
    return [Completion(ids, "stop" if ids[-1] in stops else "length") for ids in drawn]


def worth_joining(tokens: int, ended: int) -> float:
    """Returns of which share of a batch on rows join at once.

    A forward over their prompts costs about as much as one over the batch, and a row that is free its share of each. Where
    n of B rows join at once, answers of L tokens on average cost, at each token, B / (L n) forwards of the one and n / 2B
    of the other: least at n = B sqrt(2 / L).

    Args:
        tokens: Drawn so far, of all answers.
        ended: Answers that have ended.
    """
    return min(_MOST_FREE, math.sqrt(2 * max(1, ended) / max(1, tokens)))


def _inputs(ids: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    """Returns the ids with their mask and positions.

    Args:
        ids: (rows, columns), right-aligned.
        lengths: Tokens of each row, those in the cache included.
    """
    total = torch.tensor(lengths, device=ids.device)[:, None]
    width = max(lengths)
    mask = (torch.arange(width, 0, -1, device=ids.device) <= total).long()  # (rows, width)
    positions = total - torch.arange(ids.shape[1], 0, -1, device=ids.device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp(min=0)}
