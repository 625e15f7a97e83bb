"""A test-only plugin that plants a defect into the algorithm, named by SPIN_DEFECT, to see the tests catch it."""

import copy
import functools
import os
from dataclasses import replace

from axolotl.integrations.base import BasePlugin
from torch.nn.functional import logsigmoid


class DefectPlugin(BasePlugin):
    """Plants the defect when the trainer class is asked for, as late as our own modules are imported."""

    def get_input_args(self):
        defect = os.environ.get("SPIN_DEFECT")
        if defect:
            _plant(defect)
        return None


@functools.cache  # the host asks for input arguments more than once: a swap planted twice would be none
def _plant(defect: str) -> None:
    from axolotl_spin.game import loop
    from axolotl_spin.game.self_play import SelfPlay
    from axolotl_spin.generation.transformers import TransformersBackend
    from axolotl_spin.training import step
    from axolotl_spin.training.batches import WeightedRows

    start = {}
    score, answer, row = SelfPlay._score, TransformersBackend.answer, WeightedRows.__getitem__
    loss = step.spin_loss

    def frozen_opponent(self, entry, model, pairs):
        start.setdefault("model", copy.deepcopy(model))
        return score(self, entry, start["model"], pairs)

    def stale_generations(self, model, chunks, keep, iteration=0):
        start.setdefault("model", copy.deepcopy(model))
        return answer(self, start["model"], chunks, keep)

    def swapped_answers(self, key):
        pair = row(self, key)
        swaps = {"chosen_ids": "rejected_ids", "opponent_chosen_logp": "opponent_rejected_logp"}
        swaps |= {there: here for here, there in swaps.items()}
        return {name: pair[swaps.get(name, name)] for name in pair}

    def signs_swapped(chosen, rejected, opponent_chosen, opponent_rejected, **settings):
        found = loss(rejected, chosen, opponent_rejected, opponent_chosen, **settings)
        return found._replace(chosen_rewards=found.rejected_rewards, rejected_rewards=found.chosen_rewards)

    def term_left_out(side, *logps, beta, **settings):
        found, sign = loss(*logps, beta=beta, **settings), (1, -1)[side]
        return found._replace(losses=found.losses + logsigmoid(sign * beta * (logps[side] - logps[side + 2])))

    def dies_after_two_chunks(self, model, chunks, keep, iteration=0):
        kept = []

        def some(chunk, completions):
            if len(kept) == 2:
                raise RuntimeError("planted: out of memory")
            kept.append(chunk)
            keep(chunk, completions)

        return answer(self, model, chunks, some)

    if defect == "frozen_opponent":
        SelfPlay._score = frozen_opponent
        # the run sees it by itself, and would stop
        check = loop.check_step_zero
        loop.check_step_zero = lambda *args, **kwargs: [replace(found, fatal=False) for found in check(*args, **kwargs)]
    elif defect == "stale_generations":
        TransformersBackend.answer = stale_generations
    elif defect == "dies_after_two_chunks":
        TransformersBackend.answer = dies_after_two_chunks
    elif defect == "swapped_answers":
        WeightedRows.__getitem__ = swapped_answers
    elif defect == "signs_swapped":
        step.spin_loss = signs_swapped
    elif defect in ("human_term_left_out", "own_term_left_out"):
        step.spin_loss = functools.partial(term_left_out, int(defect == "own_term_left_out"))
    else:
        raise ValueError(defect)
