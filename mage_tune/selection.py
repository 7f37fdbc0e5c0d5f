"""Which cached keys a block cares for: the scores and the choice every selection rule is made of.

Pure functions of tensors. A block has no causal mask inside, so the G query heads that share a KV head and the B
positions of the block form R = G * B packed rows against that head's keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_rows(query: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """(batch, query heads, n, D) -> (batch, KV heads, blocks, R, D), rows ordered by query head, then position."""
    batch, num_heads, length, head_dim = query.shape
    group, blocks = num_heads // num_kv_heads, length // block_size
    rows = query.reshape(batch, num_kv_heads, group, blocks, block_size, head_dim)
    return rows.transpose(2, 3).reshape(batch, num_kv_heads, blocks, group * block_size, head_dim)


def unpacked_rows(rows: Tensor, num_heads: int, block_size: int) -> Tensor:
    """The inverse of `packed_rows`: (batch, KV heads, blocks, R, D) -> (batch, query heads, n, D)."""
    batch, num_kv_heads, blocks, num_rows, head_dim = rows.shape
    group = num_heads // num_kv_heads
    query = rows.reshape(batch, num_kv_heads, blocks, group, block_size, head_dim).transpose(2, 3)
    return query.reshape(batch, num_heads, blocks * block_size, head_dim)


def prefix_visible(block: Tensor, length: int, block_size: int) -> Tensor:
    """(..., length) bool: clean positions strictly before each block of `block` (any shape, block numbers)."""
    position = torch.arange(length, device=block.device)
    return position < (block * block_size)[..., None]


def mean_probability(rows: Tensor, key: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """MAGE v2's score: softmax over the visible keys, averaged over the packed rows of a KV head.

    Args:
        rows: (batch, KV heads, blocks, R, D) queries.
        key: (batch, KV heads, N, D).
        visible: bool, broadcastable to (batch, 1, blocks, N); a block that sees nothing gets zeros.
        scaling: factor on the logits, 1 / sqrt(D).

    Returns:
        (batch, KV heads, blocks, N) float32, summing to 1 over N (0 where nothing is visible).
    """
    logits = torch.einsum("bhjrd,bhnd->bhjrn", rows, key).float() * scaling
    logits = logits.masked_fill(~visible.unsqueeze(-2), float("-inf"))
    return logits.softmax(dim=-1).nan_to_num(0.0).mean(dim=-2)


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
    rows: Tensor, key: Tensor, blocks: Tensor, block_size: int, budget: int, scaling: float, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """MAGE's choice for many blocks of one clean stream: mean probability over the prefix, then the top keys.

    Args:
        rows: (batch, KV heads, blocks, R, D) all-[MASK] queries of the blocks numbered `blocks` (1-D int64).
        key: (batch, KV heads, N, D) keys of the clean stream.
        chunk: blocks scored at once, which bounds memory at chunk * R * N floats per KV head.

    Returns:
        index, is_kept: (batch, KV heads, blocks, k), see `top_keys`.
    """
    parts = []
    for start in range(0, len(blocks), chunk):
        visible = prefix_visible(blocks[start : start + chunk], key.shape[2], block_size)
        score = mean_probability(rows[:, :, start : start + chunk], key, visible, scaling)
        parts.append(top_keys(score, budget, visible))
    return torch.cat([index for index, _ in parts], dim=2), torch.cat([kept for _, kept in parts], dim=2)


def gather_keys(cache: Tensor, index: Tensor) -> Tensor:
    """(batch, KV heads, N, D) and (batch, KV heads, blocks, k) -> the chosen rows (batch, KV heads, blocks, k, D)."""
    batch, num_kv_heads, blocks, kept = index.shape
    flat = index.reshape(batch, num_kv_heads, blocks * kept, 1).expand(-1, -1, -1, cache.shape[-1])
    return cache.gather(2, flat).reshape(batch, num_kv_heads, blocks, kept, cache.shape[-1])
