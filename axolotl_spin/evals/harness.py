"""lm-eval on a model: its tasks, requests and metrics are lm-eval's, and so is how a model is asked.

The policy in training is asked in memory, by all ranks together: rank 0 runs lm-eval, and for each kind of request the
others are given the same list. It is cut into batches that do not depend on the number of ranks, of which each rank takes
its share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from axolotl_spin.evals.tasks import Benchmarks
from axolotl_spin.evals.unmoved import quiet, unmoved
from axolotl_spin.generation.transformers import generating, without
from axolotl_spin.ranks.bare import bare
from axolotl_spin.ranks.gather import Gather, whole_weights
from axolotl_spin.ranks.main import Ranks
from axolotl_spin.training.policy import frozen

# of answers that a task has sampled
_SEED = 1234


def refuse_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that lm-eval's models do not take.

    Args:
        tokenizer: The host's.

    Raises:
        ValueError: Names the keys.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`spin.eval_tasks`: lm-eval takes no {type(tokenizer).__name__} (`tokenizer_use_mistral_common`): use the "
            "model's other tokenizer, or remove `spin.eval_tasks`"
        )


def ask_policy(
    model: Any,
    tokenizer: Any,
    benchmarks: Benchmarks,
    ranks: Ranks,
    *,
    answers: int,
    sequences: int,
    gather: Gather,
    name: str,
) -> dict[str, Any] | None:
    """Runs benchmarks on the policy in training, which does not notice. Every rank must call.

    Args:
        model: The policy as the trainer wraps it.
        tokenizer: The host's.
        benchmarks: Loaded on rank 0.
        ranks: All of them.
        answers: That one rank writes at once.
        sequences: That one rank scores at once: their logits are held whole.
        gather: The `spin.generation.gather_weights`.
        name: Whose benchmarks they are, for the bar.

    Returns:
        What `lm_eval.evaluate` returns; None on other ranks than 0.
    """
    policy = bare(model, ranks.accelerator)
    with (
        unmoved(ranks.device),
        ranks.bar(f"{name}: benchmarks", 0, "request") as bar,
        frozen(model),
        torch.no_grad(),
        whole_weights(model, ranks.accelerator, gather) as coupled,
        without(policy, "generate"),
        quiet(),
    ):
        asked = _Asked(policy, ranks, coupled, pad_token_id=tokenizer.pad_token_id or 0)
        lm = PolicyLM(asked, copy.deepcopy(tokenizer), answers=answers, sequences=sequences, bar=bar)
        found = None
        if ranks.main:
            found = benchmarks.run(lm)
            ranks.on_main(lambda: None)  # there is nothing more to answer
        else:
            while job := ranks.on_main(lambda: None):
                lm.answer(*job)
    if ranks.device.type != "cpu":
        torch.accelerator.empty_cache()
    return found


class _Asked:
    """The policy as `HFLM` calls a model. No `torch.nn.Module`, so that it is neither tied anew nor put into another mode.

    Where the ranks' forwards are one (`coupled`), a rank that has none left makes empty ones until all are through.
    """

    def __init__(self, policy: Any, ranks: Ranks, coupled: bool, pad_token_id: int):
        self.policy, self.ranks, self.coupled, self.pad_token_id = policy, ranks, coupled, pad_token_id
        self.device, self.config = ranks.device, policy.config
        self.name_or_path = str(getattr(policy.config, "name_or_path", ""))

    def __call__(self, input_ids: torch.Tensor) -> Any:
        self._before_forward()
        return self.policy(input_ids=input_ids, use_cache=False)

    def generate(self, **arguments: Any) -> torch.Tensor:
        # its forwards are calls of the base model, which a forward of the policy need not be: PEFT 0.20 passes the base's
        # hooks by. Ahead of what gathers shards: ranks that have ended ask first, too
        hook = generating(self.policy).register_forward_pre_hook(lambda *_: self._before_forward(), prepend=True)
        try:
            # under ZeRO-3 it would ask all ranks before each token whether one goes on; the hook does where they are one
            return self.policy.generate(**arguments, synced_gpus=False)
        finally:
            hook.remove()

    def go_along(self, kind: str) -> None:
        """Makes the forwards that ranks which are not through need of this one, which is.

        Args:
            kind: Of the requests.
        """
        called = generating(self.policy) if kind == "generate_until" else self.policy
        while self.coupled and self._any_goes_on(False):
            called(input_ids=torch.full((1, 1), self.pad_token_id, device=self.device))

    def _before_forward(self) -> None:
        self.ranks.check()
        if self.coupled:
            self._any_goes_on(True)

    def _any_goes_on(self, this: bool) -> bool:
        return bool(self.ranks.sum(torch.tensor([float(this)], device=self.device)).item())


class PolicyLM(HFLM):
    """lm-eval's model over the policy: on rank 0 lm-eval asks it, and all ranks answer.

    Args:
        asked: The policy.
        tokenizer: A copy, since a missing pad token is set and sides of padding are changed.
        answers, sequences: See `ask_policy`.
        bar: Shows what this rank has answered.
    """

    turns = 0  # of all that this launch has asked

    def __init__(self, asked: _Asked, tokenizer: Any, *, answers: int, sequences: int, bar: tqdm):
        super().__init__(pretrained=asked, tokenizer=tokenizer, batch_size=max(answers, sequences))  # type: ignore[arg-type]
        self.asked, self.bar = asked, bar
        self.sizes = {"generate_until": answers, "loglikelihood": sequences, "loglikelihood_rolling": sequences}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._all_answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._all_answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._all_answer("generate_until", requests)

    def _all_answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Hands requests to every rank, and returns what all have answered, in order. Call it on rank 0."""
        job = kind, [request.args for request in requests]
        self.asked.ranks.on_main(lambda: job)
        return self.answer(*job)

    def answer(self, kind: str, arguments: Sequence[tuple]) -> list[Any]:
        """Answers this rank's share of requests, and returns every rank's.

        Args:
            kind: The method of lm-eval's that they are made for.
            arguments: Of each request.
        """
        ranks, found = self.asked.ranks, list[tuple[int, Any]]()
        batches = cut_into_batches(arguments, self.sizes[kind])
        mine = range(ranks.rank, len(batches), ranks.count)
        self.bar.total = (self.bar.total or 0) + sum(len(batches[index]) for index in mine)
        self.batch_size_per_gpu = self.sizes[kind]  # so many windows of a long text are scored at once, too
        for index in mine:
            torch.manual_seed(_SEED + index)  # for tasks that sample
            batch = [Instance(kind, {}, arguments[place], place) for place in batches[index]]  # type: ignore[arg-type]
            found += zip(batches[index], self._halved(kind, batch), strict=True)
            self.bar.update(len(batch))
        self.asked.go_along(kind)
        PolicyLM.turns += 1
        ranks.meet(f"benchmarks/{PolicyLM.turns}")  # ranks may be far apart, farther than a collective waits
        answers = dict(gather_object(found))
        assert len(answers) == len(arguments), f"{len(answers)} of {len(arguments)} requests were answered"
        return [answers[place] for place in range(len(arguments))]

    def _halved(self, kind: str, batch: list[Instance]) -> list[Any]:
        """Answers a batch; where memory does not suffice, in halves: of its requests, then of one long text's windows."""
        windows = self.batch_size_per_gpu if kind == "loglikelihood_rolling" else 1
        try:
            return getattr(super(), kind)(batch, disable_tqdm=True)
        except torch.OutOfMemoryError:
            # where the ranks' forwards are one, a rank cannot start again by itself
            if self.asked.coupled or max(len(batch), windows) == 1:
                raise
        torch.accelerator.empty_cache()
        if len(batch) == 1:
            self.batch_size_per_gpu = windows // 2
            return self._halved(kind, batch)
        middle = len(batch) // 2
        return self._halved(kind, batch[:middle]) + self._halved(kind, batch[middle:])


def cut_into_batches(arguments: Sequence[tuple], size: int) -> list[list[int]]:
    """Returns the places of requests that are answered together: alike ones, the longest first.

    Args:
        arguments: Of each request: a text, and a continuation or how to generate.
        size: Of a batch.
    """

    def key(place: int) -> tuple:
        text, *rest = arguments[place]
        how = str(rest[0]) if rest and isinstance(rest[0], dict) else ""
        return how, -len(text), text, place

    order = sorted(range(len(arguments)), key=key)
    return [order[start : start + size] for start in range(0, len(order), size)]
