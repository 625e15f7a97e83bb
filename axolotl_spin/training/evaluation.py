"""The NLL per token of held-out human answers: the sum over all tokens, whatever batch and rank they stand in.

The Trainer averages the means of its batches, each weighted by its rows. A batch of short answers then counts as much as
one of long answers, so the same model on the same rows gets another loss with another batch size or number of ranks.
Each row's own sum is kept beside it, from which the standard error follows (`data/spread.py`).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from axolotl_spin.data.spread import nll_per_token
from axolotl_spin.data.turns import IGNORED
from axolotl_spin.training.logprobs import selected_logps


class TokenMean:
    """Adds up the losses of a pass over evaluation batches on one rank.

    Args:
        accelerator: The trainer's.
    """

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        # NLL in nats, and the tokens that it is of
        self._sums = torch.zeros(2, dtype=torch.float64)
        # what tells a row from others, its NLL (on the model's device), its tokens
        self._rows: list[tuple[int, Tensor, int]] = []
        self._seen = False  # whether the batch's rows are in

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
        seen, self._seen = self._seen, False
        if not tokens:  # the mean of none is no number
            return
        nll = torch.tensor(loss.item() * tokens, dtype=torch.float64)
        self._sums += torch.stack([nll, torch.tensor(tokens, dtype=torch.float64)])
        if not seen:  # without logits a batch is known as a whole
            self._rows.append((_digest(*_contents(batch)), nll, tokens))

    def see(self, logits: Any, batch: dict[str, Any]) -> None:
        """Takes each row's NLL from what the forward of a batch gave; without logits, from `add`.

        Args:
            logits: (rows, length, vocabulary), or None where a fused loss makes none.
            batch: With `labels` (rows, length) and `input_ids`.
        """
        labels = batch["labels"]
        if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
            return
        self._seen = True
        for row, content in enumerate(_contents(batch)):
            at = labels[row, 1:] != IGNORED
            targets = labels[row, 1:][at]
            if len(targets):  # others fill up the last batch
                nll = -selected_logps(logits[row, :-1][at], targets).double().sum()
                self._rows.append((_digest(content), nll.detach(), len(targets)))

    def rows(self) -> dict[str, np.ndarray]:
        """Returns `key`, `nll` (nats) and `tokens` of the rows of all ranks; every rank must call."""
        nll = torch.stack([row[1].cpu() for row in self._rows]).tolist() if self._rows else []
        mine = [(key, value, tokens) for (key, _, tokens), value in zip(self._rows, nll, strict=True)]
        columns = tuple(zip(*gather_object(mine), strict=True)) or ((), (), ())
        kinds = {"key": np.int64, "nll": np.float64, "tokens": np.int64}
        return {name: np.array(values, kind) for (name, kind), values in zip(kinds.items(), columns, strict=True)}

    def result(self) -> float:
        """Returns the NLL per token over all ranks; every rank must call."""
        sums = self._sums
        if self._accelerator.num_processes > 1:
            sums = self._accelerator.reduce(sums.to(self._accelerator.device), "sum")
        nll, tokens = sums.tolist()
        return nll / tokens if tokens else float("nan")


def _contents(batch: dict[str, Any]) -> list[bytes]:
    """Returns each row's ids and labels without what pads them, so that a row is known in any batch and on any rank."""
    kept = batch.get("attention_mask")
    kept = torch.ones_like(batch["labels"]) if kept is None or kept.shape != batch["labels"].shape else kept
    parts = [part.cpu().numpy().astype(np.int64) for part in (batch["input_ids"], batch["labels"])]
    return [
        np.stack([part[row] for part in parts])[:, kept[row].cpu().numpy() != 0].tobytes() for row in range(len(kept))
    ]


def _digest(*contents: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return int.from_bytes(digest.digest(), "little", signed=True)


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
            loss, rows = mean.result(), mean.rows()
            metrics[f"{metric_key_prefix}_loss"] = loss
            stderr = nll_per_token(rows["nll"], rows["tokens"], rows["key"]).stderr if len(rows["key"]) else None
            if stderr is not None:
                metrics[f"{metric_key_prefix}_loss_stderr"] = stderr
            if metric_key_prefix == "eval":
                self.evaluated(loss, stderr, rows)
        return found

    def evaluated(self, loss: float, stderr: float | None, rows: dict[str, np.ndarray]) -> None:
        """Learns what an evaluation gave; for subclasses.

        Args:
            loss: NLL per token.
            stderr: Its standard error; None where a single row leaves none.
            rows: See `TokenMean.rows`.
        """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Notes what an evaluation's forward says of each row; see `transformers.Trainer`."""
        mean = self._mean
        if mean is None or not return_outputs or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # the host may take the labels out
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        mean.see(outputs.get("logits") if isinstance(outputs, dict) else None, batch)
        return loss, outputs

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
