"""The prefix cache: clean keys and values of finished blocks, preallocated, one length per row.

A `PrefixCache` owns the memory. A `Prefix` is how a forward pass sees it: some rows of it, each up to some length.
Peeks (the denoising steps of a block) only read a Prefix; only `attention.extend` writes, and what lies beyond a row's
length is never read. A row may occur several times in a Prefix, so that many blocks of one cached document can be
probed in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mage_tune.backbone import causal_lm, output_head


class PrefixCache:
    """Keys (post-RoPE) and values of every layer, (layers, batch, KV heads, capacity, D), and what each row holds."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros, not empty: masked keys still meet a zero probability, and 0 * NaN is NaN.
        self.keys = torch.zeros(num_layers, batch, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.ids: list[list[int]] = [[] for _ in range(batch)]

    @classmethod
    def for_model(cls, model: nn.Module, batch: int, capacity: int) -> PrefixCache:
        """A cache of `capacity` tokens per row that fits a model, bare or with adapters."""
        config = causal_lm(model).config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = output_head(model).weight  # never adapted nor quantised, so it has the dtype of the activations
        assert isinstance(weight, Tensor)
        return cls(
            config.num_hidden_layers,
            batch,
            config.num_key_value_heads,
            capacity,
            head_dim,
            weight.dtype,
            weight.device,
        )

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self.keys.shape[3]

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each row."""
        return [len(row) for row in self.ids]

    def prefix(self, rows: Sequence[int] | None = None, lengths: Sequence[int] | None = None) -> Prefix:
        """What a forward sees.

        Args:
            rows: rows of the cache, all in order by default; a row may occur several times.
            lengths: of each of them the tokens seen, everything it holds by default.

        Raises:
            ValueError: a length exceeds what its row holds.
        """
        chosen = list(range(len(self.ids)) if rows is None else rows)
        held = [len(self.ids[row]) for row in chosen]
        wanted = held if lengths is None else list(lengths)
        if len(wanted) != len(held) or any(not 0 <= w <= h for w, h in zip(wanted, held, strict=True)):
            raise ValueError(f"prefix lengths {wanted} do not fit cached rows of {held} tokens")
        return Prefix(self, tuple(chosen), tuple(wanted))

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is held (a chat grows; one generation never does)."""
        if capacity <= self.capacity:
            return
        held = max(self.lengths, default=0)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            new[:, :, :, :held] = old[:, :, :, :held]
            setattr(self, name, new)

    def keep_common(self, row: int, ids: Sequence[int], block_size: int) -> int:
        """Forget everything of a row after its longest whole-block prefix shared with `ids`; returns what is kept.

        At least the last token of `ids` is left out: its forward pass says what comes next.
        """
        held, shared = self.ids[row], 0
        while shared < min(len(held), len(ids) - 1) and held[shared] == ids[shared]:
            shared += 1
        self.ids[row] = held[: shared // block_size * block_size]
        return len(self.ids[row])


@dataclass(frozen=True)
class Prefix:
    """Rows of a cache, each up to a length of its own; reading only."""

    cache: PrefixCache
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Length of the longest row: N below."""
        return max(self.lengths, default=0)

    @property
    def is_ragged(self) -> bool:
        """Whether lengths differ, so that attention needs a mask."""
        return len(set(self.lengths)) > 1

    @cached_property
    def row_index(self) -> Tensor:
        """(batch,) int64 rows in the cache."""
        return torch.tensor(self.rows, device=self.cache.keys.device)

    @cached_property
    def length_tensor(self) -> Tensor:
        """(batch,) int64."""
        return torch.tensor(self.lengths, device=self.cache.keys.device)

    @cached_property
    def is_visible(self) -> Tensor:
        """(batch, N) bool: cached positions inside each row's length."""
        return torch.arange(self.longest, device=self.cache.keys.device) < self.length_tensor[:, None]

    def positions(self, count: int) -> Tensor:
        """(batch, count) int64: positions of the tokens that come next."""
        return self.length_tensor[:, None] + torch.arange(count, device=self.cache.keys.device)

    def read(self, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, KV heads, N, D) of a layer; a view of the cache where all its rows are read."""
        length = self.longest if length is None else length
        key, value = self.cache.keys[layer, :, :, :length], self.cache.values[layer, :, :, :length]
        if self.rows == tuple(range(key.shape[0])):
            return key, value
        return key[self.row_index], value[self.row_index]

    def gather(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen keys and values: index (batch, KV heads, k) int64 -> two (batch, KV heads, k, D)."""
        heads = torch.arange(index.shape[1], device=index.device)[None, :, None]
        where = self.row_index[:, None, None], heads, index
        return self.cache.keys[layer][where], self.cache.values[layer][where]

    def take(self, batch_rows: Sequence[int]) -> Prefix:
        """Some rows of this prefix, by their place in it."""
        return Prefix(self.cache, tuple(self.rows[i] for i in batch_rows), tuple(self.lengths[i] for i in batch_rows))


class OwnBlock:
    """Keys and values of the blocks in work, from their last whole forward: Fast-dLLM v2's optional in-block cache.

    Between whole forwards only one sub-block of a row is recomputed; the rest of its block stays as it was, which makes
    this an approximation.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, layer: int, rows: Tensor, start: Tensor | None, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in what was recomputed; returns keys and values of the whole blocks, (n, KV heads, B, D).

        Args:
            rows: (n,) int64 rows, as numbered in the first, whole forward of the block.
            start: (n,) int64 first recomputed place of each row; None for the whole block.
            key, value: (n, KV heads, W, D).
        """
        if layer not in self.layers:
            self.layers[layer] = key.clone(), value.clone()
            return key, value
        places = torch.arange(key.shape[2], device=key.device) + (0 if start is None else start[:, None])
        for held, new in zip(self.layers[layer], (key, value), strict=True):
            held[rows[:, None], :, places] = new.transpose(1, 2)
        return self.layers[layer][0][rows], self.layers[layer][1][rows]
