"""Exact attention of a block's packed rows over a long prefix and the block itself.

softmax(scale * q [K_prefix ; K_own]^T) [V_prefix ; V_own], one softmax. The prefix is split over the whole GPU and the
parts are merged by their log-sum-exp (flash decoding), together with the block's own few keys. In the same pass, each
row's log-sum-exp over every tile of keys can be kept: it is what the selection scores start from (`key_scores`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.exact_attention import hopper, reference
from mage_kernels.layout import by_token, check_block, check_counts, check_last_stride, check_rows, check_shape

TILES = (16, 32, 64, 128)


class Attended(NamedTuple):
    """What a block's rows saw; log-sum-exps are natural logarithms of scaled logits, float32."""

    out: Tensor
    """(batch, KV heads, R, D), or (batch * block, query heads * D), in the queries' dtype; 0 for a row that saw
    nothing."""
    log_mass: Tensor
    """(batch, KV heads, R): log-sum-exp over prefix and block; -inf for a row that saw nothing."""
    prefix_log_mass: Tensor
    """(batch, KV heads, R): over the prefix alone; -inf where there is none. Scores normalise by it."""
    tile_log_mass: Tensor | None
    """(batch, KV heads, ceil(capacity / tile), R): of each tile of the prefix; -inf also where a tile's mass
    underflows beside that of the tiles before it; arbitrary beyond ceil(length / tile)."""


def best_tile(query: Tensor) -> int:
    """The `tile` whose log masses cost `exact_attention` least for such queries, (batch, KV heads, R, D)."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] != 9 or query.shape[-2] <= 64:
        return 64
    return hopper.choose_tiles(query.shape[0] * query.shape[1], query.shape[2], 0)[1]


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    own_key: Tensor | None = None,
    own_value: Tensor | None = None,
    own_from: int = 0,
    tile: int | None = None,
    block: int | None = None,
    impl: str = "auto",
) -> Attended:
    """Attention over `lengths` keys of the cache and over all keys of the block itself.

    Args:
        query: (batch, KV heads, R, D) packed rows, any R; bf16 or fp16 for Triton, D at most 256.
        key, value: (batch, KV heads, capacity, D), same dtype; the last dimension contiguous.
        lengths: (batch,) int32 valid keys of each batch row, 0 to capacity, not checked: they stay on the device.
        scale: factor on the logits, 1 / sqrt(D).
        own_key, own_value: (batch, KV heads, B, D) of the block, all visible to every row from `own_from` on; both or
            neither.
        own_from: rows before it see the prefix alone.
        tile: keys per tile (16, 32, 64 or 128; 64 and 128 are fast) to return `tile_log_mass`; None to leave it out.
        block: positions of a block, to get `out` token by token.
        impl: see the package's docstring.

    Raises:
        ValueError: shapes, dtypes or the tile do not fit.
        RuntimeError: `impl="triton"` cannot run here; the message says why.
    """
    op = "exact_attention"
    check_rows(op, query, key, value)
    check_counts(op, "lengths", lengths, (query.shape[0],))
    if (own_key is None) != (own_value is None):
        raise ValueError(f"{op}: own_key and own_value come together")
    tensors = [query, key, value]
    if own_key is not None and own_value is not None:
        check_shape(op, "own_key", own_key, (*query.shape[:2], own_key.shape[-2], query.shape[-1]))
        check_shape(op, "own_value", own_value, tuple(own_key.shape))
        check_last_stride(op, "own_key", own_key)
        check_last_stride(op, "own_value", own_value)
        tensors += [own_key, own_value]
    if tile is not None and tile not in TILES:
        raise ValueError(f"{op}: tile {tile} is none of {TILES}")
    check_block(op, query, block)
    if not choose(op, impl, *tensors, lengths, limit=tensor_core_limit(*tensors)):
        own = (own_key, own_value, own_from)
        seen = Attended(*reference.exact_attention(query, key, value, lengths, scale, *own, tile))
        return seen if block is None else seen._replace(out=by_token(seen.out, block))
    from mage_kernels.exact_attention import triton

    own = (own_key, own_value, own_from)
    return Attended(*triton.exact_attention(query, key, value, lengths, scale, *own, tile, block or 0))
