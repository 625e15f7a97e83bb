"""Numbers gone wrong: found where they first show, reported with figures, the likely cause and the key to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_spin.data.answers import flat, identical, monotone
from axolotl_spin.data.endings import last_ids
from axolotl_spin.data.pairs import BATCH_ROWS
from axolotl_spin.settings.generation import DEFAULT_MAX_NEW_TOKENS

LOG = get_logger(__name__)

_FEWEST = 16  # with fewer answers a share says nothing
_WARNED_SHARE = 0.95
# at an iteration's first step, of the loss and in nats per token: the same micro-batches by the same forward are off by 0
# in every precision. A fifth in perplexity is no rounding either
_OFF, _ANOTHER_MODEL = 1e-3, 0.2


class UnhealthyRunError(RuntimeError):
    """Going on is pointless; the message has the figures, the likely cause and the way out."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        text: Figures, likely cause, and what to do.
        fatal: Whether going on is pointless.
    """

    text: str
    fatal: bool


def act_on(findings: list[Finding], main: bool) -> None:
    """Logs warnings on one rank and raises the first fatal finding on all.

    Args:
        findings: The same on every rank.
        main: Whether this rank logs.

    Raises:
        UnhealthyRunError: One is fatal.
    """
    for finding in findings:
        if finding.fatal:
            raise UnhealthyRunError(finding.text)
        if main:
            LOG.warning(finding.text)


@dataclass(frozen=True)
class AnswerCounts:
    """What is counted of an iteration's pairs, so that the same can be said on every rank.

    Attributes:
        pairs: All of them, those kept from earlier iterations included.
        all_identical: Whether in each of them the opponent's answer equals the human's.
        first: Ids of the first answer that was generated in this iteration.
        new: Pairs whose answer was generated in this iteration. The counts below are of these alone.
        rejected_tokens: Tokens of the opponent's answers.
        chosen_tokens: Tokens of the human's.
        cut: Answers cut at their limit.
        empty: Answers that are nothing but their end token.
        identical: Answers that equal the human's.
        rejected_monotone: Answers that repeat a single token.
        chosen_monotone: Human answers that do.
    """

    pairs: int
    all_identical: bool
    first: list[int]
    new: int
    rejected_tokens: int
    chosen_tokens: int
    cut: int
    empty: int
    identical: int
    rejected_monotone: int
    chosen_monotone: int

    def shares(self) -> dict[str, float]:
        """Returns mean lengths in tokens and fractions under their public names."""
        return {
            "spin/rejected_length": self.rejected_tokens / self.new,
            "spin/chosen_length": self.chosen_tokens / self.new,
            "spin/truncated": self.cut / self.new,
            "spin/empty": self.empty / self.new,
            "spin/identical": self.identical / self.new,
        }


def count_answers(pairs: pa.Table, iteration: int, stops: Sequence[int]) -> AnswerCounts:
    """Counts, a piece of the table at a time.

    Args:
        pairs: With `chosen_ids`, `rejected_ids`, `finish_reason` and `generated_in`.
        iteration: Whose opponent answered.
        stops: Tokens that end an answer.
    """
    counts = np.zeros(8, dtype=np.int64)
    all_identical, first = True, None
    for batch in pairs.to_batches(max_chunksize=BATCH_ROWS):
        new = pc.equal(batch["generated_in"], iteration).to_numpy(zero_copy_only=False)
        chosen, rejected = flat(batch["chosen_ids"]), flat(batch["rejected_ids"])
        ended = pc.equal(batch["finish_reason"], "stop").to_numpy(zero_copy_only=False)
        end_alone = (rejected[1] == 1) & np.isin(last_ids(batch["rejected_ids"]), stops)
        alike = identical(chosen, rejected)
        all_identical &= bool(alike.all())
        counts += [
            values[new].sum()
            for values in (
                np.ones_like(new),
                rejected[1],
                chosen[1],
                ~ended,
                (rejected[1] == 0) | end_alone,
                alike,
                monotone(rejected),
                monotone(chosen),
            )
        ]
        if first is None and new.any():
            first = batch["rejected_ids"][int(np.argmax(new))].as_py()
    return AnswerCounts(pairs.num_rows, all_identical, first or [], *counts.tolist())


def check_answers(
    counts: AnswerCounts, iteration: int, *, sft_weight: float, max_new_tokens: int | None, sample: str
) -> list[Finding]:
    """Looks for answers that nothing can be learnt from.

    Args:
        counts: Of the iteration's pairs.
        iteration: Whose opponent answered.
        sft_weight: The `spin.sft_weight`.
        max_new_tokens: The `spin.generation.max_new_tokens`, or None for the default.
        sample: An answer as text.
    """
    count = counts.new
    if count == 0:
        return []
    shares = counts.shares()
    sample = repr(sample[:60])
    say = f"iteration {iteration}: "
    same, empty, cut = (shares[f"spin/{name}"] for name in ("identical", "empty", "truncated"))
    findings: list[Finding] = []

    def find(fatal: bool, text: str) -> None:
        findings.append(Finding(say + text, fatal))

    if sft_weight == 0 and counts.all_identical:
        find(
            True,
            f"all {counts.pairs} answers equal the human's token for token, so the loss has no gradient and nothing "
            "would be learnt. The data may have been made by this very model (greedily, if `spin.generation.temperature` "
            "is 0), or the game is over: lower `spin.iterations`, or use other data",
        )
    elif same >= _WARNED_SHARE and count >= _FEWEST:
        find(
            False,
            f"{same:.1%} of {count} answers equal the human's and teach nothing: the data may have been made by "
            "this very model, or the game is nearly over",
        )
    if empty == 1.0 and count >= _FEWEST:
        find(
            True,
            f"all {count} answers are empty: the model ends each at once. The likely cause is a chat template that ends "
            "the prompt with an end token, or a model that collapsed: check `chat_template` and, after the first "
            "iteration, lower `learning_rate` or raise `spin.beta`",
        )
    elif cut >= _WARNED_SHARE and count >= _FEWEST:
        limit = (
            f"{max_new_tokens}" if max_new_tokens else f"what `sequence_len` leaves, at most {DEFAULT_MAX_NEW_TOKENS}"
        )
        find(
            False,
            f"{cut:.1%} of {count} answers were cut (mean {shares['spin/rejected_length']:.1f} tokens, human "
            f"{shares['spin/chosen_length']:.1f}). Either the model has not learnt to end its turn (train it with SFT "
            f"first), or `spin.generation.max_new_tokens` ({limit}) is too small. An answer starts: {sample}",
        )
    own, human = counts.rejected_monotone / count, counts.chosen_monotone / count
    if own >= 0.9 and human < 0.5 and empty < 1.0 and count >= _FEWEST:
        what = f"{own:.1%} of {count} answers repeat a single token (human: {human:.1%})"
        if iteration == 0:
            find(False, f"{what}: check `base_model` and `chat_template`. An answer starts: {sample}")
        else:
            find(
                True,
                f"{what}: the policy has collapsed. An answer starts: {sample}. Lower `learning_rate` or raise "
                "`spin.beta`; earlier models are in OUTPUT_DIR/spin/iteration-N/model",
            )
    return findings


def check_opponent_logps(logps: np.ndarray, iteration: int) -> list[Finding]:
    """Looks for log-probs that are not numbers.

    Args:
        logps: (pairs, 2) of the human's and the opponent's answers, in nats.
        iteration: Whose opponent scored them.
    """
    bad = ~np.isfinite(logps)
    if not bad.any():
        return []
    rows = np.flatnonzero(bad.any(axis=1))
    kinds = f"{int(bad[:, 0].sum())} of human answers, {int(bad[:, 1].sum())} of the opponent's"
    return [
        Finding(
            f"iteration {iteration}: the opponent's log-probs of {len(rows)} of {len(logps)} pairs are NaN or infinite "
            f"({kinds}; the first pairs are {rows[:5].tolist()}). The likely cause is a model that overflows (`fp16: true` "
            "with a model trained in bf16: use `bf16: true`), or weights that training made NaN: lower `learning_rate`",
            fatal=True,
        )
    ]


def check_loss(losses: Tensor, logps: Tensor, *, step: int, iteration: int) -> list[Finding]:
    """Looks for a loss that is not a number, before it reaches the weights.

    Args:
        losses: (pairs,) of a micro-batch.
        logps: (2 * pairs,) the policy's, in nats.
        step: The run's global step.
        iteration: The running iteration.
    """
    if losses.isfinite().all():
        return []
    figures = ", ".join(f"{value:.4g}" for value in logps.detach().float().tolist()[:6])
    return [
        Finding(
            f"the loss is NaN or infinite at step {step} (iteration {iteration}); the policy's log-probs there: {figures}. "
            "The weights were most likely damaged by the step before: lower `learning_rate`, set `max_grad_norm`, or use "
            "`bf16` instead of `fp16`. Earlier checkpoints and OUTPUT_DIR/spin/iteration-N/model are sound",
            fatal=True,
        )
    ]


def check_weights(bad: list[str], *, step: int) -> list[Finding]:
    """Reports weights that are not numbers, before they are saved.

    Args:
        bad: Their names, as `nonfinite_weights` finds them.
        step: The run's global step.
    """
    if not bad:
        return []
    return [
        Finding(
            f"{len(bad)} weights are NaN or infinite after step {step} (the first is {bad[0]}), and were not saved: "
            + ("check `base_model`" if step == 0 else "lower `learning_rate` or set `max_grad_norm`")
            + ". Earlier checkpoints are sound",
            fatal=True,
        )
    ]


def check_step_zero(
    losses: Tensor, nats_per_token: Tensor, *, expected: float, beta: float, iteration: int
) -> list[Finding]:
    """Checks that policy and opponent are one model at an iteration's first step, so that every reward is 0.

    Args:
        losses: (pairs,) of the first micro-batch.
        nats_per_token: (pairs,) how far the policy's log-probs are from the opponent's, per token, on either answer.
        expected: The loss of a pair whose rewards are 0.
        beta: The iteration's.
        iteration: The running iteration.
    """
    if not losses.numel():
        return []
    off, far = (losses - expected).abs().mean().item(), nats_per_token.mean().item()
    if off <= _OFF * max(1.0, beta) and far <= _OFF:
        return []
    text = (
        f"iteration {iteration}: each pair's loss at the first step should be {expected:.6f}, since policy and opponent "
        f"are the same model, but is off by {off:.6f} on average (log-probs by {far:.4f} nats per token)"
    )
    if far > _ANOTHER_MODEL:
        why = "the log-probs in pairs.parquet are another model's. Were the weights of `base_model` or a checkpoint "
        return [Finding(f"{text}: {why}exchanged since they were made? Then choose another `output_dir`", fatal=True)]
    why = (
        "does the model compute something else in training than in evaluation (noise, dropout, another kernel), or is "
    )
    return [Finding(f"{text}: {why}`micro_batch_size` another than when the pairs were scored?", fatal=False)]
