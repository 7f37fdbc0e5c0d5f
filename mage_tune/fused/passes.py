"""The two halves of a decoder layer as autograd functions over products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mage_tune.fused.elementwise import (
    fast,
    rms_norm_backward,
    rms_norm_into,
    swiglu_backward,
    swiglu_into,
)
from mage_tune.fused.product import (
    Linears,
    Product,
    computing_dtype,
    project,
    project_backward,
    widened,
)

Gain = tuple[Tensor, float]
"""Weight and epsilon of an RMSNorm."""


def normed_linears(x: Tensor, norm: Any, linears: Linears, head_dim: int | None = None) -> tuple[Tensor, ...]:
    """Linear layers, with their adapters, of one (normalised) input.

    Args:
        x: (batch, n, in), or (batch, heads, n, D) with in = heads * D.
        norm: an RMSNorm that is not trained, or None.
        linears: the layers.
        head_dim: outputs are (batch, heads, n, D) of this D instead of (batch, n, out).

    Returns:
        One output for each layer; with a norm also x, for the residual: taken from here, its gradient is added in the
        norm's kernel.
    """
    product = linears.product(computing_dtype(x))
    gain = None if norm is None else (norm.weight, norm.variance_epsilon)
    return NormedLinears.apply(x, gain, product, head_dim, *product.adapters)


def feed_forward(
    x: Tensor, norm: Any, first: Linears, last: Linears, recompute: bool = False, skip_last: bool = False
) -> Tensor:
    """x + SwiGLU of the normalised x, with adapters: (..., hidden) -> (..., hidden); flags as in `layer_forward`.

    Args:
        first: gate and up.
        last: down.
    """
    dtype = computing_dtype(x)
    one, two = first.product(dtype), last.product(dtype)
    gain = (norm.weight, norm.variance_epsilon)
    return FeedForward.apply(x, gain, one, two, recompute, skip_last, *one.adapters, *two.adapters)


class NormedLinears(torch.autograd.Function):
    """See `normed_linears`. Kept: the input before its norm, and the adapters' inner vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Gain | None, product: Product, head_dim: int | None, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """The layers' outputs."""
        rows = by_position(x)
        with torch.autocast(x.device.type, enabled=False):
            wide, own = widened(rows, product)
            if gain is None:
                own.unflatten(0, rows.shape[:2]).unflatten(-1, rows.shape[2:]).copy_(rows)
            else:
                fast(rms_norm_into)(own, x.flatten(0, 1), *gain)
            out, inner = project(wide, product)
        ctx.gain, ctx.product = gain, product
        ctx.save_for_backward(x, inner)
        outs = out.view(*rows.shape[:2], -1).split(product.outs, dim=-1)
        if head_dim is not None:
            outs = [part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in outs]
        return tuple(outs) if gain is None else (*outs, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        (x, inner), product = ctx.saved_tensors, ctx.product
        rows = by_position(x)
        flat = rows.reshape(len(inner), -1)
        with torch.autocast(x.device.type, enabled=False):
            parts = list(grads)
            residual = None if ctx.gain is None else parts.pop().reshape(flat.shape)
            grad = beside_each_other(parts)
            grad_own, inner_grad = project_backward(grad, product)
            if residual is None:
                grad_in, normed = grad_own.to(x.dtype), flat.to(grad_own.dtype)
            else:
                grad_in, normed = fast(rms_norm_backward)(grad_own, flat, *ctx.gain, residual)
            grad_adapters = product.gradients(grad, inner_grad, normed, inner)
        grad_x = grad_in.view(rows.shape) if ctx.needs_input_grad[0] else None
        if grad_x is not None and x.dim() == 4:
            grad_x = grad_x.transpose(1, 2)
        return grad_x, None, None, None, *grad_adapters


class FeedForward(torch.autograd.Function):
    """See `feed_forward`. Kept: input before its norm, inner vectors, and gate and up unless they are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Gain,
        first: Product,
        last: Product,
        recompute: bool,
        skip_last: bool,
        *adapters: Tensor,
    ) -> Tensor:
        """The output."""
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            gate_up, inner = _gate_and_up(flat, gain, first)
            gate, up = gate_up.chunk(2, dim=1)
            wide, own = widened(gate, last)
            fast(swiglu_into)(own, gate, up)
            out, last_inner = project(wide, last, skip=skip_last)
            # A sum of the input's own shape: of a view of one, FSDP2 warns that in-place work would lose its hooks.
            out = flat.view(x.shape) if skip_last else x + out.view(x.shape)
        ctx.gain, ctx.first, ctx.last = gain, first, last
        ctx.save_for_backward(x, last_inner, *((None, None) if recompute else (gate_up, inner)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        x, last_inner, gate_up, inner = ctx.saved_tensors
        first, last, flat = ctx.first, ctx.last, x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            if gate_up is None:
                gate_up, inner = _gate_and_up(flat, ctx.gain, first)
            residual = grad.reshape(flat.shape)
            grad_out = residual.to(last.dtype)
            grad_product, inner_grad = project_backward(grad_out, last)
            inner_grad = inner_grad.contiguous()  # the rest of that memory is given back before the next product
            product, grad_gate_up = fast(swiglu_backward)(grad_product, *gate_up.chunk(2, dim=1))
            del grad_product, gate_up
            grad_last = last.gradients(grad_out, inner_grad, product, last_inner)
            del product
            grad_normed, inner_grad = project_backward(grad_gate_up, first)
            grad_in, normed = fast(rms_norm_backward)(grad_normed, flat, *ctx.gain, residual)
            grad_first = first.gradients(grad_gate_up, inner_grad, normed, inner)
        grad_x = grad_in.view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None, *grad_first, *grad_last


def _gate_and_up(x: Tensor, gain: Gain, first: Product) -> tuple[Tensor, Tensor]:
    """Gate and up beside each other, and their adapters' inner vectors."""
    wide, own = widened(x, first)
    fast(rms_norm_into)(own, x, *gain)
    return project(wide, first)


def by_position(x: Tensor) -> Tensor:
    """(batch, n, ...) view of (batch, n, in) or (batch, heads, n, D)."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def beside_each_other(grads: Sequence[Tensor]) -> Tensor:
    """(batch * n, out) of the gradients of `normed_linears`' outputs."""
    grad = torch.cat([by_position(x) for x in grads], dim=2) if len(grads) > 1 else by_position(grads[0])
    return grad.reshape(grad.shape[0] * grad.shape[1], -1)
