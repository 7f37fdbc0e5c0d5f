"""Norm, SwiGLU and rotary positions of a training pass: one kernel each, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@cache
def _compiled(function: Any, strides: tuple[int, ...]) -> Callable[..., Any]:
    # torch.compile learns for each code object which sizes and strides vary, and kernels for rows of any stride cannot
    # tell that they are aligned. Code of its own for each set of strides leaves the number of rows alone to vary.
    name = "_".join([function.__name__, *map(str, strides)])
    return torch.compile(FunctionType(function.__code__.replace(co_name=name), function.__globals__, name))


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, one kernel on a GPU: compiled there at its first call for a width, for any number of rows."""

    def call(*args: Any) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not tensors[0].is_cuda:
            return function(*args)
        return _compiled(function, tuple(x.stride(-2) for x in tensors if x.dim() > 1))(*args)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm of (n, d) in float32 or better, with transformers' rounding before the weight."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(x.dtype)).to(dtype)


def rms_norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """`rms_norm`, written to `out`."""
    out.copy_(rms_norm(x, weight, eps, out.dtype))


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `rms_norm`'s input and of the residual beside it, in the input's dtype; and the norm once more."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, flowing = wide * scale, _wide(grad) * _wide(weight)
    of_input = scale * (flowing - unit * (flowing * unit).mean(-1, keepdim=True)) + _wide(residual)
    return of_input.to(x.dtype), (weight * unit.to(x.dtype)).to(grad.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def swiglu_into(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """`swiglu`, written to `out`."""
    out.copy_(swiglu(gate, up))


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The product once more, and the gradients of gate and up beside each other."""
    wide, flowing = _wide(gate), _wide(grad)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    of_gate = flowing * _wide(up) * (sigmoid + silu * (1 - sigmoid))
    return silu.to(gate.dtype) * up, torch.cat([of_gate.to(gate.dtype), (flowing * silu).to(up.dtype)], dim=-1)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of (batch, heads, n, D) queries and keys, in the half-split form of Llama and Qwen."""
    cos, sin = _wide(cos), _wide(sin)

    def turn(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return (_wide(x) * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return turn(query), turn(key)


def rotated_apart(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated`, and the values on their own: a part of q k v would keep the whole."""
    return *rotated(query, key, cos, sin), value.clone()


def turned_back(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `rotated`."""
    return rotated(query, key, cos, -sin)


class Rotate(torch.autograd.Function):
    """`rotated_apart`; the backward pass turns back, as both halves of `sin` are alike."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values."""
        ctx.save_for_backward(cos, sin)
        return fast(rotated_apart)(query, key, value, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients, turned back."""
        cos, sin = ctx.saved_tensors
        return *fast(turned_back)(grad_query, grad_key, cos, sin), grad_value, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
