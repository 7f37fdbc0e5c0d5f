"""Norms, SwiGLU and rotary positions of a training pass: one kernel each, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


@cache
def _compiled(function: Any, strides: tuple[int, ...]) -> Callable[..., Any]:
    # torch.compile learns for each code object which sizes and strides vary, and kernels for rows of any stride cannot
    # tell that they are aligned. Code of its own for each set of strides leaves the number of rows alone to vary.
    name = "_".join([function.__name__, *map(str, strides)])
    return torch.compile(FunctionType(function.__code__.replace(co_name=name), function.__globals__, name))


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, one kernel on a GPU: compiled there at its first call for a width, for any number of rows."""

    def call(*args: Any) -> Any:
        if not args[0].is_cuda:
            return function(*args)
        strides = tuple([x.stride(-2) for x in args if isinstance(x, Tensor) and x.dim() > 1])
        # Detached: torch.compile would compile anew for a first layer, whose input has no gradient, and for views of
        # tensors of other sizes.
        values = [x.detach() if isinstance(x, Tensor) else x for x in args]
        return _compiled(function, strides)(*values)

    return call


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm of (..., d) in float32 or better, with transformers' rounding before the weight."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(x.dtype)).to(dtype)


def rms_norm_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """`rms_norm`, written to `out`."""
    out.copy_(rms_norm(x, weight, eps, out.dtype))


def add_norm_into(out: Tensor, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x + added; its `rms_norm` is written to `out`."""
    total = x + added
    rms_norm_into(out, total, weight, eps)
    return total


def copy_into(out: Tensor, x: Tensor) -> None:
    """`x`, written to `out`: torch's own copy between different strides moves one number at a time."""
    out.copy_(x)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `rms_norm`'s input and of the residual beside it, in the input's dtype; and the norm once more."""
    of_input, unit = _norm_gradient(grad, x, weight, eps)
    return (of_input + _wide(residual)).to(x.dtype), (weight * unit.to(x.dtype)).to(grad.dtype)


def _norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient of `rms_norm`'s input, and the normalised input before its weight; float32 or better."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, flowing = wide * scale, _wide(grad) * _wide(weight)
    return scale * (flowing - unit * (flowing * unit).mean(-1, keepdim=True)), unit


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


def swiglu_into(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """`swiglu`, written to `out`."""
    out.copy_(swiglu(gate, up))


def swiglu_backward_into(of_gate: Tensor, of_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The product once more; gradients are written to `of_gate` and `of_up`, where a `cat` would be a second kernel."""
    wide, flowing = _wide(gate), _wide(grad)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    of_gate.copy_(flowing * _wide(up) * (sigmoid + silu * (1 - sigmoid)))
    of_up.copy_(flowing * silu)
    return silu.to(gate.dtype) * up


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


def turned_back_into(out: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Gradients of `rotated_apart`'s inputs, from those of its outputs, written to `out`, (batch, n, all heads, D)."""
    grads = *rotated(query, key, cos, -sin), value  # turned back, as both halves of `sin` are alike
    out.copy_(torch.cat([grad.transpose(1, 2) for grad in grads], dim=2))


def normed_rotated(
    query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rotated`, of queries and keys whose heads are normalised first, with these weights (D,)."""
    return rotated(rms_norm(query, of_query, eps, query.dtype), rms_norm(key, of_key, eps, key.dtype), cos, sin)


def normed_turned_back_into(
    out_query: Tensor,
    out_key: Tensor,
    out_value: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    query: Tensor,
    key: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """As `turned_back_into`, for `normed_rotated` of these queries and keys, to (batch, heads, n, D) each."""
    turned = rotated(grad_query, grad_key, cos, -sin)
    out_query.copy_(_norm_gradient(turned[0], query, of_query, eps)[0])
    out_key.copy_(_norm_gradient(turned[1], key, of_key, eps)[0])
    out_value.copy_(grad_value)


Gains = tuple[Tensor, Tensor, float]
"""Weights of the norms of queries' and of keys' heads, and their epsilon."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
