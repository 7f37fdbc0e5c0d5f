"""Means with honest intervals over independent units (windows, questions), single and paired.

Measurements get a percentile bootstrap. Yes-or-no outcomes (bool) do not, because sixteen right answers of sixteen
would get an interval of no width: a share gets Wilson's interval, a paired difference of shares Bonett and Price's
(2012, adjusted Wald).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
Z = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over `n` units."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Paired(Estimate):
    """A mean difference with its paired interval, and on how many units it was better, the same, or worse."""

    wins: int
    ties: int
    losses: int


def unit_means(values: Sequence[float], units: Sequence[int]) -> np.ndarray:
    """Mean of the values of each unit, in order of the unit's number: blocks of one window are not independent."""
    numbers = np.asarray(units)
    return np.array([np.asarray(values)[numbers == unit].mean() for unit in np.unique(numbers)])


def estimate(per_unit: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean of independent values with its interval: bootstrap, or Wilson's for bool.

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(per_unit)
    if values.size == 0:
        raise ValueError("no measurements to average")
    if values.dtype == bool:
        return _wilson(values)
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def paired_difference(
    after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray, seed: int = 0
) -> Estimate:
    """after - before on the same units, with its paired interval: bootstrap, or Bonett and Price's for bool.

    Raises:
        ValueError: the two do not have the same units.
    """
    one, other = np.asarray(after), np.asarray(before)
    if len(one) != len(other):
        raise ValueError(f"not paired: {len(one)} measurements against {len(other)}")
    if one.dtype == other.dtype == bool and one.size:
        return _bonett_price(one, other)
    return estimate(one.astype(np.float64) - other, seed)


def paired(
    after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray, *, higher_is_better: bool, seed: int = 0
) -> Paired:
    """`paired_difference` with wins, ties and losses of `after`, unit by unit.

    Raises:
        ValueError: the two do not have the same units.
    """
    found = paired_difference(after, before, seed)
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    up, down = int((change > 0).sum()), int((change < 0).sum())
    wins, losses = (up, down) if higher_is_better else (down, up)
    return Paired(found.mean, found.low, found.high, found.n, wins, len(change) - up - down, losses)


def _wilson(is_right: np.ndarray) -> Estimate:
    n, share = len(is_right), float(is_right.mean())
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0), n)


def _bonett_price(after: np.ndarray, before: np.ndarray) -> Estimate:
    n = len(after)
    won, lost = float((after & ~before).sum()), float((before & ~after).sum())
    gain, loss = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((gain + loss - (gain - loss) ** 2) / (n + 2))
    return Estimate((won - lost) / n, max(gain - loss - half, -1.0), min(gain - loss + half, 1.0), n)
