"""The charts of a report by iteration: distributions, figures and times."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from axolotl_spin.monitor.metrics import start_figures
from axolotl_spin.report.answers import IterationAnswers
from axolotl_spin.report.charts import LINE, Chart, line, short, styled
from axolotl_spin.report.reading import RunData, number
from axolotl_spin.run.selection import NOISE

BINS = 40  # at most, in a distribution


def iterations(runs: Sequence[RunData], answers: Sequence[list[IterationAnswers]]) -> list[Chart]:
    """Draws what each iteration is summed up in.

    Args:
        runs: One, or several to compare.
        answers: Of each run.
    """
    made = [
        _histogram(
            "lengths",
            "Lengths of answers",
            "Tokens, as a share of the answers. A peak at the right end are answers cut at their limit.",
            answers,
            "tokens",
            [("human", "@human", lambda found: found.chosen_length)],
            lambda found: found.rejected_length,
        ),
        _histogram(
            "margins",
            "How the opponent sees both answers",
            "The opponent's log-prob per token of the human answer minus that of its own, in nats. Iteration by iteration "
            "it should move to 0: the model's own answers and the human's become equally likely.",
            answers,
            "nats per token",
            [],
            lambda found: found.margin,
        ),
        _figures(
            "means",
            "Mean lengths",
            "Tokens per answer that the iteration trains against.",
            runs,
            (
                ("spin/chosen_length", "human", "@human"),
                ("spin/rejected_length", "own", "@own"),
                ("spin/heldout_length", "own, held-out", "@third"),
            ),
            yaxis={"rangemode": "tozero"},
        ),
        _figures(
            "shares",
            "Answers without much to learn from",
            "Cut at their limit, saying nothing, or equal to the human's.",
            runs,
            (
                ("spin/truncated", "cut", "@own"),
                ("spin/empty", "empty", "@third"),
                ("spin/identical", "identical", "@human"),
            ),
            bars=True,
            yaxis={"tickformat": ".0%", "rangemode": "tozero"},
        ),
        _figures(
            "nll",
            "Held-out NLL after each iteration",
            "Nats per token of human answers that are not trained on; lower is better. Bars are two standard errors to "
            "either side. Iterations share their rows, so that a difference is known better than the bars say.",
            runs,
            (("eval_loss", "held-out NLL", "@human"),),
            bands={"eval_loss": "eval_loss_stderr"},
        ),
        _figures(
            "auc",
            "Held-out play: AUC",
            "How often the model finds a human answer likelier than one of its own; 0.5 means that they look alike to it. "
            "Bars are two standard errors to either side.",
            runs,
            (("spin/heldout_auc", "AUC", "@own"),),
            yaxis={"range": [0, 1.02]},
            level=0.5,
            bands={"spin/heldout_auc": "spin/heldout_auc_stderr"},
        ),
        _figures(
            "wins",
            "Head to head with the model before",
            "Share of held-out prompts whose human answer became likelier, and on which the own answer's length came "
            "nearer to the human's. Ties count half; 50% is a draw.",
            runs,
            (("spin/heldout_wins", "likelier", "@human"), ("spin/heldout_length_wins", "length", "@own")),
            yaxis={"range": [0, 1.02], "tickformat": ".0%"},
            level=0.5,
        ),
        _figures(
            "play",
            "Held-out play: margin",
            "Log-prob per token of human answers minus own ones under the iteration's model, in nats; best is 0.",
            runs,
            (("spin/heldout_margin", "margin", "@own"),),
            level=0.0,
        ),
        _figures(
            "distinct",
            "Held-out play: variety",
            "Distinct pairs of neighbouring tokens over all such pairs in the model's answers; a fall is the first sign "
            "of a collapse.",
            runs,
            (("spin/heldout_distinct_2", "distinct pairs", "@own"),),
            yaxis={"rangemode": "tozero"},
        ),
        _timings(runs),
    ]
    return [chart for chart in made if chart is not None]


Measure = Callable[[IterationAnswers], np.ndarray]


def _histogram(
    name: str,
    title: str,
    note: str,
    answers: Sequence[list[IterationAnswers]],
    unit: str,
    shared: Sequence[tuple[str, str, Measure]],
    measure: Measure,
) -> Chart | None:
    """Draws distributions over common bins: of each iteration, or, to compare, of each run's last one."""
    found = [of_run for of_run in answers if of_run]
    if not found:
        return None
    series = [(label, role, of(found[0][0])) for label, role, of in shared]
    if len(answers) == 1:
        of_run = found[0]
        series += [
            (f"iteration {one.iteration}", f"@shade{i}of{len(of_run)}", measure(one)) for i, one in enumerate(of_run)
        ]
    else:
        series += [
            (
                f"{html.escape(of_run[-1].run.name)}, iteration {of_run[-1].iteration}",
                f"@run{index}",
                measure(of_run[-1]),
            )
            for index, of_run in enumerate(answers)
            if of_run
        ]
    series = [(label, role, values) for label, role, values in series if len(values)]
    if not series:
        return None
    together = np.concatenate([values for _, _, values in series])
    low, high = np.percentile(together, [0, 100] if unit == "tokens" else [0.5, 99.5])
    bins = min(BINS, max(8, math.ceil(2 * max(len(values) for _, _, values in series) ** (1 / 3))))  # Rice's rule
    if unit == "tokens":  # bins of whole numbers
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low, high + width + 1, width) - 0.5
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    data = []
    for label, role, values in series:
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        shares = [0.0, *(short(count / len(values)) for count in counts), 0.0]
        x = [short(edge) for edge in (edges[0], *edges)]
        data.append({**LINE, "x": x, "y": shares, "name": label, "line": {"color": role, "shape": "hv"}})
    yaxis = {"tickformat": ".0%", "rangemode": "tozero"}
    layout: dict[str, Any] = {"xaxis": {"title": {"text": unit}}, "yaxis": yaxis, "shapes": []}
    if unit != "tokens" and low < 0 < high:
        layout["shapes"].append(line(x0=0, x1=0, y0=0, y1=1, yref="paper", color="@text", dash="dash"))
        note += " The outermost half percent lies in the first and last bin."
    return Chart(f"iteration-{name}", title, note, data, {**layout, "showlegend": len(data) > 1})


def _figures(
    name: str,
    title: str,
    note: str,
    runs: Sequence[RunData],
    metrics: Sequence[tuple[str, str, str]],
    bars: bool = False,
    yaxis: dict[str, Any] | None = None,
    level: float | None = None,
    bands: Mapping[str, str] | None = None,
) -> Chart | None:
    """Draws figures of `metrics.json` over iterations, the start model's first where they are known.

    Args:
        bands: The metric that is a metric's standard error.
    """
    data = []
    started = False
    for index, run in enumerate(runs):
        for order, (metric, label, role) in enumerate(metrics):
            models = {**({-1: start_figures(run.metrics[0])} if 0 in run.metrics else {}), **run.metrics}
            points = [(i, value) for i, row in models.items() if (value := number(row, metric)) is not None]
            if not points:
                continue
            started = started or points[0][0] < 0
            text, colour, dash = styled(runs, index, len(metrics), order, label, role)
            trace: dict[str, Any] = {"x": [i for i, _ in points], "y": [short(v) for _, v in points], "name": text}
            if bands and metric in bands:
                errors = [number(models[i], bands[metric]) for i, _ in points]
                around = [None if error is None else short(NOISE * error) for error in errors]
                trace["error_y"] = {"type": "data", "array": around, "color": colour, "thickness": 1, "width": 3}
            if bars and len(runs) == 1:
                trace.update(type="bar", marker={"color": colour})
            else:
                trace.update(type="scatter", mode="lines+markers", line={"color": colour, "dash": dash})
            data.append(trace)
    if not data:
        return None
    layout: dict[str, Any] = {
        "xaxis": _iteration_axis(runs, started),
        "yaxis": yaxis or {},
        "showlegend": len(data) > 1,
    }
    if level is not None:
        layout["shapes"] = [line(y0=level, y1=level, x0=0, x1=1, xref="paper", color="@text", dash="dash")]
    return Chart(f"iteration-{name}", title, note, data, layout)


def _iteration_axis(runs: Sequence[RunData], started: bool) -> dict[str, Any]:
    last = max(len(run.iterations) for run in runs) - 1
    axis = {"title": {"text": "iteration"}, "range": [-1.5 if started else -0.5, last + 0.5]}
    if not started:
        return {**axis, "dtick": max(1, last // 12)}
    shown = range(0, last + 1, max(1, last // 12))
    return {**axis, "tickvals": [-1, *shown], "ticktext": ["start", *map(str, shown)]}


_PHASES = (
    ("spin/generation_seconds", "generate", "@phase0"),
    ("spin/scoring_seconds", "score", "@phase1"),
    ("spin/training_seconds", "train", "@phase2"),
    ("spin/heldout_seconds", "held-out play", "@phase3"),
)


def _timings(runs: Sequence[RunData]) -> Chart | None:
    """Draws where the time went, a bar for each iteration; for each run side by side where there are several."""
    longest = max(
        (number(f, name) or 0.0 for run in runs for f in run.metrics.values() for name, _, _ in _PHASES), default=0
    )
    unit, scale = ("hours", 3600.0) if longest >= 7200 else ("minutes", 60.0) if longest >= 180 else ("seconds", 1.0)
    data = []
    bars = [
        (run, iteration)
        for iteration in sorted({i for run in runs for i in run.metrics})
        for run in runs
        if iteration in run.metrics
    ]
    for metric, label, role in _PHASES:
        seconds = [number(run.metrics[iteration], metric) for run, iteration in bars]
        if not any(seconds):
            continue
        if len(runs) == 1:
            x: list[Any] = [f"iteration {iteration}" for _, iteration in bars]
        else:
            x = [[f"iteration {iteration}" for _, iteration in bars], [html.escape(run.name) for run, _ in bars]]
        y = [None if value is None else short(value / scale) for value in seconds]
        data.append({"type": "bar", "x": x, "y": y, "name": label, "marker": {"color": role}})
    if not data:
        return None
    layout = {
        "barmode": "stack",
        "yaxis": {"title": {"text": unit}},
        "xaxis": {"title": {"text": ""}},
        "showlegend": True,
    }
    return Chart("iteration-timings", "Where the time went", "Wall time of each phase.", data, layout)
