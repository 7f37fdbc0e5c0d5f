"""The engine's memory: keys and values of the prefix, and of the few keys that sparse steps see."""

from __future__ import annotations

import torch
from torch import Tensor

from mage_tune.decode.engine.weights import Weights


class Cache:
    """Keys (post-RoPE) and values of every layer, per head contiguous, and how many of them are valid."""

    def __init__(self, weights: Weights, batch: int, capacity: int) -> None:
        shape = weights.shape
        size = (2, shape.num_layers, batch, shape.num_kv_heads, capacity, shape.head_dim)
        # Zeros, not empty: a masked key still meets a zero probability in plain PyTorch, and 0 * NaN is NaN.
        self.keys, self.values = torch.zeros(size, dtype=weights.dtype, device=weights.device)
        """(layers, batch, KV heads, capacity, D)"""
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=weights.device)
        """Keys of finished blocks of each row; forward passes and graphs read it."""
        self.held = [0] * batch
        """The same, as the host knows it."""

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row, the block in work included."""
        return self.keys.shape[3]

    def set_lengths(self, held: list[int]) -> None:
        """Declare how much of each row is valid.

        Raises:
            ValueError: a length that does not fit.
        """
        if len(held) != self.batch or not all(0 <= n <= self.capacity for n in held):
            raise ValueError(f"lengths {held} do not fit a cache of {self.batch} rows of {self.capacity} tokens")
        self.held = list(held)
        self.lengths.copy_(torch.tensor(held, dtype=torch.int32))

    def fill_random(self, seed: int = 0) -> None:
        """Random keys and values in place of a prompt's, for timings."""
        generator = torch.Generator(self.keys.device).manual_seed(seed)
        for layer in range(self.keys.shape[0]):
            self.keys[layer].normal_(generator=generator)
            self.values[layer].normal_(generator=generator)


class KeptKeys:
    """The chosen keys and values of every sparse layer, copied together once per block, with room for its own.

    Each (layer, row, KV head) has `slots` slots for chosen keys, of which the first `counts` are in use; the B slots
    behind them are rewritten by every step.
    """

    def __init__(self, weights: Weights, first_layer: int, batch: int, slots: int, block_size: int) -> None:
        shape = weights.shape
        self.first_layer = first_layer
        """Layers before it are dense."""
        self.slots = slots
        """Chosen keys that fit."""
        heads = (shape.num_layers - first_layer, batch, shape.num_kv_heads)
        size = (2, *heads, slots + block_size, shape.head_dim)
        self.keys, self.values = torch.zeros(size, dtype=weights.dtype, device=weights.device)
        """(sparse layers, batch, KV heads, slots + B, D)"""
        self.counts = torch.zeros(heads, dtype=torch.int32, device=weights.device)

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer of the model, (batch, KV heads, slots + B, D) each."""
        return self.keys[layer - self.first_layer], self.values[layer - self.first_layer]
