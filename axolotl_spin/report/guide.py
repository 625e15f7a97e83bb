"""Judges a run by its figures: what to look at, why, and which key to change.

`RULES` is the table: what each rule finds among the iterations, and what it says of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import ge, gt, lt

from axolotl_spin.report.figures import Figures
from axolotl_spin.report.findings import (
    CHOSEN_FALL,
    CUT,
    EMPTY,
    EXHAUSTED_LOSS,
    EXHAUSTED_REST,
    FAR,
    IDENTICAL,
    Iterations,
    alike,
    best_before,
    collapsed,
    drifted,
    each,
    lengths_ratio,
    metric,
    most,
    move,
    risen,
    saturated,
    still,
    used_up,
    wrong_start,
)


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
        wrong_start,
        lambda _, hits: (
            f"It was {hits[0].metrics['loss_first']:.4f} instead of {hits[0].first_loss:.4f}, although policy and opponent "
            "are one model there. The model computes something else in training than in scoring, or `base_model` was "
            "exchanged."
        ),
    ),
    Rule(
        "Answers become alike",
        collapsed,
        lambda figures, hits: (
            f"Of all pairs of neighbouring tokens in the model's answers {hits[-1].distinct_2[0]:.1%} are distinct, "
            f"against {figures[0].distinct_2[0]:.1%} in iteration 0: it repeats itself, the first sign of a collapse. "
            "Lower `learning_rate`, raise `spin.beta`, or use the model of an earlier iteration."
        ),
    ),
    Rule(
        "Empty answers",
        each(metric("spin/empty"), ge, EMPTY),
        lambda _, hits: (
            f"Up to {most(metric('spin/empty'), hits):.0%} of the answers are nothing but their end token. In iteration "
            "0 check `chat_template`; later, lower `learning_rate` or raise `spin.beta`."
        ),
    ),
    Rule(
        lambda hits: f"Answers grow too {'long' if (lengths_ratio(hits[-1]) or 1) > 1 else 'short'}",
        drifted,
        lambda figures, hits: (
            f"The model's answers have {hits[-1].metrics['spin/rejected_length']:.1f} tokens on average, the human's "
            f"{hits[-1].metrics['spin/chosen_length']:.1f}; in iteration 0 it was "
            f"{figures[0].metrics['spin/rejected_length']:.1f}. Log-probs are summed over tokens, so length is the easiest "
            "thing to learn. Raise `spin.beta`, lower `learning_rate`, or stop at an earlier iteration (`spin.iterations`)."
        ),
    ),
    Rule(
        "Many answers are cut",
        each(metric("spin/truncated"), ge, CUT),
        lambda _, hits: (
            f"Up to {most(metric('spin/truncated'), hits):.0%} of the answers reach their limit before they end, so the "
            "policy learns to tell the cut. Raise `spin.generation.max_new_tokens` (and `sequence_len`); if the model "
            "never ends its turn, train it with SFT first."
        ),
    ),
    Rule(
        "Human answers become less likely",
        each(move("rewards/chosen"), lt, -CHOSEN_FALL),
        lambda _, hits: (
            f"Their log-prob fell by up to {-min(f.per_token('rewards/chosen') or 0.0 for f in hits):.3f} nats per token "
            f"within an iteration{_faster(hits)}. Raise `spin.beta`, lower `learning_rate`, or {_hold_up(hits)}."
        ),
    ),
    Rule(
        "Held-out answers become less likely",
        risen,
        lambda figures, hits: (
            f"The held-out NLL is {hits[-1].metrics['eval_loss']:.4f} after iteration {hits[-1].iteration} and was "
            f"{best_before(figures, figures.index(hits[-1])):.4f} before. Keep the best iteration by `spin.keep`, lower "
            f"`spin.iterations` or `learning_rate`, raise `spin.beta`, or {_hold_up(hits)}."
        ),
    ),
    Rule(
        "The policy moves far within an iteration",
        each(move("rewards/margins"), gt, FAR),
        lambda _, hits: (
            f"Human and own answers moved apart by up to {most(move('rewards/margins'), hits):.2f} nats per token. The "
            "opponent's log-probs say little so far from it. Raise `spin.beta`, which keeps the policy near, or lower "
            "`learning_rate` or `num_epochs`."
        ),
    ),
    Rule(
        "`spin.beta` may be too high",
        saturated,
        lambda _, hits: (
            f"The loss fell to {hits[0].metrics['loss_last']:.4f} while human and own answers moved apart by only "
            f"{hits[0].per_token('rewards/margins') or 0.0:.3f} nats per token: with a beta of "
            f"{hits[0].metrics['spin/beta']:g} the gradient is gone before the policy moves. Lower `spin.beta`."
        ),
    ),
    Rule(
        "The data is used up early",
        each(used_up, ge, EXHAUSTED_REST),
        lambda _, hits: (
            f"For the last {most(used_up, hits):.0%} of an iteration the loss stays below "
            f"{EXHAUSTED_LOSS * hits[0].first_loss:.3f}: every pair is told apart, and more steps only push the policy "
            "away. Lower `num_epochs`, use more prompts (`datasets`, `spin.max_prompts`), or lower `learning_rate`."
        ),
    ),
    Rule(
        "The policy hardly moves",
        still,
        lambda _, hits: (
            f"The loss ended at {hits[0].metrics['loss_last']:.4f} from {hits[0].first_loss:.4f}, with an accuracy of "
            f"{hits[0].metrics['rewards/accuracies']:.2f}. Either the model's answers are already like the human's, or "
            "there is too little training: raise `learning_rate` or `num_epochs`."
        ),
    ),
    Rule(
        "Many answers equal the human's",
        each(metric("spin/identical"), ge, IDENTICAL),
        lambda _, hits: (
            f"Up to {most(metric('spin/identical'), hits):.0%} of the answers equal the human's and teach nothing: the "
            "game is nearly over, or the data was made by this very model. Lower `spin.iterations`, or use other data."
        ),
    ),
    Rule(
        "Own answers can hardly be told from the human's",
        alike,
        lambda _, hits: (
            "On held-out prompts the model finds a human answer likelier than one of its own in "
            f"{hits[0].metrics['spin/heldout_auc']:.0%} of the cases, and 50% is chance. This is where the game ends: more "
            "`spin.iterations` will bring little."
        ),
    ),
)
