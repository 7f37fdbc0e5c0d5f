"""Means with honest intervals: paired bootstrap over independent units (windows, questions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval over `n` units."""

    mean: float
    low: float
    high: float
    n: int


def unit_means(values: Sequence[float], units: Sequence[int]) -> np.ndarray:
    """Mean of the values of each unit, in order of the unit's number: blocks of one window are not independent."""
    numbers = np.asarray(units)
    return np.array([np.asarray(values)[numbers == unit].mean() for unit in np.unique(numbers)])


def estimate(per_unit: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """Mean and percentile-bootstrap interval of independent values.

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(per_unit, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no measurements to average")
    draws = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def paired_difference(after: Sequence[float], before: Sequence[float], seed: int = 0) -> Estimate:
    """after - before on the same units, with the paired bootstrap interval.

    Raises:
        ValueError: the two do not have the same units.
    """
    if len(after) != len(before):
        raise ValueError(f"not paired: {len(after)} measurements against {len(before)}")
    return estimate(np.asarray(after) - np.asarray(before), seed)
