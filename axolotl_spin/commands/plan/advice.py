"""What is unusual about a run before it starts, each with its figures and what to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from axolotl_spin.data.row_cache import PREPARE_AGAIN
from axolotl_spin.game.updates import WAYS_OUT
from axolotl_spin.run.plan import Plan
from axolotl_spin.settings.generation import DEFAULT_MAX_NEW_TOKENS
from axolotl_spin.settings.spin import SpinConfig


@dataclass(frozen=True)
class Facts:
    """What advice is drawn from.

    Attributes:
        settings: The `spin` block.
        plan: The run's.
        prompts, answers: (rows,) tokens in each prompt and human answer.
        limits: (rows,) most tokens that each prompt's answer may have.
        repeated: Prompts, and whole rows, that an earlier row has too.
        adapter: The host's `adapter`, or None.
        pure_half: Whether trained weights are kept in half precision, with no fp32 copy.
        trained_for: Numbers of tokens in the model's context, or None where its config does not say.
        sequence_len: The host's.
        disk: Bytes that models of iterations take which are still to come, and bytes that are free; None where unknown.
        thoughts: What is wrong with the thoughts in the newest pairs on disk; empty where nothing is.
    """

    settings: SpinConfig
    plan: Plan
    prompts: np.ndarray
    answers: np.ndarray
    limits: np.ndarray
    repeated: tuple[int, int]
    adapter: str | None
    pure_half: bool
    trained_for: int | None
    sequence_len: int
    disk: tuple[int, int] | None
    thoughts: str = ""


# the paper trains with 5e-7; adapters take larger rates
_HIGH_RATE = {True: 1e-3, False: 1e-5}
# in fewer steps an iteration is far from its optimum, and a larger rate makes up for them
_FEW_STEPS = 20
# up to here a step of Adam's changes fewer than a tenth of the weights in bf16 (4% at 2e-5, measured; see `game/updates`)
_ROUNDED_AWAY = 5e-5


def advise(facts: Facts) -> list[dict[str, str]]:
    """Returns what is unusual as `key` (the one to change) and `text`, none where all is as usual."""
    found: list[dict[str, str]] = []

    def say(key: str, text: str) -> None:
        found.append({"key": key, "text": text})

    if facts.thoughts:
        say("chat_template", facts.thoughts)
    _about_the_game(facts, say)
    _about_data(facts, say)
    _about_steps(facts, say)
    return found


def _about_the_game(facts: Facts, say) -> None:
    settings, generation = facts.settings, facts.settings.generation
    entries = facts.plan.iterations
    low = [beta for beta in settings.betas() if beta <= 0.5]
    beyond = [beta for beta in settings.betas() if beta < 1]
    many = max(entry.steps for entry in entries) >= _FEW_STEPS
    if settings.loss == "space":
        if beyond and many:
            say(
                "spin.beta",
                f"the optimum of `loss: space` is the data's distribution at a beta of 1, its default; at {beyond[0]:g} it "
                "lies beyond it, and iterations swing: keep learning rate and epochs small, or leave beta out",
            )
    elif low and settings.history == 0 and settings.iterations > 1 and many:
        say(
            "spin.history",
            f"beta {low[0]:g} with `history: 0`: full optimisation converges only for beta > 1/2; keep the previous "
            "iteration's pairs (`history: 1`), or keep learning rate and epochs small",
        )
    if generation.temperature != 1 or generation.top_p != 1 or generation.top_k is not None:
        changed = (
            f"temperature {generation.temperature:g}, top_p {generation.top_p:g}, top_k {generation.top_k or 'off'}"
        )
        say(
            "spin.generation",
            f"{changed}: the loss takes answers for samples of the model itself (temperature 1, top_p 1); others teach the "
            "policy to leave a distribution that is not its own",
        )
    peak = max(entry.learning_rate for entry in entries)
    steps = max(entry.steps for entry in entries if entry.learning_rate == peak)
    high = _high_rate(facts) * max(1.0, _FEW_STEPS / steps)
    if peak > high:
        kind = f"`adapter: {facts.adapter}`" if facts.adapter else "full fine-tuning"
        say(
            "learning_rate",
            f"{peak:g} is high for {kind} with this loss (the paper: 5e-7); above {high:.3g} models break easily",
        )
    if facts.pure_half and peak < _ROUNDED_AWAY:
        say(
            "bf16",
            f"weights are kept in half precision with no fp32 copy, where a step of {peak:g} is mostly lost to rounding "
            f"(the run measures it as `spin/updated_weights`): {WAYS_OUT}",
        )


def _high_rate(facts: Facts) -> float:
    return _HIGH_RATE[facts.adapter is not None]


def _about_data(facts: Facts, say) -> None:
    rows = len(facts.prompts)
    limit = facts.settings.generation.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
    beyond = int((facts.answers > facts.limits).sum())
    if beyond > 0.05 * rows:
        say(
            "spin.generation.max_new_tokens",
            f"{beyond} of {rows} human answers ({beyond / rows:.0%}) are longer than the opponent's may be, so it is cut "
            "where they go on and length tells the two apart: raise it"
            + ("" if facts.settings.generation.max_new_tokens else f" ({DEFAULT_MAX_NEW_TOKENS} where it is not set)"),
        )
    short = int((facts.limits < min(limit, 32)).sum())
    if short:
        say(
            "sequence_len",
            f"{short} of {rows} prompts leave fewer than {min(limit, 32)} of {facts.sequence_len} tokens for an answer: "
            f"raise it, or leave them out; {PREPARE_AGAIN}",
        )
    if facts.trained_for and facts.sequence_len > facts.trained_for:
        say(
            "sequence_len",
            f"{facts.sequence_len} is more than the {facts.trained_for} tokens that the model was made for",
        )
    prompts, whole = facts.repeated
    if whole:
        say(
            "dataset_exact_deduplication",
            f"{whole} of {rows} rows repeat an earlier prompt and answer: `dataset_exact_deduplication: true`",
        )
    if prompts - whole > 0.01 * rows:
        say("datasets", f"{prompts - whole} of {rows} rows have the prompt of an earlier row with another answer")
    tiny = int((facts.answers <= 2).sum())
    if tiny > 0.01 * rows:
        say(
            "datasets",
            f"{tiny} of {rows} human answers have at most 2 tokens, their end included: there is little to learn from them",
        )


def _about_steps(facts: Facts, say) -> None:
    batch = facts.plan.global_batch
    entries = facts.plan.iterations
    few = min(entries, key=lambda entry: entry.steps)
    if few.steps < _FEW_STEPS and few.learning_rate <= _high_rate(facts):
        say(
            "gradient_accumulation_steps",
            f"iteration {few.iteration} has {few.steps} steps of {batch} pairs: little moves in so few; use more data or "
            "epochs, or smaller batches",
        )
    warm = [entry for entry in entries if entry.warmup_steps and 2 * entry.warmup_steps >= entry.steps]
    if warm:
        say(
            "warmup_steps",
            f"it counts per iteration: {warm[0].warmup_steps} of the {warm[0].steps} steps of iteration "
            f"{warm[0].iteration} are warmup",
        )
    for entry in entries:
        rest = entry.rows % batch
        if rest and 4 * rest <= batch and entry.steps_per_epoch > 1:
            key = "spin.max_prompts" if facts.settings.prompts_per_iteration is None else "spin.prompts_per_iteration"
            say(
                key,
                f"the last step of each epoch of iteration {entry.iteration} has {rest} pairs instead of {batch}, and "
                "moves as far as the others",
            )
            break
    if facts.disk and facts.disk[0] > facts.disk[1]:
        need, free = (f"{count / 2**30:.1f} GiB" for count in facts.disk)
        say(
            "spin.save_iterations",
            f"the iterations' models take {need}, and {free} are free: set it to false, or free some",
        )
