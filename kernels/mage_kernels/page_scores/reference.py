"""Quest's bounds and scores in plain PyTorch; see `mage_kernels.page_scores`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def update_pages(low: Tensor, high: Tensor, key: Tensor, lengths: Tensor, page: int, added: int) -> None:
    """All bounds anew; those that new keys cannot have changed keep their old values."""
    capacity, pages = key.shape[-2], low.shape[-2]
    padded = F.pad(key, (0, 0, 0, pages * page - capacity)).unflatten(-2, (pages, page))
    position = torch.arange(pages * page, device=key.device).view(pages, page)
    is_hidden = (position >= lengths[:, None, None])[:, None, :, :, None]  # (batch, 1, pages, page, 1)
    first = position[:, :1]
    is_due = (first + page > (lengths - added)[:, None, None]) & (first < lengths[:, None, None])
    is_due = is_due[:, None]  # (batch, 1, pages, 1)
    low.copy_(torch.where(is_due, padded.masked_fill(is_hidden, float("inf")).amin(-2), low))
    high.copy_(torch.where(is_due, padded.masked_fill(is_hidden, float("-inf")).amax(-2), high))


def page_scores(query: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page: int, form: str) -> Tensor:
    """The three forms of the same number."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, low, high = query.to(dtype), low.to(dtype), high.to(dtype)
    if form == "rows":
        by_row = [torch.maximum(row * high, row * low).sum(-1) for row in query.split(1, dim=-2)]
        score = torch.stack(by_row).mean(0)
    else:
        up, down = query.clamp(min=0), query.clamp(max=0)
        if form == "mean":
            up, down = up.mean(-2, keepdim=True), down.mean(-2, keepdim=True)
        score = (up @ high.transpose(-1, -2) + down @ low.transpose(-1, -2)).mean(-2)
    first = torch.arange(low.shape[-2], device=low.device) * page
    return score.masked_fill(first >= lengths[:, None, None], float("-inf"))
