"""Held-out figures with what each row moves them by, from which standard errors follow, also those of differences.

A figure's influence values say, for each row, how far the figure moves with it: their mean is 0, and the figure's variance
is that of their mean (the infinitesimal jackknife; Efron 1982, "The Jackknife, the Bootstrap and Other Resampling Plans").
Two models that were measured on the same rows share what makes a row hard, and the difference of their influence values is
rid of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """A figure over rows.

    Attributes:
        value: The figure.
        influence: (rows,) what each row moves it by, in the figure's unit; the mean is 0.
        keys: (rows,) int64, what tells rows apart; rows with the same content may share one.
    """

    value: float
    influence: np.ndarray
    keys: np.ndarray

    @property
    def stderr(self) -> float | None:
        """The standard error; None where rows tell none: fewer than two, or an AUC of 0 or 1, which no row moves."""
        return _stderr(self.influence) or None


def nll_per_token(nll: np.ndarray, tokens: np.ndarray, keys: np.ndarray) -> Spread:
    """Returns the NLL per token over rows: the ratio of two sums, linearised (Cochran 1977, "Sampling Techniques", ch. 6).

    Args:
        nll: (rows,) sums over a row's tokens, in nats.
        tokens: (rows,) how many those are; at least one in all.
        keys: (rows,) see `Spread`.
    """
    total = tokens.sum()
    value = float(nll.sum() / total)
    return Spread(value, (nll - value * tokens) * (len(nll) / total), keys)


def auc_spread(human: np.ndarray, own: np.ndarray, answered: np.ndarray | None = None) -> Spread:
    """Returns how often a human answer's value exceeds an own answer's, with what each prompt moves that by.

    The structural components are those of DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44). Both answers to a prompt
    depend on it, so their components are added up prompt by prompt before the variance is taken, as Obuchowski 1997
    (Biometrics 53) does for clustered data.

    Args:
        human: (prompts,) log-probs in nats per token.
        own: (prompts,) likewise.
        answered: (prompts,) those that count; all by default.
    """
    count = len(human)
    answered = np.ones(count, dtype=bool) if answered is None else answered
    human, own = human[answered], own[answered]
    above = _above(human, np.sort(own))  # (answered,) share of own answers below each human one
    below = 1.0 - _above(own, np.sort(human))  # share of human answers above each own one
    value = float(above.mean())
    influence = np.zeros(count)
    influence[answered] = (above + below - 2 * value) * (count / len(human))
    return Spread(value, influence, np.arange(count))


def auc(human: np.ndarray, own: np.ndarray) -> float:
    """Returns how often a human answer's value exceeds an own answer's, over all pairs of the two; a tie counts half.

    Args:
        human: (answers,) log-probs in nats per token.
        own: (answers,) likewise.
    """
    return float(_above(human, np.sort(own)).mean())


def distance_from_half(spread: Spread) -> Spread:
    """Returns how far a share lies from 0.5, to either side."""
    side = math.copysign(1.0, spread.value - 0.5)
    return Spread(abs(spread.value - 0.5), side * spread.influence, spread.keys)


def stderr_of_difference(one: Spread, other: Spread) -> float | None:
    """Returns the standard error of the difference of two models' figures on the same rows, row by row.

    Args:
        one: A figure.
        other: The same figure of another model; rows may stand in another order.

    Returns:
        None where the two are not of the same rows, or of fewer than two.
    """
    orders = [np.argsort(spread.keys, kind="stable") for spread in (one, other)]
    if not np.array_equal(one.keys[orders[0]], other.keys[orders[1]]):
        return None
    return _stderr(one.influence[orders[0]] - other.influence[orders[1]])


def _above(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Returns the share of ordered numbers that lie below each value; ties count half."""
    below = np.searchsorted(ordered, values, side="left")
    not_above = np.searchsorted(ordered, values, side="right")
    return (below + not_above) / (2 * len(ordered))


def _stderr(influence: np.ndarray) -> float | None:
    count = len(influence)
    return math.sqrt(float((influence**2).sum()) / (count * (count - 1))) if count > 1 else None
