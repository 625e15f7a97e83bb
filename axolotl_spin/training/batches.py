"""Which pairs stand together in a micro-batch, and which micro-batches a rank takes: each pair once an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.training.layouts import PairCollator


class MicroBatches(Sequence[np.ndarray]):
    """An iteration's micro-batches, composed once: by seed and iteration alone, the same on any number of ranks.

    The opponent scores these very micro-batches and the policy is trained on them, since in half precision a pair's
    log-probs depend on the pairs beside it: by 0.5 to 0.9 nats, measured on answers of 100 tokens in bf16. Only the
    order of the steps changes from epoch to epoch.

    Rows are shuffled and cut into steps, and each step into micro-batches, so a step has the same pairs whatever the
    size of a micro-batch.

    Args:
        rows: Pairs in the iteration.
        micro_batch: Pairs in one rank's micro-batch.
        step: Pairs in an optimizer step, over all ranks; a multiple of `micro_batch`.
        seed: Seed of the shuffle.
        first_epoch: The run's epoch with which the iteration starts, mixed into the seed.
        shuffle: False keeps the order of the rows (the host's `curriculum_sampling`).
        lengths: (rows,) by which a step's pairs are sorted before micro-batches are cut, so that a padded micro-batch
            holds pairs of similar length. None leaves them mixed, which bounds the tokens of a micro-batch without
            padding. A step has the same pairs either way.
    """

    def __init__(
        self,
        rows: int,
        *,
        micro_batch: int,
        step: int,
        seed: int,
        first_epoch: int,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
    ):
        self.rows, self.step, self.micro_batch, self.seed, self.shuffle = rows, step, micro_batch, seed, shuffle
        self.first_epoch = first_epoch
        order = _permutation(rows, seed, first_epoch) if shuffle else np.arange(rows)
        if lengths is not None:
            parts = (order[start : start + step] for start in range(0, rows, step))
            parts = (part[np.argsort(-lengths[part], kind="stable")] for part in parts)
            order = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        self._order = order

    def __len__(self) -> int:
        return math.ceil(self.rows / self.micro_batch)  # those of a whole step are whole

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        """Returns the rows of a micro-batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._order[index * self.micro_batch : (index + 1) * self.micro_batch]

    def epoch(self, epoch: int) -> Iterator[range]:
        """Yields the micro-batches of each step, as their indices, in an epoch's order.

        Args:
            epoch: The run's. The iteration's first takes the steps as they were composed, the others shuffle them. The last
                step, which may be smaller, stays the last: the Trainer counts micro-batches.
        """
        whole, rest = divmod(self.rows, self.step)
        count = self.step // self.micro_batch
        again = self.shuffle and epoch != self.first_epoch
        order = _permutation(whole, self.seed, epoch) if again else np.arange(whole)
        for place in order.tolist():
            yield range(place * count, (place + 1) * count)
        if rest:
            yield range(whole * count, len(self))


def _permutation(count: int, seed: int, number: int) -> np.ndarray:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    return torch.randperm(count, generator=generator).numpy()


class StepBatches(Sampler[list[tuple[int, float]]]):
    """Which pairs a rank takes in each micro-batch of an epoch.

    The ranks take a step's micro-batches in turn. A rank without one in the last turn gets a pair of weight 0, so that
    every rank runs the same forwards. Each pair has weight 1 once an epoch.

    Args:
        batches: The iteration's micro-batches.
        ranks: Number of ranks.
        rank: This rank.
        epoch: The run's epoch.
    """

    def __init__(self, batches: MicroBatches, *, ranks: int, rank: int, epoch: int):
        self.batches, self.ranks, self.rank, self.epoch = batches, ranks, rank, epoch

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.ranks)  # a whole step's are shared out evenly

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for step in self.batches.epoch(self.epoch):
            for turn in range(0, len(step), self.ranks):
                together = step[turn : turn + self.ranks]
                if self.rank < len(together):
                    yield [(row, 1.0) for row in self.batches[together[self.rank]].tolist()]
                else:
                    yield [(int(self.batches[together[0]][0]), 0.0)]


class WeightedRows(Dataset):
    """Rows of a `PairDataset` addressed by `StepBatches`' (index, weight)."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, float]) -> dict[str, Any]:
        index, weight = key
        return {**self.pairs[index], "weight": weight}


def pair_loader(
    pairs: Any, batches: MicroBatches, collator: PairCollator, arguments: Any, *, ranks: int, rank: int, epoch: int
) -> DataLoader:
    """Returns a loader of one rank's micro-batches of an epoch.

    Args:
        pairs: A `PairDataset`; or a range of as many rows, where the loader is asked for its length alone.
        batches: The iteration's.
        collator: In the layout that was settled on.
        arguments: The trainer's (`transformers.TrainingArguments`): workers, pinning.
        ranks: Number of ranks.
        rank: This rank.
        epoch: The run's.
    """
    workers = arguments.dataloader_num_workers
    return DataLoader(
        WeightedRows(pairs),
        batch_sampler=StepBatches(batches, ranks=ranks, rank=rank, epoch=epoch),
        collate_fn=collator,
        num_workers=workers,
        prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        pin_memory=arguments.dataloader_pin_memory and torch.accelerator.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from training's random state
    )
