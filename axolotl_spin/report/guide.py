"""Judges a run by its figures: what to look at, why, and which key to change.

`RULES` is the table: what each rule finds among the iterations, and what it says of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import ge, gt, lt

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


Iterations = Sequence[Figures]


@dataclass
class Advice:
    """What a rule has to say.

    Attributes:
        title: The finding in a few words.
        text: Figures, what they mean, and which key to change.
        iterations: The iterations that it concerns.
    """

    title: str
    text: str
    iterations: list[int]


@dataclass(frozen=True)
class Rule:
    """Something to look for.

    Attributes:
        title: The finding in a few words; where it depends on the findings, a function of them.
        find: Returns those of a run's iterations that it applies to.
        text: Returns what to say of them, from the whole run and from what was found in it.
    """

    title: str | Callable[[Iterations], str]
    find: Callable[[Iterations], list[Figures]]
    text: Callable[[Iterations, Iterations], str]


def judge(figures: Iterations) -> list[Advice]:
    """Returns what applies to a run, the gravest first.

    Args:
        figures: Of its iterations, in order.
    """
    found = [(rule, rule.find(figures)) for rule in RULES]
    return [
        Advice(
            rule.title if isinstance(rule.title, str) else rule.title(hits),
            rule.text(figures, hits),
            [hit.iteration for hit in hits],
        )
        for rule, hits in found
        if hits
    ]


Value = Callable[[Figures], float | None]


def _metric(name: str) -> Value:
    return lambda found: found.get(name)


def _move(name: str) -> Value:
    return lambda found: found.per_token(name)


def _each(value: Value, compare: Callable[[float, float], bool], limit: float) -> Callable[[Iterations], list[Figures]]:
    """Returns what finds the iterations in which a value is known and stands so to a limit."""
    return lambda figures: [f for f in figures if (now := value(f)) is not None and compare(now, limit)]


def _most(value: Value, hits: Iterations) -> float:
    return max(value(found) or 0.0 for found in hits)


def _wrong_start(figures: Iterations) -> list[Figures]:
    return [f for f in figures if (loss := f.get("loss_first")) is not None and abs(loss - f.first_loss) > FIRST_LOSS]


def _collapsed(figures: Iterations) -> list[Figures]:
    """Own answers have lost much of their variety since iteration 0."""
    start = figures[0].distinct_2[0] if figures and figures[0].iteration == 0 and not figures[0].given else None
    return [f for f in figures[1:] if start and f.distinct_2[0] is not None and f.distinct_2[0] < COLLAPSE * start]


def _lengths_ratio(found: Figures) -> float | None:
    """Returns the length of own answers over the human's."""
    own, human = found.get("spin/rejected_length"), found.get("spin/chosen_length")
    return None if not own or not human else own / human


def _drifted(figures: Iterations) -> list[Figures]:
    """Own answers leave the human's length, further than at the start or to its other side."""
    start = _lengths_ratio(figures[0]) if figures else None

    def drifted(now: float | None) -> bool:
        if start is None or now is None:
            return False
        off, before = abs(math.log(now)), abs(math.log(start))
        return off > math.log(LENGTH_DRIFT) and (off > before or (now > 1) != (start > 1))

    return [found for found in figures[1:] if drifted(_lengths_ratio(found))]


def _saturated(figures: Iterations) -> list[Figures]:
    """The loss is used up although the policy has hardly moved."""
    hits = []
    for found in figures:
        loss, move = found.get("loss_last"), found.per_token("rewards/margins")
        if loss is not None and move is not None and loss < SATURATED_LOSS * found.first_loss and move < SATURATED_MOVE:
            hits.append(found)
    return hits


def _still(figures: Iterations) -> list[Figures]:
    """An iteration ends almost where it started."""
    hits = []
    for found in figures:
        loss, accuracy = found.get("loss_last"), found.get("rewards/accuracies")
        if not found.done or loss is None or accuracy is None:
            continue
        if loss > STILL_LOSS * found.first_loss and accuracy < STILL_ACCURACY:
            hits.append(found)
    return hits


def _used_up(found: Figures) -> float | None:
    """Returns the share of an iteration's logs after which no loss is above the threshold; None of too few logs.

    With `spin.sft_weight` a logged loss has the human answers' NLL in it, which is never used up.
    """
    if found.sft_weight:
        return None
    losses = [row["loss"] for row in found.rows]
    above = [index for index, loss in enumerate(losses) if loss >= EXHAUSTED_LOSS * found.first_loss]
    return 1 - (above[-1] + 1 if above else 0) / len(losses) if len(losses) >= 6 else None


def _best_before(figures: Iterations, place: int) -> float | None:
    """Returns the lowest held-out NLL before an iteration's training: of the iterations before it and the start model."""
    start = figures[0].get("spin/start_eval_loss")
    known = [start, *(found.get("eval_loss") for found in figures[:place])]
    return min((now for now in known if now is not None), default=None)


def _risen(figures: Iterations) -> list[Figures]:
    """Held-out human answers are less likely than they were."""

    def risen(now: float | None, best: float | None) -> bool:
        return now is not None and best is not None and now > best * (1 + HELDOUT_RISE)

    return [found for place, found in enumerate(figures) if risen(found.get("eval_loss"), _best_before(figures, place))]


def _alike(figures: Iterations) -> list[Figures]:
    """The last iteration's held-out answers can hardly be told from the human's."""
    return [f for f in figures[-1:] if (auc := f.get("spin/heldout_auc")) is not None and abs(auc - 0.5) <= SAME]


def _hold_up(hits: Iterations) -> str:
    """Returns what keeps human answers likely and is not set yet."""
    if hits[0].sft_weight:
        return "raise `spin.sft_weight`"
    return "set `spin.sft_weight` to 0.1" + ("" if hits[0].loss_type == "space" else ", or `spin.loss` to space")


def _faster(hits: Iterations) -> str:
    grown = all((found.get("rewards/margins") or 0.0) > 0 for found in hits)
    return ": the margin grows because the model's own answers fall faster" if grown else ""


RULES: tuple[Rule, ...] = (
    Rule(
        "The first loss is off",
        _wrong_start,
        lambda _, hits: (
            f"It was {hits[0].metrics['loss_first']:.4f} instead of {hits[0].first_loss:.4f}, although policy and opponent "
            "are one model there. The model computes something else in training than in scoring, or `base_model` was "
            "exchanged."
        ),
    ),
    Rule(
        "Answers become alike",
        _collapsed,
        lambda figures, hits: (
            f"Of all pairs of neighbouring tokens in the model's answers {hits[-1].distinct_2[0]:.1%} are distinct, "
            f"against {figures[0].distinct_2[0]:.1%} in iteration 0: it repeats itself, the first sign of a collapse. "
            "Lower `learning_rate`, raise `spin.beta`, or use the model of an earlier iteration."
        ),
    ),
    Rule(
        "Empty answers",
        _each(_metric("spin/empty"), ge, EMPTY),
        lambda _, hits: (
            f"Up to {_most(_metric('spin/empty'), hits):.0%} of the answers are nothing but their end token. In iteration "
            "0 check `chat_template`; later, lower `learning_rate` or raise `spin.beta`."
        ),
    ),
    Rule(
        lambda hits: f"Answers grow too {'long' if (_lengths_ratio(hits[-1]) or 1) > 1 else 'short'}",
        _drifted,
        lambda figures, hits: (
            f"The model's answers have {hits[-1].metrics['spin/rejected_length']:.1f} tokens on average, the human's "
            f"{hits[-1].metrics['spin/chosen_length']:.1f}; in iteration 0 it was "
            f"{figures[0].metrics['spin/rejected_length']:.1f}. Log-probs are summed over tokens, so length is the easiest "
            "thing to learn. Raise `spin.beta`, lower `learning_rate`, or stop at an earlier iteration (`spin.iterations`)."
        ),
    ),
    Rule(
        "Many answers are cut",
        _each(_metric("spin/truncated"), ge, CUT),
        lambda _, hits: (
            f"Up to {_most(_metric('spin/truncated'), hits):.0%} of the answers reach their limit before they end, so the "
            "policy learns to tell the cut. Raise `spin.generation.max_new_tokens` (and `sequence_len`); if the model "
            "never ends its turn, train it with SFT first."
        ),
    ),
    Rule(
        "Human answers become less likely",
        _each(_move("rewards/chosen"), lt, -CHOSEN_FALL),
        lambda _, hits: (
            f"Their log-prob fell by up to {-min(f.per_token('rewards/chosen') or 0.0 for f in hits):.3f} nats per token "
            f"within an iteration{_faster(hits)}. Raise `spin.beta`, lower `learning_rate`, or {_hold_up(hits)}."
        ),
    ),
    Rule(
        "Held-out answers become less likely",
        _risen,
        lambda figures, hits: (
            f"The held-out NLL is {hits[-1].metrics['eval_loss']:.4f} after iteration {hits[-1].iteration} and was "
            f"{_best_before(figures, figures.index(hits[-1])):.4f} before. Keep the best iteration by `spin.keep`, lower "
            f"`spin.iterations` or `learning_rate`, raise `spin.beta`, or {_hold_up(hits)}."
        ),
    ),
    Rule(
        "The policy moves far within an iteration",
        _each(_move("rewards/margins"), gt, FAR),
        lambda _, hits: (
            f"Human and own answers moved apart by up to {_most(_move('rewards/margins'), hits):.2f} nats per token. The "
            "opponent's log-probs say little so far from it. Raise `spin.beta`, which keeps the policy near, or lower "
            "`learning_rate` or `num_epochs`."
        ),
    ),
    Rule(
        "`spin.beta` may be too high",
        _saturated,
        lambda _, hits: (
            f"The loss fell to {hits[0].metrics['loss_last']:.4f} while human and own answers moved apart by only "
            f"{hits[0].per_token('rewards/margins') or 0.0:.3f} nats per token: with a beta of "
            f"{hits[0].metrics['spin/beta']:g} the gradient is gone before the policy moves. Lower `spin.beta`."
        ),
    ),
    Rule(
        "The data is used up early",
        _each(_used_up, ge, EXHAUSTED_REST),
        lambda _, hits: (
            f"For the last {_most(_used_up, hits):.0%} of an iteration the loss stays below "
            f"{EXHAUSTED_LOSS * hits[0].first_loss:.3f}: every pair is told apart, and more steps only push the policy "
            "away. Lower `num_epochs`, use more prompts (`datasets`, `spin.max_prompts`), or lower `learning_rate`."
        ),
    ),
    Rule(
        "The policy hardly moves",
        _still,
        lambda _, hits: (
            f"The loss ended at {hits[0].metrics['loss_last']:.4f} from {hits[0].first_loss:.4f}, with an accuracy of "
            f"{hits[0].metrics['rewards/accuracies']:.2f}. Either the model's answers are already like the human's, or "
            "there is too little training: raise `learning_rate` or `num_epochs`."
        ),
    ),
    Rule(
        "Many answers equal the human's",
        _each(_metric("spin/identical"), ge, IDENTICAL),
        lambda _, hits: (
            f"Up to {_most(_metric('spin/identical'), hits):.0%} of the answers equal the human's and teach nothing: the "
            "game is nearly over, or the data was made by this very model. Lower `spin.iterations`, or use other data."
        ),
    ),
    Rule(
        "Own answers can hardly be told from the human's",
        _alike,
        lambda _, hits: (
            "On held-out prompts the model finds a human answer likelier than one of its own in "
            f"{hits[0].metrics['spin/heldout_auc']:.0%} of the cases, and 50% is chance. This is where the game ends: more "
            "`spin.iterations` will bring little."
        ),
    ),
)
