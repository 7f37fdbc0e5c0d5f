"""What a block is: the block grid, noise, the streams of a training row, and who sees whom.

Training and decoding both import this module, so they cannot drift apart. A training row holds several copies
("streams") of the same tokens with the same positions, side by side:

    [ noisy stream | ... | noisy stream | clean stream ]

A query of a noisy stream sees its own block in its own stream and the clean blocks strictly before it; a query of the
clean stream sees the clean blocks up to and including its own (BD3-LM's three-part mask, arXiv 2503.09573, written for
any number of noisy streams). The clean stream is therefore computed once for all of them. With two blocks a, b per
stream and one noisy stream:

                 keys:  noisy a  noisy b  clean a  clean b
        query noisy a      1        .        .        .
        query noisy b      .        1        1        .
        query clean a      .        .        1        .
        query clean b      .        .        1        1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mage_tune.families import Family, Noise

TILE = 128
"""Rows and columns of one tile of a BlockMask, FlexAttention's default."""


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that `length` tokens touch, the last one possibly partial."""
    return -(-length // block_size)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple


@dataclass(frozen=True)
class StreamLayout:
    """`num_noisy` noisy streams followed by the clean one, each of `length` tokens on a grid of `block_size`.

    With no noisy stream the layout is plain block-causal attention, which is also how a prompt is read.
    """

    num_noisy: int
    length: int
    block_size: int

    def __post_init__(self) -> None:
        if self.length % self.block_size:
            raise ValueError(f"length {self.length} is not a whole number of blocks of {self.block_size}")

    @property
    def total(self) -> int:
        """Tokens of a whole row."""
        return (self.num_noisy + 1) * self.length

    @property
    def is_tiled(self) -> bool:
        """Whether whole FlexAttention tiles cover the streams and blocks nest in them."""
        return self.length % TILE == 0 and TILE % self.block_size == 0

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether row position `query` sees row position `key`; integer tensors that broadcast, bool out."""
        query_stream, key_stream = query // self.length, key // self.length
        query_block = query % self.length // self.block_size
        key_block = key % self.length // self.block_size
        key_is_clean = key_stream == self.num_noisy
        query_is_clean = query_stream == self.num_noisy
        own = (query_stream == key_stream) & (query_block == key_block)
        return (
            own
            | (key_is_clean & (key_block < query_block))
            | (key_is_clean & query_is_clean & (key_block == query_block))
        )

    def dense_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(total, total) bool; for tests and short rows."""
        index = torch.arange(self.total, device=device)
        return self.allowed(index[:, None], index[None, :])

    def noisy_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(length, 2 * length) bool: a noisy stream's queries against [its own keys ; clean keys]."""
        block = torch.arange(self.length, device=device) // self.block_size
        return torch.cat([block[:, None] == block, block[:, None] > block], dim=1)

    def clean_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(length, length) bool: block-causal attention of the clean stream."""
        block = torch.arange(self.length, device=device) // self.block_size
        return block[:, None] >= block

    def block_mask(self, device: torch.device | str) -> BlockMask:
        """FlexAttention's mask from its closed form, cached; nothing of size total x total is ever made.

        Raises:
            ValueError: the length is not a multiple of TILE, or blocks and tiles do not nest.
        """
        return _closed_form_block_mask(self, str(device))

    def packed_block_mask(self, first: Tensor) -> BlockMask:
        """The same for rows of several documents, each of which sees itself alone.

        Args:
            first: (batch, blocks) int64: of every block, the first block of its document; documents begin at tiles.
        """
        alone = self.block_mask(first.device)
        tiles = self.length // TILE
        start = (first[:, :: TILE // self.block_size] * self.block_size // TILE).int()  # (batch, tiles)
        start = start.repeat(1, self.num_noisy + 1)[:, None]  # (batch, 1, rows)
        rows = start.shape[-1]
        assert alone.full_kv_num_blocks is not None
        counts = alone.full_kv_num_blocks - start  # tiles of the document before its own
        column = torch.arange(rows, device=first.device, dtype=torch.int32)
        lists = self.num_noisy * tiles + start[..., None] + column
        lists = torch.where(column < counts[..., None], lists, 0).int()
        shape = (len(first), -1, -1)
        return BlockMask.from_kv_blocks(
            alone.kv_num_blocks.expand(*shape).contiguous(),
            alone.kv_indices.expand(*shape, -1).contiguous(),
            counts.contiguous(),
            lists.contiguous(),
            BLOCK_SIZE=TILE,
            mask_mod=alone.mask_mod,  # partial tiles lie on diagonals, inside one document
            seq_lengths=(self.total, self.total),
        )


@lru_cache(maxsize=32)
def _closed_form_block_mask(layout: StreamLayout, device: str) -> BlockMask:
    """Tile lists of `layout`: every tile off the three diagonals is full or empty, so the lists are written down.

    With n = length / TILE tiles per stream, query tile i of any stream sees the clean tiles 0..i-1 in full and its own
    diagonal tile in part; a noisy one also the clean diagonal tile in part (blocks before its own within the tile).
    """
    if not layout.is_tiled:
        raise ValueError(
            f"FlexAttention needs a length that is a multiple of {TILE} and a block size that divides it: "
            f"got length {layout.length}, block size {layout.block_size}"
        )
    tiles = layout.length // TILE
    rows = (layout.num_noisy + 1) * tiles
    clean = layout.num_noisy * tiles
    within = torch.arange(tiles, dtype=torch.int32).repeat(layout.num_noisy + 1)  # tile index inside its stream
    own = torch.arange(rows, dtype=torch.int32)
    is_noisy = own < clean
    # Partial tiles: own diagonal, then (noisy rows) the clean diagonal; a block as large as a tile leaves that empty.
    partial = torch.zeros(rows, rows, dtype=torch.int32)
    partial[:, 0] = own
    counts = torch.ones(rows, dtype=torch.int32)
    if layout.num_noisy and layout.block_size < TILE:
        partial[:, 1] = torch.where(is_noisy, clean + within, 0)
        counts += is_noisy.int()
    full = torch.arange(rows, dtype=torch.int32).repeat(rows, 1) + clean
    full = torch.where(torch.arange(rows) < within[:, None], full, 0).int()

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return layout.allowed(q, kv)

    def lists(x: Tensor) -> Tensor:
        return x[None, None].contiguous().to(device)

    return BlockMask.from_kv_blocks(
        lists(counts),
        lists(partial),
        lists(within),
        lists(full),
        BLOCK_SIZE=TILE,
        mask_mod=mask_mod,
        seq_lengths=(layout.total, layout.total),
    )


def noise_generator(seed: int, row: int, draw: int = 0) -> np.random.Generator:
    """Random numbers that depend on (seed, row, draw) alone, whichever worker or GPU asks, resumed or not."""
    return np.random.default_rng([seed, row, draw])


def draw_mask(
    maskable: np.ndarray, noise: Noise, block_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a row become the mask token.

    Args:
        maskable: (n,) bool, n a whole number of blocks; False for prompt, fill and seed positions.
        noise: the family's noise.
        block_size: tokens per block.
        rng: see `noise_generator`.

    Returns:
        is_masked: (n,) bool, a subset of `maskable`.
        probability: (n,) float64, the probability with which each position was masked (the loss weight is 1 / p for
            families that ask for it).
    """
    length = len(maskable)
    blocks = length // block_size
    while True:
        levels = rng.uniform(noise.low, noise.high, size=blocks if noise.per == "block" else 1)
        probability = (1.0 - noise.floor) * levels + noise.floor
        if noise.all_mask_share:
            probability[rng.random(len(probability)) < noise.all_mask_share] = 1.0
        probability = np.repeat(probability, length // len(probability))
        is_masked = maskable & (rng.random(length) < probability)
        if is_masked.any() or not noise.at_least_one or not maskable.any():
            return is_masked, probability


def maskable_positions(loss_weight: np.ndarray, family: Family) -> np.ndarray:
    """(n,) bool: supervised positions that noise may hide. Families with a seed loss keep each block's first token."""
    maskable = loss_weight > 0
    if family.seed_loss_weight is not None:
        maskable = maskable & (np.arange(len(loss_weight)) % family.block_size != 0)
    return maskable


def all_mask_positions(loss_weight: np.ndarray, family: Family) -> np.ndarray:
    """(n,) bool: positions that are [MASK] at the first decoding step of their block.

    Everything supervised, less the first token of each block where decoding seeds it (families.md 1.3).
    """
    masked = loss_weight > 0
    if family.seed_token:
        masked = masked & (np.arange(len(loss_weight)) % family.block_size != 0)
    return masked
