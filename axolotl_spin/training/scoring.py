"""The opponent's pass: its log-probs of both answers of every pair, forward only, in training's own micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.ranks.bare import as_trained
from axolotl_spin.ranks.gather import Gather, whole_weights
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps


class Scorer:
    """Scores pairs with the policy, which at an iteration's start is the opponent.

    Args:
        ranks: All of them; asked between forwards whether another has failed.
        collator: Training's, in the layout that was settled on.
        gather: The `spin.generation.gather_weights`.
    """

    def __init__(self, ranks: Ranks, collator: PairCollator, gather: Gather):
        self.ranks, self.collator, self.gather = ranks, collator, gather

    @torch.no_grad()
    def logps(
        self,
        model: Any,
        pairs: PairDataset,
        batches: Sequence[np.ndarray],
        advance: Callable[[int], Any] = lambda pairs: None,
    ) -> Tensor:
        """Returns the opponent's log-probs; every rank must call, and gets all of them.

        Args:
            model: The policy as the trainer wraps it, frozen.
            pairs: What is scored; each rank scores a part.
            batches: Rows that stand together in a forward, each row once: training's, so that policy and opponent are
                rounded alike (`MicroBatches`). What training holds with activations fits without.
            advance: Called with the number of pairs that this rank has just scored.

        Returns:
            (pairs, 2) float64 on the CPU: of the human's and the opponent's answer, sums in nats.
        """
        ranks, device = self.ranks, self.ranks.device
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
        scored = torch.zeros(len(pairs), dtype=torch.int32, device=device)
        policy = as_trained(model, ranks.accelerator)

        def forward(rows: np.ndarray) -> Tensor:
            ranks.check()
            batch = self.collator([pairs[row] for row in rows.tolist()])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            return completion_logps(policy, batch, self.collator.in_head).double().view(2, len(rows)).T

        with whole_weights(model, ranks.accelerator, self.gather) as coupled:
            for turn in range(-(-len(batches) // ranks.count)):
                position = turn * ranks.count + ranks.rank
                if position < len(batches):
                    rows = batches[position]
                    index = torch.from_numpy(rows).to(device)
                    logps[index] = forward(rows)
                    scored[index] += 1
                    advance(len(rows))
                elif coupled:
                    forward(batches[0])
        ranks.meet_again()  # ranks may be far apart, farther than a collective waits
        logps, scored = ranks.sum(logps), ranks.sum(scored)
        wrong = torch.nonzero(scored != 1).flatten().tolist()
        assert not wrong, f"{len(wrong)} pairs were not scored exactly once, the first are {wrong[:5]}"
        return logps.cpu()
