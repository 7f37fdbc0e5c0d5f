"""Which cached keys a block cares for: the scores and the choice every selection rule is made of.

Pure functions of tensors. A block has no causal mask inside, so the G query heads that share a KV head and the B
positions of the block form R = G * B packed rows against that head's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Scores are ranked, so half precision would tie them; float64 is kept for tests that compare devices."""
    return x if x.dtype == torch.float64 else x.float()


def packed_rows(query: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """(batch, query heads, n, D) -> (batch, KV heads, blocks, R, D), rows ordered by query head, then position."""
    batch, num_heads, length, head_dim = query.shape
    group, blocks = num_heads // num_kv_heads, length // block_size
    rows = query.reshape(batch, num_kv_heads, group, blocks, block_size, head_dim)
    return rows.transpose(2, 3).reshape(batch, num_kv_heads, blocks, group * block_size, head_dim)


def unpacked_rows(rows: Tensor, num_heads: int, block_size: int) -> Tensor:
    """The inverse of `packed_rows`: (batch, KV heads, blocks, R, D) -> (batch, query heads, n, D)."""
    batch, num_kv_heads, blocks, _, head_dim = rows.shape
    group = num_heads // num_kv_heads
    query = rows.reshape(batch, num_kv_heads, blocks, group, block_size, head_dim).transpose(2, 3)
    return query.reshape(batch, num_heads, blocks * block_size, head_dim)


def prefix_visible(block: Tensor, length: int, block_size: int, first: Tensor | None = None) -> Tensor:
    """(..., length) bool: clean positions strictly before each block of `block` (any shape, block numbers).

    `first`, of the same shape, is the first block of each one's document, where a row holds several.
    """
    position = torch.arange(length, device=block.device)
    is_before = position < (block * block_size)[..., None]
    return is_before if first is None else is_before & (position >= (first * block_size)[..., None])


def mean_probability(rows: Tensor, key: Tensor, visible: Tensor, scaling: float, *, compiled: bool = False) -> Tensor:
    """MAGE v2's score: softmax over the visible keys, averaged over the packed rows of a KV head.

    Args:
        rows: (batch, KV heads, blocks, R, D) queries.
        key: (batch, KV heads, N, D).
        visible: bool, broadcastable to (batch, 1, blocks, N); a block that sees nothing gets zeros.
        scaling: factor on the logits, 1 / sqrt(D).
        compiled: on a GPU, few passes over the logits by kernels compiled for every shape: for training rows, whose
            shapes are few.

    Returns:
        (batch, KV heads, blocks, N) float32, summing to 1 over N (0 where nothing is visible).
    """
    logits = torch.einsum("bhjrd,bhnd->bhjrn", rows, key)
    mean = _compiled_mean_softmax() if compiled and logits.is_cuda else mean_softmax
    return mean(logits, visible, scaling)


def mean_softmax(logits: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """`mean_probability` from the logits (batch, KV heads, blocks, R, N) before their scaling."""
    wide = (at_least_float32(logits) * scaling).masked_fill(~visible.unsqueeze(-2), float("-inf"))
    return wide.softmax(dim=-1).nan_to_num(0.0).mean(dim=-2)


@cache
def _compiled_mean_softmax() -> Callable[[Tensor, Tensor, float], Tensor]:
    return torch.compile(mean_softmax, dynamic=False)


def top_keys(score: Tensor, budget: int, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The `budget` best visible keys of each block, ascending by position.

    Args:
        score: (..., N), higher is better, finite.
        budget: keys to keep; fewer are kept where fewer are visible.
        visible: bool, broadcastable to `score`.

    Returns:
        index: (..., k) int64 with k = min(budget, N); arbitrary where not kept.
        is_kept: (..., k) bool, False for slots left over.
    """
    visible = visible.expand_as(score)
    budget = min(budget, score.shape[-1])
    best = score.masked_fill(~visible, float("-inf")).topk(budget, dim=-1).indices
    index = best.sort(dim=-1).values
    return index, visible.gather(-1, index)


def choose_keys(
    rows: Tensor,
    key: Tensor,
    blocks: Tensor,
    block_size: int,
    budget: int,
    scaling: float,
    chunk: int = 16,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MAGE's choice for many blocks of one clean stream: mean probability over the prefix, then the top keys.

    Args:
        rows: (batch, KV heads, blocks, R, D) all-[MASK] queries of the blocks numbered `blocks` (int64, (blocks,) or
            (batch, blocks)).
        key: (batch, KV heads, N, D) keys of the clean stream.
        chunk: blocks scored at once, which bounds memory at chunk * R * N floats per KV head.
        first: (batch, blocks) first block of each one's document, where rows hold several.

    Returns:
        index, is_kept: (batch, KV heads, blocks, k), see `top_keys`.
    """
    parts = []
    for start in range(0, blocks.shape[-1], chunk):
        some = slice(start, start + chunk)
        since = None if first is None else first[:, some]
        visible = prefix_visible(blocks[..., some], key.shape[2], block_size, since)
        visible = visible if visible.dim() == 2 else visible[:, None]  # (batch, 1, blocks, N)
        score = mean_probability(rows[:, :, start : start + chunk], key, visible, scaling, compiled=True)
        parts.append(top_keys(score, budget, visible))
    return torch.cat([index for index, _ in parts], dim=2), torch.cat([kept for _, kept in parts], dim=2)


def gather_keys(cache: Tensor, index: Tensor) -> Tensor:
    """(batch, KV heads, N, D) and (batch, KV heads, blocks, k) -> the chosen rows (batch, KV heads, blocks, k, D)."""
    batch, num_kv_heads, blocks, kept = index.shape
    flat = index.reshape(batch, num_kv_heads, blocks * kept, 1).expand(-1, -1, -1, cache.shape[-1])
    return cache.gather(2, flat).reshape(batch, num_kv_heads, blocks, kept, cache.shape[-1])


def mean_logit(rows: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Logit of the block-average query.

    Args:
        rows: (batch, KV heads, R, D); key: (batch, KV heads, N, D).

    Returns:
        (batch, KV heads, N) float32.
    """
    mean = at_least_float32(rows).mean(dim=-2, keepdim=True)
    return (mean @ at_least_float32(key).transpose(-1, -2)).squeeze(-2) * scaling


def query_votes(rows: Tensor, key: Tensor, visible: Tensor, scaling: float, budget: int) -> tuple[Tensor, Tensor]:
    """How many of the packed rows list a key among their own `budget` best, and its mean probability (MAGE v1).

    Args:
        rows: (batch, KV heads, R, D); key: (batch, KV heads, N, D).
        visible: bool, broadcastable to (batch, KV heads, N).

    Returns:
        votes, mean: (batch, KV heads, N) float32.
    """
    visible = visible.unsqueeze(-2)
    logits = (at_least_float32(rows) @ at_least_float32(key).transpose(-1, -2) * scaling).masked_fill(
        ~visible, float("-inf")
    )
    probability = logits.softmax(dim=-1).nan_to_num(0.0)
    listed = logits.topk(min(budget, key.shape[-2]), dim=-1).indices
    votes = torch.zeros_like(logits).scatter_(-1, listed, 1.0) * visible
    return votes.sum(dim=-2), probability.mean(dim=-2)


def spread_forward(score: Tensor, follow: int) -> Tensor:
    """Each key's score or the best of the `follow` keys before it: what is copied goes on behind what gave it away.

    Args:
        score: (..., N).

    Returns:
        Same shape.
    """
    spread = score.clone()
    for distance in range(1, min(follow, score.shape[-1] - 1) + 1):
        spread[..., distance:] = torch.maximum(spread[..., distance:], score[..., :-distance])
    return spread


def page_bound(rows: Tensor, key: Tensor, visible: Tensor, page: int) -> Tensor:
    """Quest's score: the largest logit a page's channel-wise key bounds allow, averaged over the packed rows.

    sum_d max(q_d * max_d, q_d * min_d) = max(q, 0) . max + min(q, 0) . min, so two products do it.

    Args:
        rows: (batch, KV heads, R, D); key: (batch, KV heads, N, D).
        visible: (batch, N) bool; bounds of a page count its visible keys only.

    Returns:
        (batch, KV heads, pages) float32, unscaled; arbitrary for a page without visible keys.
    """
    padding = -key.shape[-2] % page
    padded = F.pad(at_least_float32(key), (0, 0, 0, padding)).unflatten(-2, (-1, page))
    hidden = ~F.pad(visible, (0, padding)).unflatten(-1, (-1, page))[:, None, :, :, None]
    low = padded.masked_fill(hidden, float("inf")).amin(dim=-2)
    high = padded.masked_fill(hidden, float("-inf")).amax(dim=-2)
    is_empty = hidden.all(dim=-2)  # inf * 0 would be NaN
    low, high = low.masked_fill(is_empty, 0.0), high.masked_fill(is_empty, 0.0)
    rows = at_least_float32(rows)
    mean_up, mean_down = rows.clamp(min=0).mean(dim=-2, keepdim=True), rows.clamp(max=0).mean(dim=-2, keepdim=True)
    return (mean_up @ high.transpose(-1, -2) + mean_down @ low.transpose(-1, -2)).squeeze(-2)


def top_pages(
    score: Tensor, counts: Sequence[int], page: int, lengths: Tensor, sinks: int = 0, recent: int = 0
) -> tuple[Tensor, Tensor]:
    """The best pages of each row, as keys, ascending by position; a page of one key is a key.

    Args:
        score: (batch, KV heads, pages) float32, no NaN.
        counts: pages to keep in each row.
        page: keys per page.
        lengths: (batch,) int64 visible keys of each row.
        sinks, recent: first and last visible keys whose pages are kept whatever their score.

    Returns:
        index: (batch, KV heads, k) int64, k = page * the largest count; valid positions, arbitrary where not kept.
        is_kept: (batch, KV heads, k) bool, False for slots left over, which come last.
    """
    pages = score.shape[-1]
    first = torch.arange(pages, device=score.device) * page
    is_forced = (first < sinks) | ((first + page > lengths[:, None] - recent) & (recent > 0))
    is_empty = first >= lengths[:, None]
    score = score.masked_fill(is_forced[:, None], float("inf")).masked_fill(is_empty[:, None], float("-inf"))
    # A stable sort, not top-k: equal scores go by position, whatever the batch is padded to.
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : max(counts)]
    wanted = torch.arange(best.shape[-1], device=score.device) < torch.tensor(counts, device=score.device)[:, None]
    index = best[..., None] * page + torch.arange(page, device=score.device)
    is_kept = (wanted[:, None, :, None] & (index < lengths[:, None, None, None])).flatten(2)
    order = torch.where(is_kept, index.flatten(2), pages * page).sort(dim=-1)
    return order.values.where(order.values < pages * page, 0), order.values < pages * page
