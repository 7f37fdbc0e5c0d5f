"""The two halves of a decoder layer as autograd functions over products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mage_tune.fused.elementwise import (
    add_norm_into,
    copy_into,
    fast,
    rms_norm_backward,
    rms_norm_into,
    swiglu_backward_into,
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
    x: Tensor,
    attended: Tensor,
    norm: Any,
    first: Linears,
    last: Linears,
    recompute: bool = False,
    skip_last: bool = False,
) -> Tensor:
    """s + SwiGLU of the normalised s, with adapters, for s = x + attended; flags as in `layer_forward`.

    Args:
        x, attended: (..., hidden): the residual, and what attention adds to it.
        first: gate and up.
        last: down.
    """
    dtype = computing_dtype(x)
    one, two = first.product(dtype), last.product(dtype)
    gain = (norm.weight, norm.variance_epsilon)
    return FeedForward.apply(x, attended, gain, one, two, recompute, skip_last, *one.adapters, *two.adapters)


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
                fast(copy_into)(own.unflatten(0, rows.shape[:2]).unflatten(-1, rows.shape[2:]), rows)
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
    """See `feed_forward`. Kept: the sum before its norm, inner vectors, and gate and up unless they are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        gain: Gain,
        first: Product,
        last: Product,
        recompute: bool,
        skip_last: bool,
        *adapters: Tensor,
    ) -> Tensor:
        """The output."""
        with torch.autocast(x.device.type, enabled=False):
            wide, own = widened(x.flatten(0, -2), first)
            total = fast(add_norm_into)(own, x.flatten(0, -2), attended.flatten(0, -2), *gain).view(x.shape)
            gate_up, inner = project(wide, first)
            gate, up = gate_up.chunk(2, dim=1)
            wide, own = widened(gate, last)
            fast(swiglu_into)(own, gate, up)
            out, last_inner = project(wide, last, skip=skip_last)
            # A sum of the input's own shape: of a view of one, FSDP2 warns that in-place work would lose its hooks.
            out = total if skip_last else total + out.view(x.shape)
        ctx.gain, ctx.first, ctx.last = gain, first, last
        ctx.dtypes = x.dtype, attended.dtype
        ctx.save_for_backward(total, last_inner, *((None, None) if recompute else (gate_up, inner)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of both inputs and of every A and B."""
        total, last_inner, gate_up, inner = ctx.saved_tensors
        first, last, flat = ctx.first, ctx.last, total.flatten(0, -2)
        with torch.autocast(total.device.type, enabled=False):
            if gate_up is None:
                wide, own = widened(flat, first)
                fast(rms_norm_into)(own, flat, *ctx.gain)
                gate_up, inner = project(wide, first)
            residual = grad.reshape(flat.shape)
            grad_out = residual.to(last.dtype)
            grad_product, inner_grad = project_backward(grad_out, last)
            inner_grad = inner_grad.contiguous()  # the rest of that memory is given back before the next product
            grad_gate_up = torch.empty_like(gate_up)
            product = fast(swiglu_backward_into)(*grad_gate_up.chunk(2, 1), grad_product, *gate_up.chunk(2, 1))
            del grad_product, gate_up
            grad_last = last.gradients(grad_out, inner_grad, product, last_inner)
            del product
            grad_normed, inner_grad = project_backward(grad_gate_up, first)
            grad_in, normed = fast(rms_norm_backward)(grad_normed, flat, *ctx.gain, residual)
            grad_first = first.gradients(grad_gate_up, inner_grad, normed, inner)
        grads = [
            grad_in.view(total.shape).to(dtype) if needed else None
            for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        ]
        return *grads, None, None, None, None, None, *grad_first, *grad_last


def by_position(x: Tensor) -> Tensor:
    """(batch, n, ...) view of (batch, n, in) or (batch, heads, n, D)."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def beside_each_other(grads: Sequence[Tensor]) -> Tensor:
    """(batch * n, out) of the gradients of `normed_linears`' outputs; a copy unless one tensor holds them so."""
    parts = [by_position(x) for x in grads]
    batch, n = parts[0].shape[:2]
    width = sum(part[0, 0].numel() for part in parts)
    at = parts[0].data_ptr()
    for part in parts:
        is_there = part.data_ptr() == at and part.stride()[:2] == (n * width, width) and part[0, 0].is_contiguous()
        if not is_there or part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr():
            return torch.cat([part.flatten(2) for part in parts], dim=2).flatten(0, 1)
        at += part[0, 0].numel() * part.element_size()
    return parts[0].as_strided((batch * n, width), (width, 1))
