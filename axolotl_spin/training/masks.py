"""Which token of a shared row sees which: as a mask, as flex attention's blocks, or as parts that need no mask.

A row of pairs `P C R P C R` is a staircase of triangles. A prompt with its human answer is plain causal attention. The
opponent's answer attends to the prompt and to itself, and nothing else is ever seen. `SharedMask` stands for the mask of
tokens x tokens where a model expects one, and has `sdpa` compute those parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_map_only

# truth values that exist at once while flex attention's blocks are looked through
_AT_ONCE = 4 * 2**20
_BLOCK = 128


def _sees(query: Tensor, key: Tensor) -> Tensor:
    """Whether a token of segment `query` may see an earlier one of segment `key`: of its pair, prompt or its own answer.

    Padding is segment -1, a pair of its own.
    """
    return (query // 3 == key // 3) & ((key % 3 == 0) | (query == key))


def shared_mask(segments: Tensor) -> Tensor:
    """Returns which token sees which in the shared layout.

    Args:
        segments: (rows, length) 3 * pair + 0 for its prompt, 1 for the human answer, 2 for the opponent's; -1 is padding.

    Returns:
        (rows, 1, length, length) bool; padding sees padding, so that no token sees nothing.
    """
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (_sees(segments[:, :, None], segments[:, None, :]) & earlier)[:, None]


def shared_block_mask(segments: Tensor) -> Any:
    """Returns the same for flex attention, whose kernel skips the blocks of 128 x 128 tokens in which nothing is seen.

    `create_block_mask` would make the mask of tokens x tokens and look through it; here some rows of blocks exist at once.

    Args:
        segments: See `shared_mask`.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows, length = segments.shape
    blocks = -(-length // _BLOCK)
    # beyond the row's end is a segment that sees nothing and is not seen
    padded = F.pad(segments, (0, blocks * _BLOCK - length), value=-4)
    place = torch.arange(blocks * _BLOCK, device=segments.device)
    together = max(1, _AT_ONCE // (rows * _BLOCK * blocks * _BLOCK))
    counted = []
    for start in range(0, blocks, together):
        queries = slice(start * _BLOCK, min(start + together, blocks) * _BLOCK)
        seen = _sees(padded[:, queries, None], padded[:, None, :]) & (place[queries, None] >= place)
        seen &= (padded[:, queries, None] != -4) & (padded[:, None, :] != -4)
        counted.append(seen.view(rows, -1, _BLOCK, blocks, _BLOCK).sum((2, 4), dtype=torch.int32))
    count = torch.cat(counted, 1)[:, None]  # (rows, 1, blocks, blocks)
    whole = count == _BLOCK * _BLOCK

    def ordered(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Returns how many blocks of keys each block of queries wants, and which, those first."""
        order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True)
        return wanted.sum(-1, dtype=torch.int32), order.to(torch.int32)

    def seen_by(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(segments[row, query], segments[row, key]) & (query >= key)

    return BlockMask.from_kv_blocks(
        *ordered((count > 0) & ~whole),
        *ordered(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen_by,
        seq_lengths=(length, length),
    )


class Span(NamedTuple):
    """Tokens of a pair in its row."""

    prompt: int
    chosen: int
    rejected: int


class SharedMask(Tensor):
    """The mask of `shared_mask` by its looks, without its storage.

    Scaled dot-product attention that is given it computes each pair by itself. Whatever else a model does with a mask is
    done with the real one, which is then made: the result is the same.

    Args:
        segments: See `shared_mask`.
        spans: The pairs of each row, in order from its start; what is left of a row is padding.
    """

    @classmethod
    def of(cls, segments: Tensor, spans: Tensor) -> SharedMask:
        """Returns the mask of a batch, as `PairCollator` describes its pairs."""
        pairs: list[list[Span]] = [[] for _ in segments]
        for row, *tokens in spans.tolist():
            pairs[row].append(Span(*tokens))
        return cls(segments, pairs)

    @staticmethod
    def __new__(cls, segments: Tensor, spans: list[list[Span]]) -> SharedMask:
        rows, length = segments.shape
        return Tensor._make_wrapper_subclass(cls, (rows, 1, length, length), dtype=torch.bool, device=segments.device)

    def __init__(self, segments: Tensor, spans: list[list[Span]]):
        self.segments, self.spans = segments, spans
        self.whole: Tensor | None = None

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SharedMask({self.segments!r}, {self.spans!r})"

    def made(self) -> Tensor:
        """Returns the mask of tokens x tokens; all layers that need it share one."""
        if self.whole is None:
            self.whole = shared_mask(self.segments)
        return self.whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION:
            found = _in_parts(*args, **(kwargs or {}))
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Does what touches the mask's values to the real mask; a view of all of it is it again."""
        mask = args[0] if args else None
        if isinstance(mask, SharedMask) and _takes_all(func, mask, args[1:]):
            return SharedMask(mask.segments, mask.spans)
        args, kwargs = tree_map_only(SharedMask, SharedMask.made, (args, kwargs or {}))
        return func(*args, **kwargs)


_ATTENTION = F.scaled_dot_product_attention


def _takes_all(function: Any, mask: Tensor, rest: Sequence[Any]) -> bool:
    """Whether an operation gives the same mask again."""
    aten = torch.ops.aten
    if function in (aten.detach.default, aten.alias.default):
        return True
    if function is aten.slice.Tensor:
        dim, start, end, step = [*rest, *(0, None, None, 1)[len(rest) :]]
        return not start and (end is None or end >= mask.shape[dim]) and step == 1
    return function is aten.expand.default and tuple(rest[0]) == tuple(mask.shape)


def _in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Computes `scaled_dot_product_attention` pair by pair.

    Args:
        query, key, value: (rows, heads, length, size of a head).
        attn_mask: A `SharedMask` of such rows.
        dropout_p, is_causal, scale, enable_gqa: torch's.

    Returns:
        (rows, heads, length, size of a value); padding gets zeros. None where it is not asked of whole rows.
    """
    rows, _, _, length = getattr(attn_mask, "shape", (0, 0, 0, 0))
    whole = all(each.dim() == 4 and each.shape[0] == rows and each.shape[2] == length for each in (query, key, value))
    if not isinstance(attn_mask, SharedMask) or is_causal or not whole:
        return None
    if torch.is_autocast_enabled(query.device.type):  # here, so that the mask of a part has the type of what it masks
        kind = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    settings: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    found = []
    for spans, *row in zip(attn_mask.spans, query.split(1), key.split(1), value.split(1), strict=True):
        cuts = [size for span in spans for size in (span.prompt + span.chosen, span.rejected)]
        cuts.append(length - sum(cuts))
        # one operation cuts a row, whose backward pass puts the gradients together once
        queries, keys, values = (each.split(cuts, dim=2) for each in row)
        parts = []
        for place, span in enumerate(spans):
            first, second = 2 * place, 2 * place + 1
            parts.append(
                F.scaled_dot_product_attention(queries[first], keys[first], values[first], is_causal=True, **settings)
            )
            if span.rejected:
                prompt = (keys[first][:, :, : span.prompt], values[first][:, :, : span.prompt])
                parts.append(_after_prompt(queries[second], prompt, (keys[second], values[second]), settings))
        parts.append(queries[-1].new_zeros(*queries[-1].shape[:3], value.shape[-1]))
        # tokens before heads, as the kernels give it: models want it so
        found.append(torch.cat([part.transpose(1, 2) for part in parts], dim=1))
    return torch.cat(found).transpose(1, 2) if len(found) > 1 else found[0].transpose(1, 2)


def _after_prompt(
    query: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], settings: dict[str, Any]
) -> Tensor:
    """Returns the attention of an answer that attends to its prompt, and causally to itself.

    Args:
        query: (1, heads, answer, size of a head).
        prompt: Its keys and values, (1, heads, prompt, size).
        own: The answer's.
        settings: Of `scaled_dot_product_attention`.
    """
    answer, length = query.shape[2], query.shape[2] + prompt[0].shape[2]
    if _aligns_with_the_last_key(query.device):
        key, value = (torch.cat(both, dim=2) for both in zip(prompt, own, strict=True))
        triangle = causal_lower_right(answer, length)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=triangle, **settings)
    # With the answer's keys in reverse before the prompt's, query i sees key j where i + j is at least answer - 1: each row
    # of that mask is the one before it, moved by one, so that all of them lie in one vector
    key, value = (torch.cat([mine.flip(2), theirs], dim=2) for theirs, mine in zip(prompt, own, strict=True))
    line = query.new_zeros(answer + length - 1)
    line[: answer - 1] = -torch.inf
    mask = line.as_strided((1, 1, answer, length), (0, 0, 1, 1))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)


def _aligns_with_the_last_key(device: torch.device) -> bool:
    """Whether a device has kernels for a causal triangle that ends at the last key; a CPU's takes a mask for it."""
    return device.type != "cpu"
