"""Every metric of a run: the one table from which terminal, page and documentation take names, headings and formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from axolotl_spin.monitor.benchmarks import of_the_start


@dataclass(frozen=True)
class Metric:
    """A figure under its public name.

    Attributes:
        name: As it is logged, and as `metrics.json` has it.
        about: What it is, with its unit.
        heading: Of its column in tables of iterations, broken as a narrow column breaks it; empty: it has none.
        form: How a column writes it.
        page_form: How the page writes it, where that is finer; "time" for seconds.
        page_only: Only the page has the column.
        line: Its name on the line of a training log, and how it is written there; none where the line leaves it out.
    """

    name: str
    about: str
    heading: str = ""
    form: str = "{}"
    page_form: str = ""
    page_only: bool = False
    line: tuple[str, str] | None = None

    @property
    def title(self) -> str:
        """The heading on one line, without the unit of seconds."""
        return self.heading.strip().replace("-\n", "").replace("\ns", "").replace("\n", " ")


METRICS = (
    Metric("spin/iteration", "the iteration, from 0", line=("iter", "{:d}")),
    Metric("spin/beta", "its beta"),
    Metric(
        "loss",
        "ln 2 at each iteration's first step (`hinge`: 1, `space`: 2 ln 2), by construction, and on top of it what "
        "`spin.sft_weight` adds; it cannot be compared between iterations",
        line=("loss", "{:.4f}"),
    ),
    Metric("loss_first", "mean loss per pair of the first step", "loss\nfirst", "{:.4f}"),
    Metric("loss_last", "mean loss per pair of the last step", "loss\nlast", "{:.4f}"),
    Metric(
        "rewards/accuracies",
        "share of pairs whose human answer gained more",
        "accu-\nracy",
        "{:.2f}",
        line=("acc", "{:.2f}"),
    ),
    Metric("rewards/margins", "reward of human minus own answers", "\nmargin", "{:.3f}", line=("margin", "{:+.3f}")),
    Metric(
        "rewards/chosen",
        "beta * (log p - log p_opponent) of the human answers; per token with `length_normalized`",
        line=("human", "{:+.3f}"),
    ),
    Metric("rewards/rejected", "the same of the opponent's answers", line=("own", "{:+.3f}")),
    Metric("logps/chosen", "log-probs of the human answers under the policy, summed over tokens, in nats"),
    Metric("logps/rejected", "the same of the opponent's answers"),
    Metric("spin/chosen_length", "mean length of human answers, in tokens", "human\ntokens", "{:.1f}"),
    Metric("spin/rejected_length", "mean length of the opponent's answers, in tokens", "own\ntokens", "{:.1f}"),
    Metric("spin/truncated", "share of its answers cut at their limit", "\ncut", "{:.0%}", "{:.1%}"),
    Metric("spin/empty", "share of its answers that say nothing", "\nempty", "{:.1%}", page_only=True),
    Metric("spin/identical", "share of its answers that equal the human's", "\nidentical", "{:.1%}", page_only=True),
    Metric("eval_loss", "nats per token of held-out human answers after the iteration", "held-out\nNLL", "{:.4f}"),
    Metric("eval_loss_stderr", "its standard error over held-out rows", "held-out\nNLL ±", "{:.4f}", page_only=True),
    Metric("spin/start_eval_loss", "`eval_loss` of the start model, in iteration 0's `metrics.json`"),
    Metric("spin/start_eval_loss_stderr", "its standard error"),
    Metric(
        "spin/heldout_margin",
        "held-out log-prob per token, human minus own, in nats",
        "held-out\nmargin",
        "{:+.3f}",
    ),
    Metric("spin/heldout_auc", "0.5: human and own answers look alike to the model", "held-out\nAUC", "{:.3f}"),
    Metric(
        "spin/heldout_auc_stderr",
        "its standard error over held-out prompts",
        "held-out\nAUC ±",
        "{:.3f}",
        page_only=True,
    ),
    Metric(
        "spin/heldout_wins",
        "share of held-out prompts whose human answer is likelier than to the model before, ties half",
        "\nwins",
        "{:.0%}",
        "{:.1%}",
    ),
    Metric(
        "spin/heldout_length_wins",
        "share of held-out prompts whose own answer's length is nearer to the human's than before, ties half",
        "length\nwins",
        "{:.0%}",
        "{:.1%}",
        page_only=True,
    ),
    Metric(
        "spin/heldout_length",
        "mean length of its answers on held-out prompts, in tokens",
        "held-out\ntokens",
        "{:.1f}",
        page_only=True,
    ),
    Metric("spin/heldout_human_length", "mean length of the human answers to them, in tokens"),
    Metric("spin/heldout_distinct_2", "share of different bigrams in its answers to them"),
    Metric("spin/heldout_seconds", "seconds of the held-out play"),
    Metric(
        "spin/eval/<task>/<metric>",
        "a benchmark's figure, by lm-eval's names; where a filter gave it, `<metric>,<filter>`",
    ),
    Metric("spin/eval/<task>/<metric>_stderr", "its standard error"),
    Metric("spin/eval_seconds", "seconds of the benchmarks"),
    Metric("spin/generation_seconds", "seconds of answering the prompts", "gener-\nate", "{:.1f}", "time"),
    Metric("spin/generation_tokens_per_second", "tokens drawn a second, over all ranks"),
    Metric(
        "spin/engine_start_seconds", "with vLLM: seconds until the engine was ready, part of `spin/generation_seconds`"
    ),
    Metric(
        "spin/opponent_write_seconds", "with vLLM: seconds of writing the opponent, part of `spin/generation_seconds`"
    ),
    Metric("spin/scoring_seconds", "seconds of the opponent's pass over the pairs", "score\ns", "{:.1f}", "time"),
    Metric("spin/updated_weights", "share of the trained weights that the first step after the warmup changed"),
    Metric("spin/training_seconds", "seconds of the iteration's epochs", "train\ns", "{:.1f}", "time"),
)

# the start model's held-out play stands in iteration 0's `metrics.json` under names of its own
START = "spin/heldout_start_"
HELD_OUT = "spin/heldout_"
_START_LOSS = "spin/start_"


def start_figures(first: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the start model's figures under the names that they have after an iteration.

    Args:
        first: Iteration 0's `metrics.json`.
    """
    found = {name.replace(START, HELD_OUT): value for name, value in first.items() if name.startswith(START)}
    loss = {name.removeprefix(_START_LOSS): value for name, value in first.items() if name.startswith(_START_LOSS)}
    return {**found, **loss, **of_the_start(first)}
