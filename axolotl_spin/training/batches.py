"""Which pairs a rank takes in each micro-batch: the same steps in every layout, each pair once an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.training.layouts import PairCollator


class StepBatches(Sampler[list[tuple[int, float]]]):
    """Which pairs a rank takes in each micro-batch of an epoch.

    A step takes the next `micro_batch * accumulation * ranks` pairs of the epoch's order, whatever the layout, so one
    process and several train on the same batches. The last step takes what is left; a rank without a pair in it gets
    one of weight 0, so that every rank runs the same forwards. Each pair has weight 1 once an epoch.

    Args:
        rows: Pairs in the epoch.
        micro_batch: Pairs in one rank's micro-batch.
        accumulation: Micro-batches in a step.
        ranks: Number of ranks.
        rank: This rank.
        seed: Seed of the shuffle.
        epoch: The run's epoch, mixed into the seed.
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
        accumulation: int,
        ranks: int,
        rank: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        lengths: np.ndarray | None = None,
    ):
        self.lengths = lengths
        self.rows, self.ranks, self.rank = rows, ranks, rank
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        self.wide = micro_batch * ranks  # pairs of all ranks in one micro-batch
        self.step = self.wide * accumulation

    def __len__(self) -> int:
        whole, rest = divmod(self.rows, self.step)
        return whole * (self.step // self.wide) + math.ceil(rest / self.wide)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
        order = shuffled.numpy()
        for start in range(0, self.rows, self.step):
            step = order[start : start + self.step]
            if self.lengths is not None:
                step = step[np.argsort(-self.lengths[step], kind="stable")]
            for at in range(0, len(step), self.wide):
                wide = step[at : at + self.wide].tolist()
                mine = wide[self.rank :: self.ranks]
                yield [(index, 1.0) for index in mine] or [(wide[0], 0.0)]


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
    pairs: Any, collator: PairCollator, arguments: Any, *, ranks: int, rank: int, **order: Any
) -> DataLoader:
    """Returns a loader of one rank's micro-batches of an epoch.

    Args:
        pairs: A `PairDataset`; or a range of as many rows, where the loader is asked for its length alone.
        collator: In the layout that was settled on.
        arguments: The trainer's (`transformers.TrainingArguments`): batch sizes, workers, pinning.
        ranks: Number of ranks.
        rank: This rank.
        order: `seed`, `epoch` and `shuffle` of `StepBatches`.
    """
    padded = collator.layout == "padded" and isinstance(pairs, PairDataset)
    batches = StepBatches(
        len(pairs),
        micro_batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        ranks=ranks,
        rank=rank,
        lengths=pairs.padded_lengths() if padded else None,
        **order,
    )
    workers = arguments.dataloader_num_workers
    return DataLoader(
        WeightedRows(pairs),
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        pin_memory=arguments.dataloader_pin_memory and torch.accelerator.is_available(),
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from training's random state
    )
