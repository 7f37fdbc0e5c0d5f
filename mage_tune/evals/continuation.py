"""Copying and going on: what a model writes after a passage that it has seen before, and after plain text.

    copy      a window whose last block repeats one from its middle; what came after that is to be written again
    continue  a window less its last block; nothing is right or wrong, but the true block's cross-entropy under exact
              attention and the forwards per block say how sure the model went on

Copying is what a sparse step loses first: every token written needs its own key, and no single needle does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CopyPrompt:
    """A text whose last block repeats an earlier one, and how it went on there."""

    input_ids: np.ndarray
    continuation: np.ndarray


def copy_prompt(window: np.ndarray, size: int, rng: np.random.Generator) -> CopyPrompt:
    """A window that ends in a block from its middle, for what came after that to be written again."""
    start = int(rng.integers(len(window) // 8, len(window) * 5 // 8))
    passage = window[start : start + 2 * size].astype(np.int64)
    return CopyPrompt(np.concatenate([window[: -2 * size].astype(np.int64), passage[:size]]), passage[size:])
