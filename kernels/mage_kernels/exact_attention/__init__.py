"""Exact attention of a block's packed rows over a long prefix and the block itself.

softmax(scale * q [K_prefix ; K_own]^T) [V_prefix ; V_own], one softmax. The prefix is split over the whole GPU and the
parts are merged by their log-sum-exp (flash decoding), together with the block's own few keys. In the same pass, each
row's log-sum-exp over every tile of keys can be kept: it is what the selection scores start from (`key_scores`). Those
of all layers, kept in one buffer, are averaged over the rows by one launch when keys are chosen (`tile_mass`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.exact_attention import reference
from mage_kernels.layout import (
    by_token,
    check_block,
    check_counts,
    check_last_stride,
    check_log_mass,
    check_rows,
    check_shape,
)

TILES = (16, 32, 64, 128)


class Attended(NamedTuple):
    """What a block's rows saw; log-sum-exps are natural logarithms of scaled logits, float32."""

    out: Tensor
    """(batch, KV heads, R, D), or (batch * block, query heads * D), in the queries' dtype; 0 for a row that saw
    nothing."""
    log_mass: Tensor
    """(batch, KV heads, R): log-sum-exp over prefix and block; -inf for a row that saw nothing."""
    prefix_log_mass: Tensor
    """(batch, KV heads, R - own_from): over the prefix alone, of the rows that see the block too (of the others
    `log_mass` is just that); -inf where there is none. Scores normalise by it."""
    tile_log_mass: Tensor | None
    """(batch, KV heads, ceil(capacity / tile), R - own_from): of each tile of the prefix, of the same rows; -inf also
    where a tile's mass underflows beside that of the tiles before it; arbitrary beyond ceil(length / tile)."""


def best_tile(query: Tensor) -> int:
    """The `tile` whose log masses cost `exact_attention` least for such queries, (batch, KV heads, R, D)."""
    is_hopper = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] == 9
    return 128 if is_hopper and query.shape[-2] > 64 else 64


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
    masses: tuple[Tensor, Tensor] | None = None,
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
        own_from: rows before it see the prefix alone, and no masses of tiles or prefix are kept of them.
        tile: keys per tile (16, 32, 64 or 128; 64 and 128 are fast) to return `tile_log_mass`; None to leave it out.
        masses: memory for `tile_log_mass` and `prefix_log_mass`, float32, contiguous; new by default.
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
    if masses is not None:
        _check_masses(op, masses, query, key, own_from, tile)
    check_block(op, query, block)
    own = (own_key, own_value, own_from)
    if not choose(op, impl, *tensors, lengths, limit=tensor_core_limit(*tensors)):
        seen = Attended(*reference.exact_attention(query, key, value, lengths, scale, *own, tile))
        if masses is not None and seen.tile_log_mass is not None:
            tiles, prefix = masses[0].copy_(seen.tile_log_mass), masses[1].copy_(seen.prefix_log_mass)
            seen = seen._replace(tile_log_mass=tiles, prefix_log_mass=prefix)
        return seen if block is None else seen._replace(out=by_token(seen.out, block))
    from mage_kernels.exact_attention import triton

    return Attended(*triton.exact_attention(query, key, value, lengths, scale, *own, tile, masses, block or 0))


def _check_masses(
    op: str, masses: tuple[Tensor, Tensor], query: Tensor, key: Tensor, own_from: int, tile: int | None
) -> None:
    if tile is None:
        raise ValueError(f"{op}: masses are kept of tiles: say of how many keys")
    batch, heads, rows = query.shape[:-1]
    tiles = (batch, heads, -(-key.shape[-2] // tile), rows - own_from)
    check_log_mass(op, "masses[0]", masses[0], tiles)
    check_log_mass(op, "masses[1]", masses[1], (batch, heads, rows - own_from))
