"""The opponent's pass: its log-probs of both answers of every pair, forward only, in batches larger than training's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_spin.data.pairs import PairDataset
from axolotl_spin.ranks.gather import Gather, whole_weights
from axolotl_spin.training.layouts import PairCollator
from axolotl_spin.training.logprobs import completion_logps

LOG = get_logger(__name__)

# a batch has so many times the tokens of training's largest micro-batch: no activations are kept for a backward pass
_LARGER = 4


class Scorer:
    """Scores pairs with the policy, which at an iteration's start is the opponent.

    Args:
        accelerator: The trainer's.
        collator: Training's, in the layout that was settled on.
        micro_batch: Pairs in one rank's micro-batch of training: so many fit for certain.
        gather: The `spin.generation.gather_weights`.
        pulse: Called between forwards; may raise to stop.
    """

    def __init__(
        self, accelerator: Any, collator: PairCollator, micro_batch: int, gather: Gather, pulse: Callable[[], None]
    ):
        self.accelerator = accelerator
        self.collator = collator
        self.micro_batch = micro_batch
        self.gather = gather
        self.pulse = pulse

    @torch.no_grad()
    def logps(self, model: Any, pairs: PairDataset, advance: Callable[[int], Any] = lambda pairs: None) -> Tensor:
        """Returns the opponent's log-probs; every rank must call, and gets all of them.

        Args:
            model: The policy as the trainer wraps it, frozen.
            pairs: What is scored; each rank scores a part.
            advance: Called with the number of pairs that this rank has just scored.

        Returns:
            (pairs, 2) float64 on the CPU: of the human's and the opponent's answer, sums in nats.
        """
        accelerator, device = self.accelerator, self.accelerator.device
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
        scored = torch.zeros(len(pairs), dtype=torch.int32, device=device)
        policy = accelerator.unwrap_model(model)
        tokens = pairs.lengths("prompt_ids") + pairs.lengths("chosen_ids") + pairs.lengths("rejected_ids")

        def forward(rows: np.ndarray) -> Tensor:
            self.pulse()
            batch = self.collator([pairs[row] for row in rows])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            return completion_logps(policy, batch, self.collator.in_head).double().view(2, len(rows)).T

        with whole_weights(model, accelerator, self.gather) as coupled:
            budget = int(tokens.max()) * self.micro_batch * (1 if coupled else _LARGER)
            batches = cut_by_tokens(np.argsort(-tokens, kind="stable"), tokens, budget)
            memory = _MemoryBound(forward, tokens, budget)
            for turn in range(-(-len(batches) // accelerator.num_processes)):
                position = turn * accelerator.num_processes + accelerator.process_index
                if position < len(batches):
                    rows = batches[position]
                    # where the ranks' forwards are one, a rank that runs out of memory cannot try again by itself
                    index = torch.from_numpy(rows).to(device)
                    logps[index] = forward(rows) if coupled else memory.forward(rows)
                    scored[index] += 1
                    advance(len(rows))
                elif coupled:
                    forward(batches[-1])
        logps, scored = accelerator.reduce(logps, "sum"), accelerator.reduce(scored, "sum")
        wrong = torch.nonzero(scored != 1).flatten().tolist()
        assert not wrong, f"{len(wrong)} pairs were not scored exactly once, the first are {wrong[:5]}"
        return logps.cpu()


def cut_by_tokens(order: np.ndarray, tokens: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cuts rows into batches in which the longest row, as often as there are rows, stays within a budget of tokens.

    Args:
        order: Rows, longest first.
        tokens: Tokens of each row.
        budget: Most tokens in a batch; a row that exceeds it by itself is a batch of its own.
    """
    batches = []
    start = 0
    while start < len(order):
        count = max(1, budget // int(tokens[order[start]]))
        batches.append(order[start : start + count])
        start += count
    return batches


class _MemoryBound:
    """Makes forwards in as many parts as memory asks for; what did not fit once is not tried again."""

    def __init__(self, forward: Callable[[np.ndarray], Tensor], tokens: np.ndarray, budget: int):
        self._forward, self._tokens, self._budget = forward, tokens, budget

    def forward(self, rows: np.ndarray) -> Tensor:
        used = int(self._tokens[rows].sum())
        if used <= self._budget or len(rows) == 1:
            try:
                return self._forward(rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
            self._budget = used // 2
            torch.accelerator.empty_cache()  # only here: the exception held on to the forward's tensors
            LOG.warning(
                f"out of memory while scoring {used} tokens: going on with {self._budget} in a forward",
                main_process_only=False,
            )
        return torch.cat([self.forward(half) for half in np.array_split(rows, 2)])
