"""The two halves of a decoder layer, before attention and after it, as autograd functions over products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mage_tune.fused.elementwise import (
    Gains,
    add_norm_into,
    copy_into,
    fast,
    normed_rotated,
    normed_turned_back_into,
    rms_norm_backward,
    rms_norm_into,
    rotated_apart,
    swiglu_backward_into,
    swiglu_into,
    turned_back_into,
)
from mage_tune.fused.product import Product, gradient_of_input, project, room_for_gradient, widened

Gain = tuple[Tensor, float]
"""Weight and epsilon of an RMSNorm."""


@dataclass(frozen=True)
class Products:
    """Linear layers of a decoder layer by the input they read, as they are in one pass."""

    qkv: Product
    out: Product
    gate_up: Product
    down: Product


def before_attention(
    x: Tensor, norm: Any, product: Product, head_dim: int, rotary: tuple[Tensor, Tensor], gains: Gains | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of the normalised input, with adapters.

    Args:
        x: (batch, n, hidden).
        norm: an RMSNorm that is not trained.
        product: q, k and v.
        rotary: cos, sin, (1 or batch, 1, n, D) each.
        gains: of the norms of queries' and keys' heads.

    Returns:
        Queries, keys, values (batch, heads, n, D); and x, for the residual: taken from here, its gradient is added in
        the norm's kernel.
    """
    gain = (norm.weight, norm.variance_epsilon)
    return BeforeAttention.apply(x, gain, product, head_dim, *rotary, gains, *product.adapters)


def after_attention(
    x: Tensor, attended: Tensor, norm: Any, products: Products, recompute: bool = False, skip_last: bool = False
) -> Tensor:
    """s + SwiGLU of the normalised s, with adapters, for s = x + the output layer of what attention gave.

    Args:
        x: (batch, n, hidden), the residual.
        attended: (batch, heads, n, D).
        norm: an RMSNorm that is not trained.
        recompute, skip_last: see `layer_forward`.
    """
    of = products
    adapters = *of.out.adapters, *of.gate_up.adapters, *of.down.adapters
    gain = (norm.weight, norm.variance_epsilon)
    return AfterAttention.apply(x, attended, gain, products, recompute, skip_last, *adapters)


class BeforeAttention(torch.autograd.Function):
    """See `before_attention`. Kept: the input before its norm, inner vectors, and q and k where they have norms.

    The product has q, k and v in one tensor, and so are their gradients made. Head norms keep that tensor, for queries
    and keys as they were; so the values are left in it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Gain,
        product: Product,
        head_dim: int,
        cos: Tensor,
        sin: Tensor,
        gains: Gains | None,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Queries, keys, values, and the input."""
        flat = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            wide, own = widened(flat, product)
            fast(rms_norm_into)(own, flat, *gain)
            out, inner = project(wide, product)
            query, key, value = _by_head(out, x.shape, head_dim).split([size // head_dim for size in product.outs], 1)
            unturned = () if gains is None else (query, key)
            if gains is None:
                query, key, value = fast(rotated_apart)(query, key, value, cos, sin)
            else:
                query, key = fast(normed_rotated)(query, key, *gains, cos, sin)
        ctx.gain, ctx.product, ctx.gains = gain, product, gains
        ctx.save_for_backward(x, inner, cos, sin, *unturned)
        return query, key, value, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        (x, inner, cos, sin, *unturned), product = ctx.saved_tensors, ctx.product
        *of_heads, residual = grads
        flat = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            wide, grad = room_for_gradient(residual, len(flat), product)
            joined = _by_head(grad, x.shape, of_heads[0].shape[-1])
            if ctx.gains is None:
                fast(turned_back_into)(joined.transpose(1, 2), *of_heads, cos, sin)
            else:
                parts = joined.split([part.shape[1] for part in of_heads], 1)
                fast(normed_turned_back_into)(*parts, *of_heads, *unturned, *ctx.gains, cos, sin)
            grad_own, inner_grad = gradient_of_input(wide, product)
            grad_in, normed = fast(rms_norm_backward)(grad_own, flat, *ctx.gain, residual.reshape(flat.shape))
            grad_adapters = product.gradients(grad, inner_grad, normed, inner)
        grad_x = grad_in.view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, *(None,) * 6, *grad_adapters


class AfterAttention(torch.autograd.Function):
    """See `after_attention`.

    Kept: what attention gave, the sum before its norm, inner vectors, and gate and up unless they are recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attended: Tensor,
        gain: Gain,
        products: Products,
        recompute: bool,
        skip_last: bool,
        *adapters: Tensor,
    ) -> Tensor:
        """The output."""
        flat, rows = x.flatten(0, 1), attended.transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            wide, own = widened(flat, products.out)
            fast(copy_into)(own.view(rows.shape), rows)
            added, out_inner = project(wide, products.out)
            wide, own = widened(flat, products.gate_up)
            total = fast(add_norm_into)(own, flat, added, *gain).view(x.shape)
            gate_up, inner = project(wide, products.gate_up)
            wide, own = widened(flat, products.down)
            fast(swiglu_into)(own, *gate_up.chunk(2, 1))
            out, last_inner = project(wide, products.down, skip=skip_last)
            # A sum of the input's own shape: of a view of one, FSDP2 warns that in-place work would lose its hooks.
            out = total if skip_last else total + out.view(x.shape)
        ctx.gain, ctx.products, ctx.dtype = gain, products, x.dtype
        ctx.save_for_backward(
            attended, total, out_inner, last_inner, *((None, None) if recompute else (gate_up, inner))
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of both inputs and of every A and B."""
        attended, total, out_inner, last_inner, gate_up, inner = ctx.saved_tensors
        of, flat, residual = ctx.products, total.flatten(0, 1), grad.flatten(0, 1)
        with torch.autocast(total.device.type, enabled=False):
            if gate_up is None:
                wide, own = widened(flat, of.gate_up)
                fast(rms_norm_into)(own, flat, *ctx.gain)
                gate_up, inner = project(wide, of.gate_up)
            wide, grad_out = room_for_gradient(residual, len(flat), of.down)
            fast(copy_into)(grad_out, residual)
            grad_product, inner_grad = gradient_of_input(wide, of.down)
            grad_gate_up = torch.empty_like(gate_up)
            product = fast(swiglu_backward_into)(*grad_gate_up.chunk(2, 1), grad_product, *gate_up.chunk(2, 1))
            del grad_product, gate_up
            of_down = of.down.gradients(grad_out, inner_grad, product, last_inner)
            del product, wide, grad_out
            grad_normed, inner_grad = gradient_of_input(grad_gate_up, of.gate_up)
            grad_total, normed = fast(rms_norm_backward)(grad_normed, flat, *ctx.gain, residual)
            of_gate_up = of.gate_up.gradients(grad_gate_up, inner_grad, normed, inner)
            del grad_gate_up, grad_normed, normed
            rows, grad_added = attended.transpose(1, 2), grad_total.to(of.out.dtype)
            grad_rows, inner_grad = gradient_of_input(grad_added, of.out)
            of_out = of.out.gradients(grad_added, inner_grad, rows.reshape(grad_rows.shape), out_inner)
        grad_x = grad_total.view(total.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        grad_attended = grad_rows.view(rows.shape).transpose(1, 2).to(attended.dtype)
        return grad_x, grad_attended, *(None,) * 4, *of_out, *of_gate_up, *of_down


def _by_head(x: Tensor, shape: torch.Size, head_dim: int) -> Tensor:
    """(batch, heads, n, D) view of (batch * n, heads * D), for a `shape` that begins with (batch, n)."""
    return x.view(*shape[:2], -1, head_dim).transpose(1, 2)
