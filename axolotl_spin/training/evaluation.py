"""The NLL per token of held-out human answers: the sum over all tokens, whatever batch and rank they stand in.

The Trainer averages the means of its batches, each weighted by its rows. A batch of short answers then counts as much as
one of long answers, so the same model on the same rows gets another loss with another batch size or number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from axolotl_spin.data.turns import IGNORED


class TokenMean:
    """Adds up the losses of a pass over evaluation batches on one rank.

    Args:
        accelerator: The trainer's.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        # NLL in nats, and the tokens that it is of
        self._sums = torch.zeros(2, dtype=torch.float64)

    def once(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes the labels off rows that only fill the last batch, so that each row of the dataset counts once.

        Where the rows do not divide among ranks, accelerate repeats the first ones. `gather_for_metrics` cuts them off by
        the same numbers, but from one loss for each row, which the batch's mean is not.

        Args:
            batch: This rank's, with `labels` (rows, length).
        """
        state = self._accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch
        labels = batch["labels"].clone()
        labels[max(0, state.remainder - len(labels) * self._accelerator.process_index) :] = IGNORED
        return {**batch, "labels": labels}

    def add(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Adds a batch.

        Args:
            loss: Mean over the batch's labelled tokens, in nats.
            batch: With the `labels` that it was computed from.
        """
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        if tokens:  # the mean of none is no number
            self._sums += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)

    def result(self) -> float:
        """Returns the NLL per token over all ranks; every rank must call."""
        sums = self._sums
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums.to(self._accelerator.device), "sum")
        nll, tokens = sums.tolist()
        return nll / tokens if tokens else float("nan")


class TokenLoss(Trainer):
    """Evaluates plain SFT rows to their NLL per token, from which the host takes its perplexity.

    Belongs before the host's trainer in the bases, so that its metrics are corrected before they are logged.
    """

    _mean: TokenMean | None = None

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        """Runs the host's loop; see `transformers.Trainer`."""
        mean = self._mean = TokenMean(self.accelerator)
        try:
            found = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._mean = None
        metrics = found.metrics or {}
        if f"{metric_key_prefix}_loss" in metrics:
            metrics[f"{metric_key_prefix}_loss"] = mean.result()
        return found

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Notes a batch's loss and tokens; see `transformers.Trainer`."""
        mean = self._mean
        if mean is None or "labels" not in inputs:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = mean.once(inputs)
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if found[0] is not None:
            mean.add(found[0], inputs)
        return found

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Without a number the model gives its mean over the batch's tokens, instead of a share of all ranks' tokens."""
        return None if self._mean is not None else super()._get_num_items_in_batch(batch_samples, device)
