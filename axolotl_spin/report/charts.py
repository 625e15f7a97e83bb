"""The charts of a report over steps, as Plotly figures in plain JSON.

A colour is named by its role (`@human`, `@own`, `@run0`, ...) and takes its value from the page's theme, so that charts
follow light and dark. A chart shows the metrics of one run, each in a colour of its own; or, to compare, those of several
runs, each run in a colour of its own and a second metric dotted.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_spin.report.reading import RunData, number
from axolotl_spin.settings.spin import LOSS_AT_START

# points of a metric's curves over all runs; of more rows, each point is the mean of several
POINTS = 1200

LINE = {"type": "scatter", "mode": "lines"}


@dataclass
class Chart:
    """A chart of the page.

    Attributes:
        name: Identifies it in the page.
        title: Above it.
        note: Below it: how to read it.
        data: Plotly's traces.
        layout: Plotly's layout, without what all charts share.
    """

    name: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns what the page draws, as plain JSON."""
        return {"name": self.name, "data": self.data, "layout": self.layout}


@dataclass(frozen=True)
class Curve:
    """A chart over steps: its name, title and note, and each line's metric, label and colour."""

    name: str
    title: str
    note: str
    lines: tuple[tuple[str, str, str], ...]


_CURVES = (
    Curve(
        "loss",
        "Loss",
        "Starts each iteration at the dashed line, where policy and opponent are one model. It falls as human and own "
        "answers are told apart, and cannot be compared between iterations.",
        (("loss", "loss", "@own"),),
    ),
    Curve(
        "accuracy",
        "Accuracy",
        "Share of the pairs in which the human answer gained more than the opponent's.",
        (("rewards/accuracies", "accuracy", "@own"),),
    ),
    Curve(
        "margin",
        "Margin",
        "Reward of the human answer minus that of the opponent's.",
        (("rewards/margins", "margin", "@own"),),
    ),
    Curve(
        "rewards",
        "Rewards",
        "Beta times the change of an answer's log-prob since the iteration's start, per token where rewards are "
        "length-normalized. Best is a human curve that rises; where both fall, the model forgets human answers too, only "
        "more slowly than its own.",
        (("rewards/chosen", "human", "@human"), ("rewards/rejected", "own", "@own")),
    ),
    Curve(
        "logps",
        "Log-probs",
        "Under the policy, summed over an answer's tokens, in nats. Longer answers have lower ones.",
        (("logps/chosen", "human", "@human"), ("logps/rejected", "own", "@own")),
    ),
    Curve(
        "rate",
        "Learning rate",
        "Warmup and decay start again with each iteration.",
        (("learning_rate", "learning rate", "@own"),),
    ),
    Curve("gradient", "Gradient norm", "Before clipping.", (("grad_norm", "gradient norm", "@own"),)),
    Curve(
        "heldout",
        "Held-out NLL",
        "Nats per token of human answers that are not trained on; lower is better.",
        (("eval_loss", "held-out NLL", "@human"),),
    ),
)


def curves(runs: Sequence[RunData]) -> list[Chart]:
    """Draws what was logged, over optimizer steps; a chart without anything to draw is left out.

    Args:
        runs: One, or several to compare.
    """
    return [chart for curve in _CURVES if (chart := _curve(curve, runs)) is not None]


def _curve(curve: Curve, runs: Sequence[RunData]) -> Chart | None:
    data, note = [], curve.note
    if curve.name == "loss" and any(run.sft_weight for run in runs):
        note = f"{note} With `spin.sft_weight` its part is in it: so many times the NLL per token of the human answers."
    for index, run in enumerate(runs):
        for order, (metric, label, role) in enumerate(curve.lines):
            x, y, of = _points(run, metric, max(100, POINTS // len(runs)))
            if not x:
                continue
            name, colour, dash = styled(runs, index, len(curve.lines), order, label, role)
            mode = "lines+markers" if len(x) < 40 or metric == "eval_loss" else "lines"
            data.append({**LINE, "mode": mode, "x": x, "y": y, "name": name, "line": {"color": colour, "dash": dash}})
            if of > 1 and "the mean of" not in note:
                note += f" Each point is the mean of up to {of} logged rows."
    if not data:
        return None
    layout: dict[str, Any] = {"xaxis": {"title": {"text": "step"}}, "yaxis": {}, **_borders(runs)}
    layout["showlegend"] = len(data) > 1
    if curve.name == "loss":
        _level_of_the_loss(layout, runs)
    elif curve.name == "accuracy":
        layout["yaxis"] = {"range": [-0.02, 1.04], "tickformat": ".0%"}
    elif curve.name == "rate":
        layout["yaxis"] = {"tickformat": ".1e", "rangemode": "tozero"}
    return Chart(f"curve-{curve.name}", curve.title, note, data, layout)


def _level_of_the_loss(layout: dict[str, Any], runs: Sequence[RunData]) -> None:
    """Marks the loss of two equal models, where all runs have the same."""
    levels = {LOSS_AT_START.get(run.loss_type, math.log(2.0)) for run in runs}
    if len(levels) > 1 or any(run.sft_weight for run in runs):
        return
    level = levels.pop()
    text = {math.log(2.0): "ln 2", 2 * math.log(2.0): "2 ln 2"}.get(level, f"{level:g}")
    layout["shapes"].append(line(y0=level, y1=level, x0=0, x1=1, xref="paper", color="@text", dash="dash"))
    layout["annotations"].append(label_at(text, x=1, xref="paper", xanchor="right", y=level, yanchor="bottom"))


def styled(runs: Sequence[RunData], index: int, lines: int, order: int, label: str, role: str) -> tuple[str, str, str]:
    """Returns a line's name, colour and dash.

    Args:
        runs: One, or several to compare.
        index: The line's run.
        lines: How many lines the chart has for each run.
        order: Which of these it is.
        label: Its metric, in words.
        role: Its colour where there is one run.
    """
    if len(runs) == 1:
        return label, role, "solid"
    name = html.escape(runs[index].name)  # Plotly takes some HTML
    return (f"{name}: {label}" if lines > 1 else name), f"@run{index}", ("solid", "dot", "dash")[order % 3]


def _points(run: RunData, metric: str, most: int) -> tuple[list[float], list[float], int]:
    """Returns steps and values, each the mean of so many rows; a gap between iterations, whose curves start anew."""
    x: list[float | None] = []
    y: list[float | None] = []
    if metric == "eval_loss":
        rows = [row for row in run.rows if number(row, metric) is not None and isinstance(row.get("step"), int)]
        parts = [list({row["step"]: row for row in rows}.values())]
    else:
        parts = [[row for row in rows if number(row, metric) is not None] for rows in run.training.values()]
    of = max(1, math.ceil(sum(map(len, parts)) / most))
    for rows in parts:
        if x and rows:
            x.append(None)
            y.append(None)
        for start in range(0, len(rows), of):
            some = rows[start : start + of]
            x.append(short(sum(row["step"] for row in some) / len(some)))
            y.append(short(sum(row[metric] for row in some) / len(some)))
    return x, y, of  # type: ignore[return-value]


def short(value: float) -> float:
    """Returns a value with six digits, which no screen shows more of."""
    return float(f"{value:.6g}")


def _borders(runs: Sequence[RunData]) -> dict[str, Any]:
    """Returns a line where each iteration starts, and its name; nothing where runs have other borders."""
    layout: dict[str, Any] = {"shapes": [], "annotations": []}
    entries = runs[0].iterations
    if len({tuple(entry.first_step for entry in run.iterations) for run in runs}) > 1:
        return layout
    for entry in entries:
        if entry.first_step:
            x = entry.first_step + 0.5
            layout["shapes"].append(line(x0=x, x1=x, y0=0, y1=1, yref="paper", color="@muted", dash="dot"))
        if len(entries) > 1:
            x = entry.first_step + entry.steps / 2
            text = f"iteration {entry.iteration}" if len(entries) <= 4 else str(entry.iteration)
            layout["annotations"].append(label_at(text, x=x, y=1, yref="paper", yanchor="bottom"))
    layout["xaxis_range"] = [0, runs[0].total_steps + 1]
    return layout


def line(color: str, dash: str, **place: Any) -> dict[str, Any]:
    """Returns a straight line behind the curves."""
    return {"type": "line", "layer": "below", "line": {"width": 1, "color": color, "dash": dash}, **place}


def label_at(text: str, **place: Any) -> dict[str, Any]:
    """Returns a small text in a chart."""
    return {"text": text, "showarrow": False, "font": {"size": 11, "color": "@muted"}, **place}
