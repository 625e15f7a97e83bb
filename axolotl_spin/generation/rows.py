"""Answers being written, and their keys and values: in memory with room ahead, so that a token copies nothing.

    columns    0 ........ start ................ end ....... capacity
    row 0      what is left of who was here | its tokens | room
    row 1      ...               | its longer tokens     | room

All rows end in the same column. A row whose answer has ended is overwritten by a prompt that joins. Only where the room is
used up, or the number of rows changes, what is in use moves to new memory, with room for `ROOM` tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

# columns ahead of the last token: the cache is copied once in so many tokens, and is by so much larger than what is in it
ROOM = 64


class Reserved(DynamicLayer):
    """A layer's keys and values, each (rows, heads, capacity, head size); the columns from `start` to `end` are used.

    Args:
        layer: One of the library's, as a forward over prompts filled it.
    """

    keys: Any  # never None, which the library's may be
    values: Any

    def __init__(self, layer: Any):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.keys, self.values = layer.keys, layer.values
        self.start, self.end = 0, layer.keys.shape[-2]

    def get_seq_length(self) -> int:
        """Returns how many columns are used."""
        return self.end - self.start

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds a token to every row.

        Args:
            key_states: (rows, heads, 1, head size).
            value_states: The same; its head size may be another.

        Returns:
            Views of the used keys and values.
        """
        if self.end == self.keys.shape[-2]:
            self.move(None, self.end - self.start)
        self.keys[:, :, self.end] = key_states[:, :, 0]
        self.values[:, :, self.end] = value_states[:, :, 0]
        self.end += 1
        used = slice(self.start, self.end)
        return self.keys[:, :, used], self.values[:, :, used]

    def move(self, index: Tensor | None, width: int, more: int = 0, end: int = 0) -> None:
        """Takes new memory.

        Args:
            index: The rows that are kept, in their new order; None for all as they are.
            width: How many of the last columns are kept.
            more: Rows that are added behind them.
            end: The least column in which the rows are to end.
        """
        end = max(end, width)
        for name in ("keys", "values"):
            used = getattr(self, name)[:, :, self.end - width : self.end]
            used = used if index is None else used[index]
            rows, heads, _, size = used.shape
            # zeros: what is masked has no weight, but a number it must be
            moved = used.new_zeros(rows + more, heads, end + ROOM, size)
            moved[:rows, :, end - width : end] = used
            setattr(self, name, moved)
        self.start, self.end = end - width, end

    def put(self, index: Tensor, layer: Any) -> None:
        """Overwrites rows by others, which end where all do.

        Args:
            index: The rows.
            layer: One of the library's, with as many rows, of at most `end` columns.
        """
        start = self.end - layer.keys.shape[-2]
        self.keys[index, :, start : self.end] = layer.keys
        self.values[index, :, start : self.end] = layer.values


class Rows:
    """The answers being written.

    Args:
        places: Their positions in the chunk.
        cache: The library's `DynamicCache`, with the prompts.
        lengths: Tokens in the cache that are a row's own; its last.
        tokens: (rows,) each row's last token, not in the cache yet.
    """

    def __init__(self, places: list[int], cache: Any, lengths: list[int], tokens: Tensor):
        self.places, self.cache, self.lengths, self.tokens = places, cache, lengths, tokens

    def _layers(self) -> list[tuple[int, Any]]:
        """Returns the layers that hold anything, with their positions: some models share others' keys and values."""
        return [(position, layer) for position, layer in enumerate(self.cache.layers) if layer.is_initialized]

    def step(self, staying: Sequence[int]) -> list[int]:
        """Makes ready for a token more in each row; those that do not stay are carried along as rows of one token.

        Returns:
            Tokens of each row, the one that comes included.
        """
        stays = set(staying)
        self.lengths = [length + 1 if row in stays else 1 for row, length in enumerate(self.lengths)]
        width = max(self.lengths) - 1
        for position, layer in self._layers():
            if not isinstance(layer, Reserved):
                layer = self.cache.layers[position] = Reserved(layer)
            layer.start = layer.end - width
        return self.lengths

    def leave(self, staying: list[int]) -> None:
        """Keeps some rows, and of the cache only what they use."""
        self._choose(staying, 0, 0)

    def join(self, staying: list[int], other: Rows) -> None:
        """Adds rows, in place of those that do not stay."""
        width = max(other.lengths)
        ends = [layer.end for _, layer in self._layers() if isinstance(layer, Reserved)]
        if len(staying) + len(other.places) == len(self.places) and ends and min(ends) >= width:
            gone = sorted(set(range(len(self.places))) - set(staying))
        else:
            self._choose(staying, len(other.places), width)
            gone = list(range(len(staying), len(self.places)))
        index = torch.tensor(gone, device=self.tokens.device)
        for (_, mine), (_, theirs) in zip(self._layers(), other._layers(), strict=True):
            mine.put(index, theirs)
        self.tokens[index] = other.tokens
        for row, place, length in zip(gone, other.places, other.lengths, strict=True):
            self.places[row], self.lengths[row] = place, length

    def _choose(self, staying: list[int], more: int, end: int) -> None:
        """Keeps some rows and adds empty ones, in new memory."""
        index = torch.tensor(staying, device=self.tokens.device)
        self.places = [self.places[row] for row in staying] + [-1] * more
        self.lengths = [self.lengths[row] for row in staying] + [0] * more
        self.tokens = torch.cat([self.tokens[index], self.tokens.new_zeros(more)])
        for position, layer in self._layers():
            if not isinstance(layer, Reserved):
                layer = self.cache.layers[position] = Reserved(layer)
            layer.move(index, max(self.lengths), more, end)
