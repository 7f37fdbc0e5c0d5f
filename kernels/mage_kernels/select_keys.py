"""Which k keys each KV head keeps, for all layers at once: tile mass, a shortlist of tiles, and their keys' scores.

A composition of `top_k` and `tile_probability`. The result is the choice from a full `mean_probability` sweep wherever
`is_exact` says so: no key of a tile left out can score more than that tile's mass, so it is enough that the worst key
chosen scores at least the best mass left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mage_kernels.key_scores import tile_probability
from mage_kernels.top_k import top_k


@dataclass(frozen=True)
class Selected:
    """One list of keys for every (layer, batch row, KV head)."""

    index: Tensor
    """([layers,] batch, KV heads, k) int32 positions, ascending; 0 beyond the count."""
    count: Tensor
    """([layers,] batch, KV heads) int32."""
    is_exact: Tensor
    """([layers,] batch, KV heads) bool: certainly what a full sweep would choose."""


def select_keys(
    query: Tensor,
    key: Tensor,
    log_mass: Tensor,
    mass: Tensor,
    lengths: Tensor,
    scale: float,
    k: int,
    *,
    tile: int,
    shortlist: int | None = None,
    sinks: int = 0,
    recent: int = 0,
    most: Tensor | None = None,
    impl: str = "auto",
) -> Selected:
    """The k keys of highest mean probability, from the best tiles.

    Args:
        query, key, log_mass, lengths, scale: as for `key_scores.mean_probability`.
        mass: ([layers,] batch, KV heads, T) float32 from `key_scores.tile_mass`.
        k: keys to choose, sinks and recent window included.
        tile: keys per tile of `mass`.
        shortlist: tiles to look into, sink and recent tiles included; by default 8 times as many keys as are chosen.
        sinks, recent: first and last valid keys that are chosen whatever their score.
        most: ([layers,] batch, KV heads) int32: keys to choose for each head, 1 to k; k for all without.
    """
    if shortlist is None:
        shortlist = 8 * -(-k // tile)
    forced: dict[str, Any] = {"sinks": sinks, "recent": recent, "impl": impl}
    tiles = top_k(mass, min(shortlist, mass.shape[-1]), lengths, page=tile, **forced)
    score = tile_probability(query, key, log_mass, lengths, scale, tiles.index, tiles.count, tile, impl=impl)
    keys = top_k(score, k, lengths, groups=(tiles.index, tiles.count, tile), most=most, **forced)
    return Selected(keys.index, keys.count, keys.worst_chosen >= tiles.best_left)
