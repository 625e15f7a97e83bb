"""The rule by which the best iteration is told: standard errors decide, and a difference within noise is none.

The lead goes to the first iteration, and from it to one whose figure is better than the leader's by more than two
standard errors of the difference. Of iterations whose difference is within noise the earliest leads: it was trained least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from axolotl_spin.data.spread import Spread, stderr_of_difference

# standard errors of a difference beyond which it is none of chance: 95% of what chance alone gives lies within
NOISE = 2.0
START = "start"


@dataclass(frozen=True)
class Figure:
    """What a model reached by the figure that selects.

    Attributes:
        value: The figure; None where there is none, or it is no number.
        stderr: Its standard error; None where it is not known.
        spread: What each row moves it by, for paired comparison; None where it is not known.
    """

    value: float | None = None
    stderr: float | None = None
    spread: Spread | None = None

    @property
    def known(self) -> bool:
        return self.value is not None and math.isfinite(self.value)


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another.

    Attributes:
        gain: By how much; negative where it is worse.
        stderr: Standard error of that; None where it is not known.
        paired: Whether it was taken row by row.
    """

    gain: float
    stderr: float | None
    paired: bool

    @property
    def verdict(self) -> str:
        """`better`, `noise` or `worse`; without a standard error any difference counts."""
        band = NOISE * (self.stderr or 0.0)
        return "better" if self.gain > band else "worse" if self.gain < -band else "noise"

    def __str__(self) -> str:
        if self.stderr is None:
            return f"{abs(self.gain):.4f} (no standard error is known)"
        return f"{abs(self.gain):.4f} ± {self.stderr:.4f}"


def compare(new: Figure, old: Figure, lower: bool) -> Difference:
    """Compares two models.

    Args:
        new: Of the model in question; known.
        old: Of the one that it is compared with; known.
        lower: Whether less is better.
    """
    assert new.value is not None and old.value is not None
    gain = (old.value - new.value) if lower else (new.value - old.value)
    if new.spread is not None and old.spread is not None:
        stderr = stderr_of_difference(new.spread, old.spread)
        if stderr is not None:
            return Difference(gain, stderr, paired=True)
    known = new.stderr is not None and old.stderr is not None
    return Difference(gain, math.hypot(new.stderr, old.stderr) if known else None, paired=False)  # type: ignore[arg-type]


@dataclass
class Judged:
    """An iteration beside the best model before it, the start model included.

    Attributes:
        iteration: The iteration.
        figure: What it reached.
        verdict: `first`, `better`, `noise`, `worse`, or `missing` where it has no figure.
        against: The iteration that it is compared with, or `start`; None with nothing before it.
        difference: To that one.
    """

    iteration: int
    figure: Figure
    verdict: str
    against: int | str | None = None
    difference: Difference | None = None

    @property
    def better(self) -> bool:
        """Whether it is better than all before it, beyond noise."""
        return self.verdict in ("first", "better")


@dataclass
class Standing:
    """Which of a run's iterations is the best, and why.

    Attributes:
        select: The figure.
        lower: Whether less is better.
        best: The best iteration; None where none has a figure.
        judged: Each iteration, in order.
        start: The start model's figure.
        over_start: The best iteration's difference to the start model; None where the start's figure is not known.
        rivals: Iterations whose figure is nominally better than the best one's, and by how much: within noise.
        no_better: Iterations in a row, at the end, that are no better than what was there before.
        patience: `spin.patience`.
    """

    select: str
    lower: bool
    best: int | None
    judged: list[Judged]
    start: Figure
    over_start: Difference | None = None
    rivals: dict[int, Difference] = field(default_factory=dict)
    no_better: int = 0
    patience: int | None = None

    @property
    def ended(self) -> bool:
        """Whether `spin.patience` ends the run here."""
        return self.patience is not None and self.no_better >= self.patience

    @property
    def why_ended(self) -> str:
        """Why the run ended, in words."""
        which = "the last iteration was" if self.no_better == 1 else f"the last {self.no_better} iterations were"
        return f"{which} no better by `{self.select}` than what was there before (`spin.patience: {self.patience}`)"

    def lines(self) -> list[str]:
        """Returns what there is to say, in sentences without a stop."""
        sense = "its distance from 0.5; " if self.select == "heldout_auc" else ""
        named = f"`{self.select}` ({sense}{'lower' if self.lower else 'higher'} is better)"
        if self.best is None:
            return [f"no iteration has a figure of {named}, so none is the best"]
        figure = self.judged[self.best].figure
        spread = "" if figure.stderr is None else f" ± {figure.stderr:.4f}"
        found = [f"best by {named}: iteration {self.best}, {figure.value:.4f}{spread}"]
        if self.over_start is not None:
            kind, side = self.over_start.verdict, "ahead of it" if self.over_start.gain > 0 else "behind it"
            none = "no iteration is better than the start model"
            if kind == "better":
                found[0] += f"; better than the start model by {self.over_start}"
            elif kind == "worse":
                found.append(f"{none}: iteration {self.best} is worse by {self.over_start}")
            else:
                found.append(f"{none}: iteration {self.best} is {side} by {self.over_start}, which is noise")
        for iteration, difference in self.rivals.items():
            found.append(f"iteration {iteration} is ahead by {difference}, which is noise: the earlier one leads")
        missing = [str(one.iteration) for one in self.judged if one.verdict == "missing"]
        if missing:
            found.append(f"iteration {', '.join(missing)} has no figure, which counts as no better")
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `best.json`, without what was done with it."""
        return {
            "select": self.select,
            "lower_is_better": self.lower,
            "best": self.best,
            "start": _plain(self.start) if self.start.known else None,
            "over_start": _plain_difference(self.over_start),
            "iterations": [
                {
                    "iteration": one.iteration,
                    **_plain(one.figure),
                    "verdict": one.verdict,
                    "against": one.against,
                    **(_plain_difference(one.difference) or {}),
                }
                for one in self.judged
            ],
            "no_better": self.no_better,
            "ended": self.why_ended if self.ended else None,
            "says": self.lines(),
        }


def _plain(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value if figure.known else None, "stderr": figure.stderr}


def _plain_difference(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {"gain": difference.gain, "gain_stderr": difference.stderr, "paired": difference.paired}


def judge(
    select: str, figures: Sequence[Figure], start: Figure, *, lower: bool, patience: int | None = None
) -> Standing:
    """Tells which iteration is the best.

    Args:
        select: The figure's name.
        figures: Of each iteration, in order.
        start: The start model's. It may be what no iteration surpasses, but it is never the best iteration.
        lower: Whether less is better.
        patience: `spin.patience`.
    """
    judged: list[Judged] = []
    bar: tuple[int | str, Figure] | None = (START, start) if start.known else None
    best: int | None = None
    no_better = 0
    for iteration, figure in enumerate(figures):
        one = Judged(iteration, figure, "missing")
        if figure.known:
            if bar is None:
                one.verdict = "first"
            else:
                one.against, one.difference = bar[0], compare(figure, bar[1], lower)
                one.verdict = one.difference.verdict
            if one.better:
                bar = (iteration, figure)
            best = iteration if best is None else best
        no_better = 0 if one.better else no_better + 1
        judged.append(one)
    # up to one that none surpasses: each is better than the one before, so this ends
    while best is not None and (ahead := _ahead(figures, best, lower)):
        best = ahead[0]
    standing = Standing(select, lower, best, judged, start, no_better=no_better, patience=patience)
    if best is not None:
        standing.over_start = compare(figures[best], start, lower) if start.known else None
        others = {i: compare(one, figures[best], lower) for i, one in enumerate(figures) if one.known}
        standing.rivals = {i: other for i, other in others.items() if i != best and other.gain > 0}
    return standing


def _ahead(figures: Sequence[Figure], leader: int, lower: bool) -> list[int]:
    """Returns the iterations that are better than a leader, beyond noise."""
    return [
        iteration
        for iteration, figure in enumerate(figures)
        if figure.known and compare(figure, figures[leader], lower).verdict == "better"
    ]
