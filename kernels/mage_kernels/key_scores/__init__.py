"""How much a block's rows care for each cached key: the scores that selection ranks.

Mean probability, MAGE's score (arXiv 2602.14209 v2), of key j is the mean over the R packed rows i of
exp(scale * q_i . k_j - log_mass_i), with the rows' log-sum-exps over the prefix known from `exact_attention`:

    mean_probability   every key: a sweep over all keys, half an exact pass (the oracle)
    tile_mass          every tile: from the tile log-masses of the exact pass, without touching a key
    tile_probability   the keys of a shortlist of tiles; a sweep over those alone
    mean_logit         every key, by the logit of the mean row: reads the keys once and does no matrix product

Tile mass and a shortlist give the same choice as the full sweep whenever the worst key chosen scores at least the mass
of the best tile left out, since no key of a tile can score more than its tile.
All take an optional leading dimension of layers.
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.key_scores import reference
from mage_kernels.layout import check_counts, check_log_mass, check_rows, with_layers


def mean_probability(
    query: Tensor, key: Tensor, log_mass: Tensor, lengths: Tensor, scale: float, *, impl: str = "auto"
) -> Tensor:
    """Mean attention probability of every cached key.

    Args:
        query: ([layers,] batch, KV heads, R, D) packed rows; bf16 or fp16 for Triton, D at most 256.
        key: ([layers,] batch, KV heads, capacity, D).
        log_mass: ([layers,] batch, KV heads, R) float32, `Attended.prefix_log_mass` to normalise over the prefix.
        lengths: (batch,) int32 valid keys, on the device.
        scale: factor on the logits.

    Returns:
        ([layers,] batch, KV heads, capacity) float32, 0 beyond the length.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "mean_probability"
    _check(op, query, key, lengths)
    check_log_mass(op, "log_mass", log_mass, tuple(query.shape[:-1]))
    if not choose(op, impl, query, key, log_mass, lengths, limit=tensor_core_limit(query, key)):
        return reference.mean_probability(query, key, log_mass, lengths, scale)
    from mage_kernels.key_scores import triton

    layered = (with_layers(query, 4), with_layers(key, 4), with_layers(log_mass, 3))
    score = triton.mean_probability(*layered, lengths, scale)
    return score.view(*key.shape[:-1])


def tile_mass(tile_log_mass: Tensor, log_mass: Tensor, lengths: Tensor, tile: int, *, impl: str = "auto") -> Tensor:
    """Mean attention probability of every tile of the prefix.

    Args:
        tile_log_mass: ([layers,] batch, KV heads, T, R) float32, contiguous, from
            `exact_attention(..., tile=tile)`; all layers together are one launch.
        log_mass: ([layers,] batch, KV heads, R) float32, `Attended.prefix_log_mass`.
        lengths: (batch,) int32 valid keys, on the device.
        tile: keys per tile.

    Returns:
        ([layers,] batch, KV heads, T) float32, 0 for tiles beyond the length.
    """
    op = "tile_mass"
    if tile_log_mass.dim() not in (4, 5):
        raise ValueError(f"{op}: tile_log_mass has shape {tuple(tile_log_mass.shape)}, expected ([layers,] b, h, T, R)")
    check_log_mass(op, "tile_log_mass", tile_log_mass, tuple(tile_log_mass.shape))
    check_log_mass(op, "log_mass", log_mass, (*tile_log_mass.shape[:-2], tile_log_mass.shape[-1]))
    check_counts(op, "lengths", lengths, (tile_log_mass.shape[-4],))
    if not choose(op, impl, tile_log_mass, log_mass, lengths):
        return reference.tile_mass(tile_log_mass, log_mass, lengths, tile)
    from mage_kernels.key_scores import triton

    mass = triton.tile_mass(with_layers(tile_log_mass, 4), with_layers(log_mass, 3), lengths, tile)
    return mass.view(*tile_log_mass.shape[:-1])


def tile_probability(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    lengths: Tensor,
    scale: float,
    tiles: Tensor,
    count: Tensor,
    tile: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """Mean attention probability of the keys of chosen tiles.

    Args:
        query, key, log_mass, lengths, scale: as in `mean_probability`.
        tiles: ([layers,] batch, KV heads, S) int32 tile numbers, each inside the cache.
        count: ([layers,] batch, KV heads) int32: how many of them are meant, the first ones.
        tile: keys per tile, a power of two from 16 to 128.

    Returns:
        ([layers,] batch, KV heads, S * tile) float32: slot s * tile + j scores key tiles[s] * tile + j; 0 for keys
        beyond the length and for tiles beyond the count.
    """
    op = "tile_probability"
    _check(op, query, key, lengths)
    check_log_mass(op, "log_mass", log_mass, tuple(query.shape[:-1]))
    check_counts(op, "tiles", tiles, (*query.shape[:-2], tiles.shape[-1]))
    check_counts(op, "count", count, tuple(query.shape[:-2]))
    if tile not in (16, 32, 64, 128):
        raise ValueError(f"{op}: tile {tile} is none of 16, 32, 64, 128")
    if not choose(op, impl, query, key, log_mass, lengths, tiles, count, limit=tensor_core_limit(query, key)):
        return reference.tile_probability(query, key, log_mass, lengths, scale, tiles, count, tile)
    from mage_kernels.key_scores import triton

    layered = (with_layers(query, 4), with_layers(key, 4), with_layers(log_mass, 3))
    score = triton.tile_probability(*layered, lengths, scale, with_layers(tiles, 3), with_layers(count, 2), tile)
    return score.view(*tiles.shape[:-1], tiles.shape[-1] * tile)


def mean_logit(query: Tensor, key: Tensor, lengths: Tensor, scale: float, *, impl: str = "auto") -> Tensor:
    """Logit of every cached key for the mean of the packed rows.

    Args:
        query: ([layers,] batch, KV heads, R, D) packed rows, any floating dtype.
        key: ([layers,] batch, KV heads, capacity, D).
        lengths: (batch,) int32 valid keys, on the device.
        scale: factor on the logits.

    Returns:
        ([layers,] batch, KV heads, capacity) float32, 0 beyond the length.
    """
    op = "mean_logit"
    _check(op, query, key, lengths)
    if not choose(op, impl, query, key, lengths):
        return reference.mean_logit(query, key, lengths, scale)
    from mage_kernels.key_scores import triton

    return triton.mean_logit(with_layers(query, 4), with_layers(key, 4), lengths, scale).view(*key.shape[:-1])


def _check(op: str, query: Tensor, key: Tensor, lengths: Tensor) -> None:
    check_rows(op, query, key)
    check_counts(op, "lengths", lengths, (query.shape[-4],))
