"""The forward pass of a Llama, Qwen2 or Qwen3 model, all but its attention, over merged weights.

A layer is: norm, one projection to q, k and v, attention, output projection, norm, one projection to gate and up, SiLU,
down projection. What attention means is the caller's business: it gets the projection's output and returns the heads'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_kernels.add_norm import add_norm
from mage_kernels.few_rows import MOST_ROWS, add_linear, gate_up, linear, linear_parts, new_arrivals
from mage_kernels.silu_mul import silu_mul
from mage_tune.decode.engine.weights import LayerWeights, Weights


class Normed(NamedTuple):
    """Rows after an RMSNorm, or before its last factor, which the next product applies (`few_rows.add_linear`)."""

    values: Tensor
    squares: Tensor | None = None

    def rows(self, which: slice) -> Normed:
        """Some of them."""
        squares = None if self.squares is None else self.squares[:, which].contiguous()
        return Normed(self.values[which].contiguous(), squares)


@dataclass(frozen=True)
class Projection:
    """A projection to q, k and v that is still to be done: whoever knows where keys and values go does it there."""

    x: Normed
    weight: Tensor
    bias: Tensor | None
    eps: float

    def halves(self) -> list[Projection]:
        """The projections of either half of the rows."""
        half = len(self.x.values) // 2
        halves = self.x.rows(slice(half)), self.x.rows(slice(half, None))
        return [replace(self, x=half) for half in halves]


class Attend(Protocol):
    """Attention of one forward pass."""

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """(batch * n, (query heads + 2 * KV heads) * D) -> (batch * n, query heads * D).

        `qkv` may also be parts of its sum, (parts, batch * n, ...), or still to be done: `attention.append` takes all.
        """


class Body:
    """A model without attention."""

    def __init__(self, weights: Weights, impl: str) -> None:
        self.weights = weights
        self.impl = impl
        """Of the fused operations: "triton" or "reference"."""
        self.eps = weights.shape.norm_eps
        self.arrivals = new_arrivals(weights.device)

    def forward(self, ids: Tensor, attend: Attend) -> Normed:
        """(batch, n) int64 -> (batch * n, hidden), the final norm's."""
        weights = self.weights
        stream = F.embedding(ids.flatten(), weights.embedding)
        x = Normed(add_norm(stream, None, weights.layers[0].attention_norm, self.eps, impl=self.impl))
        following = [(layer.attention_norm, layer.qkv) for layer in weights.layers[1:]]
        following.append((weights.final_norm, weights.head))
        for number, layer in enumerate(weights.layers):
            heads = attend(number, self._projected(x, layer))
            x = self._add(stream, heads, layer.out, layer.mlp_norm, layer.gate_up)
            gated = self._gated(x, layer)
            x = self._add(stream, gated, layer.down, *following[number])
        return x

    def logits(self, x: Normed) -> Tensor:
        """(n, vocab) of n rows of `forward`, of the weights' dtype."""
        if self._are_few(x.values, self.weights.head):
            return linear(x.values, self.weights.head, squares=x.squares, eps=self.eps, impl=self.impl)
        return F.linear(x.values, self.weights.head)

    def _projected(self, x: Normed, layer: LayerWeights) -> Tensor | Projection:
        """Queries, keys and values: parts of their sum where that is faster, or left to be done."""
        weight, bias = layer.qkv, layer.qkv_bias
        if not self._are_few(x.values, weight):
            return F.linear(x.values, weight, bias)
        if layer.query_norm is None and self.weights.shape.head_dim % 32 == 0:
            return Projection(x, weight, bias, self.eps)
        return linear_parts(x.values, weight, bias, squares=x.squares, eps=self.eps, impl=self.impl)

    def _add(self, stream: Tensor, x: Tensor, weight: Tensor, gain: Tensor, following: Tensor) -> Normed:
        """stream += x @ weight.T, and its norm; without the norm's last factor where the next product can apply it."""
        if not self._are_few(x, weight):
            return Normed(add_norm(stream, F.linear(x, weight), gain, self.eps, impl=self.impl))
        # What is not divided yet may be too large for fp16.
        if self._are_few(stream, following) and stream.dtype != torch.float16:
            return Normed(*add_linear(stream, x, weight, gain, self.arrivals, impl=self.impl))
        return Normed(add_norm(stream, linear_parts(x, weight, impl=self.impl), gain, self.eps, impl=self.impl))

    def _gated(self, x: Normed, layer: LayerWeights) -> Tensor:
        weight = layer.gate_up
        if self._are_few(x.values, weight):
            return gate_up(x.values, weight, squares=x.squares, eps=self.eps, impl=self.impl)
        return silu_mul(F.linear(x.values, weight), impl=self.impl)

    def _are_few(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the weights' reading is all that counts; shapes that the kernel does not take go to cuBLAS."""
        return x.shape[0] <= MOST_ROWS and x.shape[1] % 64 == 0 and weight.shape[0] % 64 == 0
