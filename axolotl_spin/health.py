"""Numbers gone wrong: found where they first show, reported with figures, the likely cause and the key to change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from axolotl.utils.logging import get_logger
from torch import Tensor

LOG = get_logger(__name__)

_FEWEST = 16  # with fewer answers a share says nothing
_WARNED_SHARE = 0.95


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


def report(findings: list[Finding], main: bool) -> None:
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


def describe_pairs(pairs: pa.Table, iteration: int) -> dict[str, float]:
    """Returns lengths in tokens and fractions over the pairs generated in an iteration, under their public names."""
    new = pairs.filter(pc.equal(pairs["generated_in"], iteration)).combine_chunks()
    rejected = pc.list_value_length(new["rejected_ids"]).to_numpy()
    ended = pc.equal(new["finish_reason"], "stop").to_numpy()
    return {
        "spin/rejected_length": float(rejected.mean()),
        "spin/chosen_length": float(pc.list_value_length(new["chosen_ids"]).to_numpy().mean()),
        "spin/truncated": float((~ended).mean()),
        # an answer that is nothing but its end token says nothing
        "spin/empty": float((rejected - ended <= 0).mean()),
        "spin/identical": float(np.mean(_identical(new))),
    }


def check_answers(pairs: pa.Table, iteration: int, *, sft_weight: float, max_new_tokens: int | None) -> list[Finding]:
    """Looks for answers that nothing can be learnt from.

    Args:
        pairs: The iteration's pairs, kept ones included.
        iteration: Whose opponent answered.
        sft_weight: The `spin.sft_weight`.
        max_new_tokens: The `spin.generation.max_new_tokens`, or None for the default.
    """
    new = pairs.filter(pc.equal(pairs["generated_in"], iteration)).combine_chunks()
    count = new.num_rows
    if count == 0:
        return []
    shares = describe_pairs(pairs, iteration)
    sample = _as_text(new["rejected"][0].as_py())
    say = f"iteration {iteration}: "
    identical, empty, cut = (shares[f"spin/{name}"] for name in ("identical", "empty", "truncated"))
    findings: list[Finding] = []

    def find(fatal: bool, text: str) -> None:
        findings.append(Finding(say + text, fatal))

    if sft_weight == 0 and _identical(pairs).all():
        find(
            True,
            f"all {pairs.num_rows} answers equal the human's token for token, so the loss has no gradient and nothing "
            "would be learnt. The data may have been made by this very model (greedily, if `spin.generation.temperature` "
            "is 0), or the game is over: lower `spin.iterations`, or use other data",
        )
    elif identical >= _WARNED_SHARE and count >= _FEWEST:
        find(
            False,
            f"{identical:.1%} of {count} answers equal the human's, which give no gradient: the data may have been made by "
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
        limit = f"{max_new_tokens}" if max_new_tokens else "what `sequence_len` leaves, at most 512"
        find(
            False,
            f"{cut:.1%} of {count} answers were cut (mean {shares['spin/rejected_length']:.1f} tokens, human "
            f"{shares['spin/chosen_length']:.1f}). Either the model has not learnt to end its turn (train it with SFT "
            f"first), or `spin.generation.max_new_tokens` ({limit}) is too small. An answer starts: {sample}",
        )
    own, human = _one_token_share(new["rejected_ids"]), _one_token_share(new["chosen_ids"])
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
    losses: Tensor, nats_per_token: Tensor, *, expected: float, tolerance: float, iteration: int
) -> list[Finding]:
    """Checks that policy and opponent are one model at an iteration's first step, so that every pair's loss is l(0).

    Args:
        losses: (pairs,) of the first micro-batch.
        nats_per_token: (pairs,) how far the policy's log-probs are from the opponent's, per token.
        expected: l(0).
        tolerance: How far the mean loss may be off.
        iteration: The running iteration.
    """
    if not losses.numel():
        return []
    off, far = (losses - expected).abs().mean().item(), nats_per_token.mean().item()
    if off <= tolerance:
        return []
    text = (
        f"iteration {iteration}: each pair's loss at the first step should be {expected:.6f}, since policy and opponent "
        f"are the same model, but is off by {off:.6f} on average (log-probs by {far:.4f} nats per token)"
    )
    if far > 0.2:  # a fifth in perplexity is no rounding: the pairs were scored by other weights
        return [
            Finding(
                f"{text}: the log-probs in pairs.parquet are another model's. Were the weights of `base_model` or a "
                "checkpoint exchanged since they were made? Then choose another `output_dir`",
                fatal=True,
            )
        ]
    why = "does the model compute something else in training than in evaluation (noise, dropout, another kernel)?"
    return [Finding(f"{text}: {why}", fatal=False)]


def _identical(pairs: pa.Table) -> np.ndarray:
    (chosen, chosen_lengths), (rejected, rejected_lengths) = (
        _flat(pairs[f"{kind}_ids"]) for kind in ("chosen", "rejected")
    )
    alike = chosen_lengths == rejected_lengths
    differs = chosen[np.repeat(alike, chosen_lengths)] != rejected[np.repeat(alike, rejected_lengths)]
    row = np.repeat(np.flatnonzero(alike), chosen_lengths[alike])
    return alike & (np.bincount(row, weights=differs, minlength=len(alike)) == 0)


def _one_token_share(answers: pa.ChunkedArray) -> float:
    """Returns the share of answers that say nothing but one token over and over (their end token aside)."""
    ids, lengths = _flat(answers)
    starts = np.cumsum(lengths) - lengths
    first = np.repeat(ids[starts[lengths > 0]], lengths[lengths > 0])
    differs = ids != first
    differs[(starts + lengths - 1)[lengths > 0]] = False  # the end token
    row = np.repeat(np.arange(len(lengths)), lengths)
    return float(np.mean((lengths > 0) & (np.bincount(row, weights=differs, minlength=len(lengths)) == 0)))


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of all rows end to end, and how many each row has."""
    parts = lists.chunks
    values = [part.flatten().to_numpy(zero_copy_only=False) for part in parts]
    lengths = [pc.list_value_length(part).to_numpy(zero_copy_only=False) for part in parts]
    none = np.zeros(0, dtype=np.int32)
    return np.concatenate([none, *values]), np.concatenate([none, *lengths]).astype(np.int64)


def _as_text(text: str) -> str:
    return repr(text[:60])
