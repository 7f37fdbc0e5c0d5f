"""One training row before noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """Token ids and how much each counts in the loss.

    `row` is the row's number in the run's fixed schedule (not in its source): noise is drawn from (seed, row), so a
    resumed run sees the same noise as an uninterrupted one, on any number of workers and GPUs.
    """

    row: int
    input_ids: np.ndarray
    """(n,) int64, n <= data.length; not yet filled to whole blocks."""
    loss_weight: np.ndarray
    """(n,) float32; 0 marks prompt tokens, which are neither noised nor trained."""
