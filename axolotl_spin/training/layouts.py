"""How pairs are laid out for the model's forward: side by side and padded, end to end, or with one prompt for two answers.

Whatever the layout, a batch says the same: which positions predict the answers' tokens, and what those tokens are. With
pairs A and B, each a prompt P, a human answer C and the opponent's answer R, and sequences always in the order
`[P_A C_A], [P_B C_B], [P_A R_A], [P_B R_B]`:

    padded    a row for each sequence, padded on the right
    packed    one row, sequences end to end: P_A C_A P_A R_A P_B C_B P_B R_B; positions restart at each prompt
    shared    pairs end to end in rows of similar length: P_A C_A R_A P_B C_B R_B; the positions of both answers go on from
              their prompt's, and a token sees those before it that are prompt or of its own answer
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Layout = Literal["padded", "packed", "shared"]

# begins the names of what a batch has for the model's forward as it is: what a processor made of pictures
GIVEN = "given/"

# a token's attention over a row of this many times the hidden size costs as much as the rest of the layer does for it: with
# linear layers of 12 * hidden^2 weights, 2 * 12 * hidden^2 against 4 * row * hidden operations
_EVEN_COST = 6
# bytes of a shared batch's mask, and of it for each pair, above which attention is computed pair by pair instead. On a CPU
# that takes less time from there on (1,024 tokens in a row, 4 layers of 256: 0.6 of it with eight pairs, 0.75 with one)
_MASK, _MASK_OF_PAIR = 2**20, 2**17


class PairCollator:
    """Makes batches of pairs.

    For one pair P=[5, 6], C=[7, 2], R=[8] and padding 0:

        layout        padded                        packed                  shared
        input_ids     [[5, 6, 7, 2], [5, 6, 8, 0]]  [[5, 6, 7, 2, 5, 6, 8]] [[5, 6, 7, 2, 8]]
        position_ids  -                             [[0, 1, 2, 3, 0, 1, 2]] [[0, 1, 2, 3, 2]]
        columns       [1, 2]                        [1, 2, 5]               [1, 2, 1]
        targets       [7, 2, 8]                     [7, 2, 8]               [7, 2, 8]

    Args:
        pad_token_id: Fills the padding; its value does not matter.
        layout: See the module.
        hidden_size: The model's, from which the length of shared rows follows: short ones for a small model, whose
            attention costs more than the padding that they need.

    Attributes:
        in_head: Whether log-probs can be taken where the LM head gives its logits; see `completion_logps`.
        in_parts: Whether attention may be computed pair by pair; where not, long rows have masks as short ones do. "always"
            asks it of short ones too.
        multiple: What the tokens of a batch are to be a multiple of, padding counted; see `token_multiple`.
    """

    def __init__(self, pad_token_id: int, layout: Layout = "padded", hidden_size: int = 1024):
        self.pad_token_id = pad_token_id
        self.layout = layout
        self.hidden_size = hidden_size
        self.in_head = False
        self.in_parts: bool | Literal["always"] = True
        self.multiple = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collates rows of `PairDataset`.

        Returns:
            `input_ids` (rows, length) and what else the forward takes: `attention_mask` (rows, length) where padded,
            `position_ids` (rows, length) where not, `segments` (rows, length) where a mask is to be made of them, and
            `spans` (pairs, 4) where attention is to be computed without: each pair's row and its tokens there, in order;
            `columns` (k,), the positions whose logits are needed, `picks` (answer tokens,), which of the (rows * k) logits
            predicts each token, and `targets` (answer tokens,), all in the order of the sequences; `completion_lengths`
            (2 * pairs,); and, where the rows have them, `opponent_logps` (2 * pairs,) float64 in nats and `weight`
            (pairs,), 0 for a pair that only fills a rank's batch; and, where prompts have pictures, what the forward takes
            for them, under names that begin with `GIVEN`.
        """
        batch = {"padded": self._padded, "packed": self._packed, "shared": self._shared}[self.layout](rows)
        answers = [np.asarray(row[kind]) for kind in ("chosen_ids", "rejected_ids") for row in rows]
        batch["targets"] = torch.from_numpy(np.concatenate(answers).astype(np.int64))
        batch["completion_lengths"] = torch.tensor([len(answer) for answer in answers])
        if "opponent_chosen_logp" in rows[0]:
            logps = [row[f"opponent_{kind}_logp"] for kind in ("chosen", "rejected") for row in rows]
            batch["opponent_logps"] = torch.tensor(logps, dtype=torch.float64)
            batch["weight"] = torch.tensor([float(row.get("weight", 1.0)) for row in rows])
        if rows[0].get("images") is not None:
            batch.update(_of_pictures(rows, _prompts_in(batch, len(rows)), batch["input_ids"].shape))
        return batch

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [(row["prompt_ids"], row[answer]) for answer in ("chosen_ids", "rejected_ids") for row in rows]
        width = self._rounded(max(len(prompt) + len(completion) for prompt, completion in sequences))
        ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        attention = np.zeros_like(ids)
        predicts = []
        for index, (prompt, completion) in enumerate(sequences):
            start, end = len(prompt), len(prompt) + len(completion)
            ids[index, :start], ids[index, start:end] = prompt, completion
            attention[index, :end] = 1
            predicts.append((np.full(len(completion), index), np.arange(start - 1, end - 1)))
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attention)}
        return {**batch, **_needed(predicts)}

    def _packed(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids, positions = [], []
        predicts: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        start = 0
        for index, row in enumerate(rows):
            for kind, answer in enumerate((row["chosen_ids"], row["rejected_ids"])):
                prompt, length = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(answer)
                ids += [np.asarray(row["prompt_ids"]), np.asarray(answer)]
                positions.append(np.arange(length))
                columns = np.arange(start + prompt - 1, start + length - 1)
                predicts[kind, index] = (np.zeros_like(columns), columns)
                start += length
        if spare := self._rounded(start) - start:  # a sequence more, which nothing is asked of
            ids.append(np.full(spare, self.pad_token_id))
            positions.append(np.arange(spare))
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        }
        return {**batch, **_needed([predicts[key] for key in sorted(predicts)])}

    def _shared(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [sum(len(row[part]) for part in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]
        bins = _cheapest_rows(lengths, self.hidden_size)
        width = self._rounded(max(sum(lengths[index] for index in members) for members in bins))
        ids = np.full((len(bins), width), self.pad_token_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        segments = np.full_like(ids, -1)
        predicts: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        for place, members in enumerate(bins):
            start = 0
            for index in members:
                row = rows[index]
                prompt = len(row["prompt_ids"])
                ids[place, start : start + prompt] = row["prompt_ids"]
                positions[place, start : start + prompt] = np.arange(prompt)
                segments[place, start : start + prompt] = 3 * index
                at = start + prompt
                for kind, answer in enumerate((row["chosen_ids"], row["rejected_ids"])):
                    end = at + len(answer)
                    ids[place, at:end] = answer
                    positions[place, at:end] = np.arange(prompt, prompt + len(answer))
                    segments[place, at:end] = 3 * index + 1 + kind
                    # the prompt's last token predicts the first of both answers
                    columns = np.concatenate([[start + prompt - 1], np.arange(at, end - 1)])[: len(answer)]
                    predicts[kind, index] = (np.full_like(columns, place), columns)
                    at = end
                start = at
        batch = {"input_ids": ids, "position_ids": positions, "segments": segments}
        made = {name: torch.from_numpy(values) for name, values in batch.items()}
        if self.in_parts == "always" or (self.in_parts and masks_in_parts(len(bins) * width**2, len(rows))):
            parts = ("prompt_ids", "chosen_ids", "rejected_ids")
            spans = [
                [place, *(len(rows[index][part]) for part in parts)]
                for place, members in enumerate(bins)
                for index in members
            ]
            made["spans"] = torch.tensor(spans)
        return {**made, **_needed([predicts[key] for key in sorted(predicts)])}

    def _rounded(self, tokens: int) -> int:
        return -(-tokens // self.multiple) * self.multiple


def token_multiple(mixed_precision: str) -> int:
    """Returns what the tokens of a forward have to be a multiple of.

    In fp8 a weight's gradient is a product over tokens, and its kernels (`torch._scaled_mm`) take multiples of 16 alone.

    Args:
        mixed_precision: Accelerate's.
    """
    return 16 if mixed_precision == "fp8" else 1


def _prompts_in(batch: dict[str, Tensor], pairs: int) -> list[tuple[int, int, int]]:
    """Returns the prompts of a batch in the order of its tokens: the pair, the row and the first column of each."""
    if "segments" not in batch:
        return [(row % pairs, row, 0) for row in range(2 * pairs)]
    starts = [(batch["segments"] == 3 * index).nonzero()[0].tolist() for index in range(pairs)]
    return sorted(((index, row, column) for index, (row, column) in enumerate(starts)), key=lambda prompt: prompt[1:])


def _of_pictures(
    rows: Sequence[dict[str, Any]], prompts: Sequence[tuple[int, int, int]], shape: Sequence[int]
) -> dict[str, Tensor]:
    """Returns what the forward takes for the pictures of a batch.

    Args:
        rows: Of `PairDataset`.
        prompts: As they stand in the batch; see `_prompts_in`.
        shape: Of the batch: (rows, length).
    """
    once = [
        rows[pair] for pair, _, _ in prompts[: len(rows)]
    ]  # each prompt stands there once, or each once more behind
    found = rows[0]["images"].inputs([row["row"] for row in once], [row["prompt_ids"] for row in once])
    copies = len(prompts) // len(rows)
    given = {name: torch.cat([values] * copies) for name, values in found.of_images.items()}
    for name, parts in found.of_tokens.items():
        whole = parts[0].new_zeros(*shape)
        for part, (_, row, column) in zip(parts * copies, prompts, strict=True):
            whole[row, column : column + len(part)] = part
        given[name] = whole
    return {f"{GIVEN}{name}": values for name, values in given.items()}


def shared_mask_size(lengths: Sequence[int], hidden_size: int) -> int:
    """Returns the bytes of the mask that a batch in the shared layout would have.

    Args:
        lengths: Tokens in each pair, its prompt counted once.
        hidden_size: The model's.
    """
    rows = _cheapest_rows(lengths, hidden_size)
    return len(rows) * max(sum(lengths[index] for index in row) for row in rows) ** 2


def masks_in_parts(mask: int, pairs: int) -> bool:
    """Whether a shared batch's attention is computed pair by pair: where its mask would be large, and so are the pairs.

    The same batch gives the same answer, so that policy and opponent are rounded alike.

    Args:
        mask: Its bytes.
        pairs: In the batch.
    """
    return mask > max(_MASK, _MASK_OF_PAIR * pairs)


def _cheapest_rows(lengths: Sequence[int], hidden_size: int) -> list[list[int]]:
    """Puts pairs into rows that cost the least to compute, padding and attention counted; no pair is split.

    Args:
        lengths: Tokens in each pair.
        hidden_size: The model's.

    Returns:
        The pairs in each row, as their places in `lengths`.
    """
    tried: list[tuple[float, list[list[int]]]] = []
    best = float("inf")
    for count in range(1, len(lengths) + 1):
        if count * max(lengths) > best:
            break  # from here on more rows are only more padding
        rows = _balanced_rows(lengths, count)
        width = max(sum(lengths[index] for index in row) for row in rows)
        cost = count * width * (1 + width / (_EVEN_COST * hidden_size))
        best = min(best, cost)
        tried.append((cost, rows))
    return next(
        rows for cost, rows in tried if cost <= 1.02 * best
    )  # the longest rows among those that cost about the same


def _balanced_rows(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Puts pairs into so many rows of similar length: the longest first, each into the row that is the shortest so far."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, place) for place in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, place = heapq.heappop(filled)
        rows[place].append(index)
        heapq.heappush(filled, (tokens + lengths[index], place))
    return [sorted(row) for row in rows]


def _needed(predicts: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    """Returns `columns` and `picks` for the (row, column) of every predicting position, in order.

    With a single row each position is asked for by itself, so that the logits come in order and need no copy.
    """
    rows = np.concatenate([row for row, _ in predicts])
    columns = np.concatenate([column for _, column in predicts])
    if not rows.any():
        return {"columns": torch.from_numpy(columns), "picks": torch.arange(len(columns))}
    wanted, place = np.unique(columns, return_inverse=True)
    return {"columns": torch.from_numpy(wanted), "picks": torch.from_numpy(rows * len(wanted) + place)}
