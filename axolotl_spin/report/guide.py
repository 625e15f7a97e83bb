"""Judges a run by its figures: what to look at, why, and which key to change.

Each rule is a function of the run's figures and stands beside the threshold that it uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from axolotl_spin.report.figures import Figures

LENGTH_DRIFT = 1.5  # own answers longer or shorter by this factor than the human's, and further off than at the start
CUT = 0.2  # share of answers cut at their limit
EMPTY = 0.05  # share of answers that say nothing
IDENTICAL = 0.2  # share of answers that equal the human's
COLLAPSE = 0.6  # distinct word pairs of own answers over those of iteration 0
CHOSEN_FALL = 0.02  # nats per token that the human answers lose within an iteration
SATURATED_LOSS = 0.1  # share of the first loss at which little gradient is left ...
SATURATED_MOVE = 0.05  # ... and nats per token by which the policy has moved until then, where beta is too high
FAR = 1.0  # nats per token by which a policy is far from its opponent
STILL_LOSS, STILL_ACCURACY = 0.98, 0.6  # share of the first loss, and accuracy, of a policy that hardly moved
EXHAUSTED_LOSS = 0.05  # share of the first loss from which on every pair is told apart
EXHAUSTED_REST = 1 / 3  # share of an iteration's logs that come after that
HELDOUT_RISE = 0.02  # relative rise of the held-out NLL over the best of the iterations before
SAME = 0.05  # distance from 0.5 at which the AUC says that human and own answers are alike
FIRST_LOSS = 0.05  # nats by which a first loss is off


@dataclass
class Advice:
    """What a rule has to say.

    Attributes:
        title: The finding in a few words.
        text: Figures, what they mean, and which key to change.
        iterations: The iterations that it concerns; empty for the whole run.
    """

    title: str
    text: str
    iterations: list[int] = field(default_factory=list)


def advise(figures: Sequence[Figures]) -> list[Advice]:
    """Returns what applies to a run, the gravest first.

    Args:
        figures: Of its iterations, in order.
    """
    return [advice for rule in RULES if (advice := rule(figures)) is not None]


def _where(hits: Sequence[Figures]) -> list[int]:
    return [found.iteration for found in hits]


def wrong_start(figures: Sequence[Figures]) -> Advice | None:
    """The first loss of an iteration is not that of two equal models."""
    hits = [f for f in figures if (loss := f.get("loss_first")) is not None and abs(loss - f.first_loss) > FIRST_LOSS]
    if not hits:
        return None
    return Advice(
        "The first loss is off",
        f"It was {hits[0].metrics['loss_first']:.4f} instead of {hits[0].first_loss:.4f}, although policy and opponent are "
        "one model there. The model computes something else in training than in scoring, or `base_model` was exchanged.",
        _where(hits),
    )


def collapse(figures: Sequence[Figures]) -> Advice | None:
    """Own answers have lost much of their variety since iteration 0."""
    start = figures[0].distinct_2[0] if figures and figures[0].iteration == 0 else None
    if not start:
        return None
    hits = [f for f in figures[1:] if f.distinct_2[0] is not None and f.distinct_2[0] < COLLAPSE * start]
    if not hits:
        return None
    return Advice(
        "Answers become alike",
        f"Of all pairs of neighbouring tokens in the model's answers {hits[-1].distinct_2[0]:.1%} are distinct, against "
        f"{start:.1%} in iteration 0: it repeats itself, the first sign of a collapse. Lower `learning_rate`, raise "
        "`spin.beta`, or use the model of an earlier iteration.",
        _where(hits),
    )


def empty(figures: Sequence[Figures]) -> Advice | None:
    """Answers that end at once."""
    hits = [f for f in figures if (share := f.get("spin/empty")) is not None and share >= EMPTY]
    if not hits:
        return None
    share = max(f.metrics["spin/empty"] for f in hits)
    return Advice(
        "Empty answers",
        f"Up to {share:.0%} of the answers are nothing but their end token. In iteration 0 check `chat_template`; later, "
        "lower `learning_rate` or raise `spin.beta`.",
        _where(hits),
    )


def length_drift(figures: Sequence[Figures]) -> Advice | None:
    """Own answers leave the human's length."""

    def ratio(found: Figures) -> float | None:
        own, human = found.get("spin/rejected_length"), found.get("spin/chosen_length")
        return None if not own or not human else own / human

    start = ratio(figures[0]) if figures else None
    if start is None:
        return None
    hits = []
    for found in figures[1:]:
        now = ratio(found)
        if now is None:
            continue
        off, before = abs(math.log(now)), abs(math.log(start))
        if off > math.log(LENGTH_DRIFT) and (off > before or (now > 1) != (start > 1)):
            hits.append(found)
    if not hits:
        return None
    last = hits[-1]
    longer = (ratio(last) or 1) > 1
    return Advice(
        f"Answers grow too {'long' if longer else 'short'}",
        f"The model's answers have {last.metrics['spin/rejected_length']:.1f} tokens on average, the human's "
        f"{last.metrics['spin/chosen_length']:.1f}; in iteration 0 it was "
        f"{figures[0].metrics['spin/rejected_length']:.1f}. "
        "Log-probs are summed over tokens, so length is the easiest thing to learn. Raise `spin.beta`, lower "
        "`learning_rate`, or stop at an earlier iteration (`spin.iterations`).",
        _where(hits),
    )


def cut(figures: Sequence[Figures]) -> Advice | None:
    """Answers that reach their limit."""
    hits = [f for f in figures if (share := f.get("spin/truncated")) is not None and share >= CUT]
    if not hits:
        return None
    share = max(f.metrics["spin/truncated"] for f in hits)
    return Advice(
        "Many answers are cut",
        f"Up to {share:.0%} of the answers reach their limit before they end, so the policy learns to tell the cut. Raise "
        "`spin.generation.max_new_tokens` (and `sequence_len`); if the model never ends its turn, train it with SFT first.",
        _where(hits),
    )


def chosen_falls(figures: Sequence[Figures]) -> Advice | None:
    """Human answers become less likely while they are told apart."""
    hits = [f for f in figures if (move := f.per_token("rewards/chosen")) is not None and move < -CHOSEN_FALL]
    if not hits:
        return None
    worst = min(f.per_token("rewards/chosen") or 0.0 for f in hits)
    return Advice(
        "Human answers become less likely",
        f"Their log-prob fell by up to {-worst:.3f} nats per token within an iteration: the margin grows because the "
        "model's own answers fall faster. Set `spin.sft_weight` (0.1, say), raise `spin.beta`, or lower `learning_rate`.",
        _where(hits),
    )


def beta_too_high(figures: Sequence[Figures]) -> Advice | None:
    """The loss is used up although the policy has hardly moved."""
    hits = []
    for found in figures:
        loss, move = found.get("loss_last"), found.per_token("rewards/margins")
        if loss is not None and move is not None and loss < SATURATED_LOSS * found.first_loss and move < SATURATED_MOVE:
            hits.append(found)
    if not hits:
        return None
    move = hits[0].per_token("rewards/margins") or 0.0
    return Advice(
        "`spin.beta` may be too high",
        f"The loss fell to {hits[0].metrics['loss_last']:.4f} while human and own answers moved apart by only {move:.3f} "
        f"nats per token: with a beta of {hits[0].metrics['spin/beta']:g} the gradient is gone before the policy moves. "
        "Lower `spin.beta`.",
        _where(hits),
    )


def too_far(figures: Sequence[Figures]) -> Advice | None:
    """The policy leaves its opponent by much."""
    hits = [f for f in figures if (move := f.per_token("rewards/margins")) is not None and move > FAR]
    if not hits:
        return None
    worst = max(f.per_token("rewards/margins") or 0.0 for f in hits)
    return Advice(
        "The policy moves far within an iteration",
        f"Human and own answers moved apart by up to {worst:.2f} nats per token. The opponent's log-probs say little so "
        "far from it. Raise `spin.beta`, which keeps the policy near, or lower `learning_rate` or `num_epochs`.",
        _where(hits),
    )


def hardly_moves(figures: Sequence[Figures]) -> Advice | None:
    """An iteration ends almost where it started."""
    hits = []
    for found in figures:
        loss, accuracy = found.get("loss_last"), found.get("rewards/accuracies")
        if (
            found.done
            and loss is not None
            and accuracy is not None
            and loss > STILL_LOSS * found.first_loss
            and accuracy < STILL_ACCURACY
        ):
            hits.append(found)
    if not hits:
        return None
    return Advice(
        "The policy hardly moves",
        f"The loss ended at {hits[0].metrics['loss_last']:.4f} from {hits[0].first_loss:.4f}, with an accuracy of "
        f"{hits[0].metrics['rewards/accuracies']:.2f}. Either the model's answers are already like the human's, or there "
        "is too little training: raise `learning_rate` or `num_epochs`.",
        _where(hits),
    )


def exhausted(figures: Sequence[Figures]) -> Advice | None:
    """For much of an iteration there is nothing left to learn."""
    hits, rest = [], 0.0
    for found in figures:
        losses = [row["loss"] for row in found.rows]
        # the first log from which on no later one is above the threshold
        above = [index for index, loss in enumerate(losses) if loss >= EXHAUSTED_LOSS * found.first_loss]
        share = 1 - (above[-1] + 1 if above else 0) / len(losses) if len(losses) >= 6 else 0.0
        if share >= EXHAUSTED_REST:
            hits.append(found)
            rest = max(rest, share)
    if not hits:
        return None
    return Advice(
        "The data is used up early",
        f"For the last {rest:.0%} of an iteration the loss stays below {EXHAUSTED_LOSS * hits[0].first_loss:.3f}: every "
        "pair is told apart, and more steps only push the policy away. Lower `num_epochs`, use more prompts (`datasets`, "
        "`spin.max_prompts`), or lower `learning_rate`.",
        _where(hits),
    )


def identical(figures: Sequence[Figures]) -> Advice | None:
    """Many answers equal the human's."""
    hits = [f for f in figures if (share := f.get("spin/identical")) is not None and share >= IDENTICAL]
    if not hits:
        return None
    return Advice(
        "Many answers equal the human's",
        f"Up to {max(f.metrics['spin/identical'] for f in hits):.0%} of the answers equal the human's and teach nothing: "
        "the game is nearly over, or the data was made by this very model. Lower `spin.iterations`, or use other data.",
        _where(hits),
    )


def heldout_rises(figures: Sequence[Figures]) -> Advice | None:
    """Held-out human answers become less likely than they were."""
    best: float | None = None
    hits = []
    for found in figures:
        now = found.get("eval_loss")
        if now is None:
            continue
        if best is not None and now > best * (1 + HELDOUT_RISE):
            hits.append(found)
        best = now if best is None else min(best, now)
    if not hits or best is None:
        return None
    return Advice(
        "Held-out answers become less likely",
        f"The held-out NLL is {hits[-1].metrics['eval_loss']:.4f} and was {best:.4f} after an earlier iteration. Use that "
        "iteration's model, lower `spin.iterations`, raise `spin.beta`, or set `spin.sft_weight`.",
        _where(hits),
    )


def game_over(figures: Sequence[Figures]) -> Advice | None:
    """Held-out answers can hardly be told from the human's."""
    last = figures[-1] if figures else None
    share = last.get("spin/heldout_auc") if last else None
    if last is None or share is None or abs(share - 0.5) > SAME:
        return None
    return Advice(
        "Own answers can hardly be told from the human's",
        f"On held-out prompts the model finds a human answer likelier than one of its own in {share:.0%} of the cases, and "
        "50% is chance. This is where the game ends: more `spin.iterations` will bring little.",
        [last.iteration],
    )


RULES: tuple[Callable[[Sequence[Figures]], Advice | None], ...] = (
    wrong_start,
    collapse,
    empty,
    length_drift,
    cut,
    chosen_falls,
    heldout_rises,
    too_far,
    beta_too_high,
    exhausted,
    hardly_moves,
    identical,
    game_over,
)
