"""The forward pass of a Llama, Qwen2 or Qwen3 model, all but its attention, over merged weights.

A layer is: norm, one projection to q, k and v, attention, output projection, norm, one projection to gate and up, SiLU,
down projection. What attention means is the caller's business: it gets the projection's output and returns the heads'.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from mage_kernels.add_norm import add_norm
from mage_kernels.few_rows import MOST_ROWS, gate_up, linear, linear_parts
from mage_kernels.silu_mul import silu_mul
from mage_tune.decode.engine.weights import Weights


class Attend(Protocol):
    """Attention of one forward pass."""

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """(batch * n, (query heads + 2 * KV heads) * D) -> (batch * n, query heads * D).

        `qkv` may also be parts of its sum, (parts, batch * n, ...), which `rope_append` adds up.
        """


class Body:
    """A model without attention."""

    def __init__(self, weights: Weights, impl: str) -> None:
        self.weights = weights
        self.impl = impl
        """Of the fused operations: "triton" or "reference"."""

    def forward(self, ids: Tensor, attend: Attend) -> Tensor:
        """(batch, n) int64 -> (batch * n, hidden) after the final norm."""
        weights, eps, impl = self.weights, self.weights.shape.norm_eps, self.impl
        stream = F.embedding(ids.flatten(), weights.embedding)
        delta = None
        for number, layer in enumerate(weights.layers):
            normed = add_norm(stream, delta, layer.attention_norm, eps, impl=impl)
            heads = attend(number, self._sum_to_be(normed, layer.qkv, layer.qkv_bias))
            normed = add_norm(stream, self._sum_to_be(heads, layer.out), layer.mlp_norm, eps, impl=impl)
            delta = self._sum_to_be(self._gated(normed, layer.gate_up), layer.down)
        return add_norm(stream, delta, weights.final_norm, eps, impl=impl)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab), of the weights' dtype."""
        if self._are_few(hidden, self.weights.head):
            return linear(hidden, self.weights.head, impl=self.impl)
        return F.linear(hidden, self.weights.head)

    def _sum_to_be(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, in parts where that is faster; `add_norm` and `rope_append` take both."""
        if self._are_few(x, weight):
            return linear_parts(x, weight, bias, impl=self.impl)
        return F.linear(x, weight, bias)

    def _gated(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._are_few(x, weight):
            return gate_up(x, weight, impl=self.impl)
        return silu_mul(F.linear(x, weight), impl=self.impl)

    def _are_few(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the weights' reading is all that counts; shapes that the kernel does not take go to cuBLAS."""
        return x.shape[0] <= MOST_ROWS and x.shape[1] % 64 == 0 and weight.shape[0] % 64 == 0
