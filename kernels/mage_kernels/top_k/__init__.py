"""The k best entries of many rows of scores at once, in ascending order of position.

Deterministic: of equal scores the lower position wins. Sinks (the first keys) and a recent window (the last ones) can
be forced in; they count towards k. Rows with fewer entries keep them all. Also says how close the call was, which tells
whether a choice made from a shortlist is the choice from everything (`key_scores`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.layout import check_counts
from mage_kernels.top_k import reference

MAX_WIDTH = 32768
"""Entries of a row that one program of the Triton kernel holds."""


@dataclass(frozen=True)
class Chosen:
    """The best entries of every row; shapes are those of the scores without their last dimension, plus k."""

    index: Tensor
    """(..., k) int32, ascending; 0 where nothing is chosen, which is at the end."""
    count: Tensor
    """(...) int32: how many are chosen, at most k."""
    worst_chosen: Tensor
    """(...) float32: lowest score among those chosen on merit, not forced; +inf if there is none."""
    best_left: Tensor
    """(...) float32: highest score among those not chosen; -inf if there is none, +inf if a forced one did not fit."""


def top_k(
    score: Tensor,
    k: int,
    lengths: Tensor,
    *,
    page: int = 1,
    sinks: int = 0,
    recent: int = 0,
    groups: tuple[Tensor, Tensor, int] | None = None,
    most: Tensor | None = None,
    impl: str = "auto",
) -> Chosen:
    """The k best of the valid entries of each row.

    Args:
        score: (..., batch, KV heads, N) float32, contiguous, no NaN; an entry is a key, or a page (tile) of keys.
        k: entries to choose, 1 or more; Triton needs k * ceil(N / 32768) <= 32768 (all reasonable budgets).
        lengths: int32 *keys* that are valid, on the device: (batch,), or one for each row, (..., batch, KV heads).
        page: keys per entry; a page is valid if one of its keys is.
        sinks, recent: pages that hold one of the first `sinks` or last `recent` valid keys are chosen whatever their
            score. Where there are more of them than k, the first win.
        groups: (index, count, size) where `score` holds not all entries but those of some groups of `size` in a row:
            index (..., S) int32 ascending group numbers, of which the first count (...) int32 are meant, and N is
            S * size; slot s * size + j scores entry index[s] * size + j. What is chosen are entries, as without.
        most: (...) int32 for each row: entries to choose there, 1 to k; k in all of them without.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "top_k"
    if score.dim() < 3 or score.dtype != torch.float32 or not score.is_contiguous():
        raise ValueError(
            f"{op}: score must be contiguous float32 (..., batch, KV heads, N), got {score.dtype} "
            f"{tuple(score.shape)} with strides {score.stride()}"
        )
    if k < 1 or page < 1 or sinks < 0 or recent < 0:
        raise ValueError(f"{op}: k {k} and page {page} must be positive, sinks {sinks}, recent {recent} not negative")
    rows = tuple(score.shape[:-1])
    check_counts(op, "lengths", lengths, rows[-2:-1] if lengths.dim() == 1 else rows)
    if most is not None:
        check_counts(op, "most", most, rows)
    limit = None
    if groups is not None:
        index, count, size = groups
        check_counts(op, "groups[0]", index, (*rows, score.shape[-1] // size))
        check_counts(op, "groups[1]", count, rows)
        limit = f"{score.shape[-1]} entries in groups are over {MAX_WIDTH}" if score.shape[-1] > MAX_WIDTH else None
    elif k * -(-score.shape[-1] // MAX_WIDTH) > MAX_WIDTH:
        limit = f"k {k} is too large for rows of {score.shape[-1]} entries"
    if not choose(op, impl, score, lengths, limit=limit):
        return Chosen(*reference.top_k(score, k, lengths, page, sinks, recent, groups, most))
    from mage_kernels.top_k import triton

    return Chosen(*triton.top_k(score, k, lengths, page, sinks, recent, *(groups or (None, None, 0)), most))
