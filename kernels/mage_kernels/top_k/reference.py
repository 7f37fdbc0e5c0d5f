"""Top-k by a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(
    score: Tensor,
    k: int,
    lengths: Tensor,
    page: int,
    sinks: int,
    recent: int,
    groups: tuple[Tensor, Tensor, int] | None,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mage_kernels.top_k.top_k`."""
    slots = score.shape[-1]
    entry = torch.arange(slots, device=score.device).expand_as(score)
    is_meant = torch.ones_like(entry, dtype=torch.bool)
    if groups is not None:
        index, count, size = groups
        is_meant = entry // size < count[..., None]
        entry = index.gather(-1, entry // size).long() * size + entry % size
    lengths = (lengths[:, None] if lengths.dim() == 1 else lengths)[..., None]
    first = entry * page
    is_valid = is_meant & (first < lengths)
    is_forced = is_valid & ((first < sinks) | ((first + page > lengths - recent) & (recent > 0)))
    # Three classes, each by score, then by position: stable sorts from the least important criterion to the first.
    by_score = torch.where(is_forced, 0.0, score).sort(dim=-1, descending=True, stable=True).indices
    rank = is_forced.int() * 2 + is_valid.int()
    by_class = rank.gather(-1, by_score).sort(dim=-1, descending=True, stable=True).indices
    best = by_score.gather(-1, by_class)[..., :k]
    wanted = torch.arange(best.shape[-1], device=score.device) < (k if most is None else most[..., None])
    is_chosen = torch.zeros_like(is_valid).scatter(-1, best, wanted.expand_as(best)) & is_valid
    last = torch.iinfo(torch.int64).max
    position = torch.where(is_chosen, entry, last).sort(dim=-1).values[..., :k]
    position = torch.nn.functional.pad(position, (0, max(0, k - slots)), value=last)
    on_merit, left = is_chosen & ~is_forced, is_valid & ~is_chosen
    return (
        position.where(position < last, 0).int(),
        is_chosen.sum(-1, dtype=torch.int32),
        score.masked_fill(~on_merit, float("inf")).amin(-1),
        score.masked_fill(is_forced, float("inf")).masked_fill(~left, float("-inf")).amax(-1),
    )
