"""Decoder layers of a training pass with less memory traffic: the same mathematics as transformers' and PEFT's modules.

Between the matrix products a layer mostly moves bytes: PEFT adds each adapter's output in passes of its own, norms and
activations run one operation at a time in float32, and autograd keeps every intermediate. `fuse` gives the layers of a
Llama, Qwen2 or Qwen3 with plain LoRA another training pass:

- an adapter costs its layer no pass over memory: the input x is widened to [x, A x], the weight to [W, s B], and one
  product gives W x + s B A x; its transpose gives the gradients of x and of A x together. Layers that share an input
  (q, k, v; gate, up) share the widened one, and lie in one matrix. Small models, whose steps wait for the host, keep
  that matrix, and adapters are written into it once a pass. Ranks are padded with zeros to multiples of 8, which
  products of 16-bit numbers need to be fast;
- norm, rotary positions and SwiGLU are one kernel each, forward and backward (compiled on a GPU, plain torch else); the
  gradient of the residual joins that of the norm inside it;
- autograd keeps the residual stream, q, k, v, the attention's output, gate and up; the rest is made again in passing.
  That is about half of what the modules keep, which often lets a GPU do without recomputing products.

Parameters, names, saved adapters and decoding are untouched: only calls with `attend` (see `mage_tune.backbone`) take
this way. What is recomputed in the backward pass is chosen by `Recompute`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mage_tune.backbone import Attend, causal_lm

Recompute = Literal["nothing", "mlp", "layer"]
"""Made again in the backward pass: nothing, the feed-forward's first products, or a layer but its last product."""

SUPPORTED = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' layers of the form norm, q k v, rotary, attention, o, norm, SwiGLU."""


KEPT_BYTES = 2**30
"""Frozen weights of the layers up to which `fuse` keeps their widened copies: steps of small models wait for the host,
which would make them in every pass; larger ones lack the memory rather than the time."""


def fuse(
    model: nn.Module, recompute: Recompute = "nothing", *, offload: bool = False, kept_bytes: int = KEPT_BYTES
) -> None:
    """Give every decoder layer the training pass of this module; decoding and saving stay as they are.

    Args:
        model: what `backbone.attach_adapter` returned, or a bare model.
        recompute: what the backward pass makes again.
        offload: hold the layers' inputs in host memory until then (needs recompute "layer").
        kept_bytes: see KEPT_BYTES.

    Raises:
        ValueError: a layer or adapter is of a kind whose arithmetic differs.
    """
    layers: Any = causal_lm(model).model.layers
    frozen = [p for p in layers.parameters() if not p.requires_grad]
    is_packed = any(hasattr(p, "quant_state") for p in frozen)  # unpacked, 4-bit weights would take four times the room
    keep = not is_packed and sum(p.numel() * p.element_size() for p in frozen) <= kept_bytes
    for layer in layers:
        refuse_unsupported(layer)
        linears = layer_linears(layer, keep)
        layer.forward = MethodType(_training_forward(layer.forward, linears, recompute, offload), layer)


def refuse_unsupported(layer: Any) -> None:
    """Check that `fuse` knows the arithmetic of a layer.

    Raises:
        ValueError: it does not.
    """
    kind = type(layer).__name__
    if kind not in SUPPORTED:
        raise ValueError(f"train.kernels: fused does not know {kind}; write plain")
    if layer.mlp.config.hidden_act != "silu":
        raise ValueError(f"train.kernels: fused knows SwiGLU, not {layer.mlp.config.hidden_act}; write plain")
    for name, module in layer.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.lora_variant or any(isinstance(drop, nn.Dropout) for drop in module.lora_dropout.values()):
            raise ValueError(f"train.kernels: fused has neither DoRA nor dropout on adapters ({name}); write plain")
        if len(module.active_adapters) > 1:
            raise ValueError(f"train.kernels: fused trains one adapter, not {len(module.active_adapters)} ({name})")


def _training_forward(
    plain: Callable[..., Any], linears: LayerLinears, recompute: Recompute, offload: bool
) -> Callable[..., Tensor]:
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        attend: Attend | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if attend is None:
            return plain(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        assert position_embeddings is not None  # every supported model passes them
        rotary = position_embeddings
        if recompute != "layer" or not torch.is_grad_enabled():
            return layer_forward(self, linears, hidden_states, rotary, attend, recompute_mlp=recompute == "mlp")
        return _recomputed(
            lambda hidden, is_again: layer_forward(self, linears, hidden, rotary, attend, skip_last=is_again),
            hidden_states,
            offload,
        )

    return forward


def layer_forward(
    layer: Any,
    linears: LayerLinears,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Attend,
    *,
    recompute_mlp: bool = False,
    skip_last: bool = False,
) -> Tensor:
    """One decoder layer on (batch, n, hidden) states.

    Args:
        layer: a supported transformers layer, with or without adapters.
        linears: its linear layers.
        rotary: cos, sin, (1 or batch, n, D) each.
        attend: see `mage_tune.backbone`.
        recompute_mlp: keep the feed-forward's input alone.
        skip_last: leave out the last product, whose value a recomputation needs nowhere; the result is then garbage.
    """
    attention = layer.self_attn
    query, key, value, hidden = normed_linears(hidden, layer.input_layernorm, linears.qkv, attention.head_dim)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key, value = Rotate.apply(query, key, value, *(x[:, None] for x in rotary))
    out = attend(attention.layer_idx, query, key, value, attention.scaling)
    (attended,) = normed_linears(out, None, linears.out)
    hidden = hidden + attended
    return feed_forward(hidden, layer.post_attention_layernorm, linears.gate_up, linears.down, recompute_mlp, skip_last)


# --- linear layers with adapters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """A linear layer whose weight is not trained: its module, and the scale of the adapter beside it."""

    base: Any
    scaling: float
    has_adapter: bool

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in the dtype of computation; 4-bit weights are unpacked anew."""
        stored = self.base.weight
        state = getattr(stored, "quant_state", None)
        if state is None:
            return stored.detach().to(dtype)
        from bitsandbytes.functional import dequantize_4bit  # (an extra; whoever has such weights has it)

        return dequantize_4bit(stored.data, state).to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(out,) or None."""
        found = getattr(self.base, "bias", None)
        return None if found is None else found.detach().to(dtype)


def opened(module: nn.Module) -> tuple[Frozen, list[Tensor]]:
    """A linear layer, and the A (rank, in) and B (out, rank) of its adapter where one is active."""
    if not isinstance(module, LoraLayer):
        return Frozen(module, 0.0, False), []
    if module.disable_adapters or module.merged or not module.active_adapters:
        return Frozen(module.get_base_layer(), 0.0, False), []
    (name,) = module.active_adapters
    if name not in module.lora_A:
        return Frozen(module.get_base_layer(), 0.0, False), []
    pair: list[Any] = [module.lora_A[name].weight, module.lora_B[name].weight]
    return Frozen(module.get_base_layer(), module.scaling[name], True), pair


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def padded(rank: int) -> int:
    """Columns that an adapter's inner vectors take: rows of 16-bit numbers must be multiples of 16 bytes."""
    return -(-rank // 8) * 8


@dataclass(frozen=True)
class Place:
    """An adapter in the product of its layers: A (rank, in), B (out, rank), and where B lies in the matrix."""

    a: Tensor
    b: Tensor
    scaling: float
    rows: slice
    """Of the layer's outputs."""
    inner: slice
    """Of the adapter's inner vector."""


class Product:
    """Linear layers that read one input, side by side: one product makes all of their outputs.

    Its matrix for q, k and v, whose input is [x, A_q x, A_k x, A_v x]:

        [ W_q  s B_q   0      0   ]
        [ W_k   0     s B_k   0   ]
        [ W_v   0      0    s B_v ]

    Args:
        linears: the layers.
        adapters: A and B of those that have an adapter, in order.
        dtype: of computation.
        is_kept: the matrix is made once; `refresh` writes adapters into it. Else it is made whenever it is asked for.
    """

    def __init__(self, linears: Sequence[Frozen], adapters: Sequence[Tensor], dtype: torch.dtype, is_kept: bool):
        self.linears, self.adapters, self.dtype = linears, adapters, dtype
        self.size = linears[0].base.in_features
        self.outs = [linear.base.out_features for linear in linears]
        self.places: list[Place] = []
        row = at = 0
        pairs = iter(zip(adapters[::2], adapters[1::2], strict=True))
        for linear, out in zip(linears, self.outs, strict=True):
            if linear.has_adapter:
                a, b = next(pairs)
                self.places.append(Place(a, b, linear.scaling, slice(row, row + out), slice(at, at + len(a))))
                at += padded(len(a))
            row += out
        self.inner = at
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None
        if is_kept:
            self._kept = self._empty_firsts(), self._frozen_matrix(), self._joined_bias()
            firsts, matrix, _ = self._kept
            self._of_a, self._of_b = self._views(firsts, matrix)

    def refresh(self) -> None:
        """Bring what is kept up to date with the adapters."""
        if self._kept is not None and self.places:
            self._write_firsts(self._of_a)
            self._write_seconds(self._of_b)

    def firsts(self) -> Tensor:
        """(inner, in): every A; rows up to the padded ranks are zeros."""
        if self._kept is not None:
            return self._kept[0]
        found = self._empty_firsts()
        self._write_firsts([found[place.inner] for place in self.places])
        return found

    def matrix(self) -> Tensor:
        """(out, in + inner); see the class."""
        if self._kept is not None:
            return self._kept[1]
        found = self._frozen_matrix()
        self._write_seconds(self._views(found, found)[1])
        return found

    def bias(self) -> Tensor | None:
        """(out,) or None."""
        return self._joined_bias() if self._kept is None else self._kept[2]

    def gradients(self, grad: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor) -> list[Tensor]:
        """Gradients of every A and B, in order, in their own dtype.

        Args:
            grad, inner_grad: (n, out), (n, inner), of outputs and inner vectors.
            x, inner: (n, in), (n, inner), the input and the inner vectors.
        """
        if not self.places:
            return []
        of_firsts = (inner_grad.T @ x).to(self.adapters[0].dtype)  # (inner, in)
        of_seconds = (grad.T @ inner).to(self.adapters[0].dtype)  # (out, inner), where blocks alone are of use
        found: list[Tensor] = []
        for place in self.places:
            found += [of_firsts[place.inner], of_seconds[place.rows, place.inner] * place.scaling]
        return found

    def _empty_firsts(self) -> Tensor:
        return self.linears[0].base.weight.new_zeros(self.inner, self.size, dtype=self.dtype)

    def _frozen_matrix(self) -> Tensor:
        found = self.linears[0].base.weight.new_empty(sum(self.outs), self.size + self.inner, dtype=self.dtype)
        found[:, self.size :] = 0
        for linear, part in zip(self.linears, found[:, : self.size].split(self.outs), strict=True):
            part.copy_(linear.weight(self.dtype))
        return found

    def _joined_bias(self) -> Tensor | None:
        found = [linear.bias(self.dtype) for linear in self.linears]
        like = next((bias for bias in found if bias is not None), None)
        if like is None or len(found) == 1:
            return like
        sizes = zip(found, self.outs, strict=True)
        return torch.cat([like.new_zeros(out) if bias is None else bias for bias, out in sizes])

    def _views(self, firsts: Tensor, matrix: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where every A lies in the one, and every B in the other."""
        seconds = matrix[:, self.size :]
        return [firsts[p.inner] for p in self.places], [seconds[p.rows, p.inner] for p in self.places]

    def _write_firsts(self, views: list[Tensor]) -> None:
        if views:
            torch._foreach_copy_(views, [place.a for place in self.places])

    def _write_seconds(self, views: list[Tensor]) -> None:
        for view, place in zip(views, self.places, strict=True):
            torch.mul(place.b, place.scaling, out=view)


class Linears:
    """Modules that read one input, PEFT's linear layers or plain ones, and their product as it is now.

    Args:
        modules: linear layers.
        keep: hold the product's matrix while adapters are on: as many bytes again as the frozen weights, and no work
            for them in a pass.
    """

    def __init__(self, modules: Sequence[nn.Module], keep: bool = False) -> None:
        self.modules, self.keep = modules, keep
        self._last: Product | None = None

    @torch.no_grad()
    def product(self, dtype: torch.dtype) -> Product:
        """With the values that the adapters have now."""
        found = [opened(module) for module in self.modules]
        linears, adapters = [linear for linear, _ in found], [tensor for _, pair in found for tensor in pair]
        last = self._last
        if last is None or not (
            last.dtype == dtype
            and last.linears == linears
            and len(last.adapters) == len(adapters)
            and all(old is new for old, new in zip(last.adapters, adapters, strict=True))
        ):
            last = Product(linears, adapters, dtype, self.keep and bool(adapters))
            if self.keep and adapters:
                self._last = last
        last.refresh()
        return last


@dataclass(frozen=True)
class LayerLinears:
    """Linear layers of a decoder layer by the input they read."""

    qkv: Linears
    out: Linears
    gate_up: Linears
    down: Linears


def layer_linears(layer: Any, keep: bool = False) -> LayerLinears:
    """Those of a supported layer; `keep` as in `Linears`."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerLinears(
        Linears([attention.q_proj, attention.k_proj, attention.v_proj], keep),
        Linears([attention.o_proj], keep),
        Linears([mlp.gate_proj, mlp.up_proj], keep),
        Linears([mlp.down_proj], keep),
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
            out = flat if skip_last else flat + out
        ctx.gain, ctx.first, ctx.last = gain, first, last
        ctx.save_for_backward(x, last_inner, *((None, None) if recompute else (gate_up, inner)))
        return out.view(x.shape)

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


def widened(x: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Room for the input of `project`, for as many rows as x has positions; and its first `in` columns."""
    rows = len(x) if x.dim() == 2 else x.shape[0] * x.shape[1]
    wide = x.new_empty(rows, product.size + product.inner, dtype=product.dtype)
    return wide, wide[:, : product.size]


def project(wide: Tensor, product: Product, skip: bool = False) -> tuple[Tensor, Tensor]:
    """The product, without gradient.

    Args:
        wide: (n, in + inner): the input, and room for the adapters' inner vectors, which are written there.
        skip: make the inner vectors alone; the outputs are empty.

    Returns:
        (n, out), and (n, inner), the input times every A.
    """
    if product.places:
        inner = wide[:, : product.size] @ product.firsts().T
        wide[:, product.size :] = inner
    else:
        inner = wide.new_empty(len(wide), 0)
    return wide.new_empty(0) if skip else F.linear(wide, product.matrix(), product.bias()), inner


def project_backward(grad: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """(n, in), (n, inner) gradients of the input of `project`, by all ways, and of the inner vectors."""
    wide = torch.mm(grad, product.matrix())
    own, inner = wide[:, : product.size], wide[:, product.size :]
    return own.addmm_(inner, product.firsts()) if product.places else own, inner


# --- elementwise kernels ----------------------------------------------------------------------------------------------


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


# --- recomputation ----------------------------------------------------------------------------------------------------


class Parked:
    """A tensor in host memory, page-locked where it comes from a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        # Later work of this stream overwrites the original only after the copy, and reads it here after `fetch`.
        self.held.copy_(tensor.detach(), non_blocking=True)

    def fetch(self) -> Tensor:
        """On its device again."""
        return self.held.to(self.device, non_blocking=True)


def offloaded_checkpoint(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """In place of torch's `checkpoint` in transformers' layers: their input waits in host memory."""
    return _recomputed(lambda x, is_again: run(x), hidden, offload=True)


def _recomputed(run: Callable[[Tensor, bool], Tensor], hidden: Tensor, offload: bool) -> Tensor:
    """`run(hidden, is_again)` without what autograd would keep; made again, with is_again, in the backward pass.

    With `offload` nothing on the device refers to `hidden` after the pass: the recomputation reads it from the host.
    """
    held = _Held(hidden, offload)
    return checkpoint(lambda: run(*held.take()), use_reentrant=False)


class _Held:
    """The input of a layer: first the tensor itself, so that its graph goes on, then its values alone."""

    def __init__(self, hidden: Tensor, offload: bool) -> None:
        self.first: Tensor | None = hidden
        self.needs_gradient = hidden.requires_grad
        self.later: Parked | Tensor = Parked(hidden) if offload else hidden.detach()

    def take(self) -> tuple[Tensor, bool]:
        """(input, whether it is a recomputation)."""
        if self.first is not None:
            hidden, self.first = self.first, None
            return hidden, False
        values = self.later.fetch() if isinstance(self.later, Parked) else self.later
        return values.detach().requires_grad_(self.needs_gradient), True
