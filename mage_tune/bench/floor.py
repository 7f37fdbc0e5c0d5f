"""The roofline: what a step would take if the machine did nothing but its bytes, or its arithmetic, at full speed.

Linear layers and attention each take the larger of two times: bytes over memory bandwidth, operations over matrix
speed. Both ceilings are measured on the machine itself: a large copy, a large matrix product on random data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_tune.bench.clock import median_ms
from mage_tune.decode.engine.weights import Shape

BYTES = 2
"""Per number: weights and cache are timed in 16 bits."""


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do."""

    bytes_per_s: float
    """Read and written together, by a large copy."""
    flops_per_s: float
    """Of a large matrix product."""


@torch.no_grad()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a copy and a matrix product; small ones where there is no GPU."""
    is_gpu = device.type == "cuda"
    source = torch.randn(2**29 if is_gpu else 2**22, device=device).to(dtype)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, repeats=10)
    size = 8192 if is_gpu else 256
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product_ms = median_ms(lambda: left @ right, device, repeats=10)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / copy_ms * 1e3, 2 * size**3 / product_ms * 1e3)


@dataclass(frozen=True)
class Load:
    """What attention of one step reads, as shares and counts per row of the batch and KV head."""

    exact_layers: int
    """Layers that see the whole prefix."""
    kept: int = 0
    """Prefix keys that the other layers see."""
    extra_reads: float = 0.0
    """Further reads of the other layers, in keys (Quest's page bounds)."""


@dataclass(frozen=True)
class Roofline:
    """Floors of one model, batch and context, in ms."""

    shape: Shape
    ceilings: Ceilings
    batch: int
    context: int
    block_size: int

    def linear_ms(self) -> float:
        """Every weight once, or its arithmetic for all tokens of the batch."""
        weights, tokens = self.shape.matmul_weights, self.batch * self.block_size
        return self._ms(weights * BYTES, 2 * weights * tokens)

    def attention_ms(self, load: Load) -> float:
        """Keys and values of every head once, or their arithmetic for all packed rows."""
        shape, layers = self.shape, self.shape.num_layers
        sparse_layers = layers - load.exact_layers
        attended = load.exact_layers * self.context + sparse_layers * load.kept + layers * self.block_size
        read = attended + sparse_layers * load.extra_reads
        per_key = 2 * shape.num_kv_heads * shape.head_dim * BYTES * self.batch
        flops_per_key = 4 * shape.num_heads * shape.head_dim * self.block_size * self.batch
        return self._ms(read * per_key, attended * flops_per_key)

    def step_ms(self, load: Load) -> float:
        """One forward pass."""
        return self.linear_ms() + self.attention_ms(load)

    def exact_ms(self) -> float:
        """One forward pass that sees everything."""
        return self.step_ms(Load(self.shape.num_layers))

    def _ms(self, moved: float, flops: float) -> float:
        return 1e3 * max(moved / self.ceilings.bytes_per_s, flops / self.ceilings.flops_per_s)
