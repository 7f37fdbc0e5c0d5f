"""Decoder layers of a training pass with less memory traffic: the same mathematics as transformers' and PEFT's modules.

Between the matrix products a layer mostly moves bytes: PEFT adds each adapter's output in passes of its own, norms and
activations run one operation at a time in float32, and autograd keeps every intermediate. `fuse` gives the layers of a
Llama, Qwen2 or Qwen3 with plain LoRA another training pass:

- an adapter costs its layer no pass over memory: the input x is widened to [x, A x], the weight to [W, s B], and one
  product gives W x + s B A x; its transpose gives the gradients of x and of A x together. Layers that share an input
  (q, k, v; gate, up) share the widened one. Ranks are padded with zeros to multiples of 8, which products of 16-bit
  numbers need to be fast;
- norm, rotary positions and SwiGLU are one kernel each, forward and backward (compiled on a GPU, plain torch else); the
  gradient of the residual joins that of the norm inside it;
- autograd keeps the residual stream, q, k, v, the attention's output, gate and up; the rest is made again in passing.
  That is about half of what the modules keep, which often lets a GPU do without recomputing products.

Parameters, names, saved adapters and decoding are untouched: only calls with `attend` (see `mage_tune.backbone`) take
this way. What is recomputed in the backward pass is chosen by `Recompute`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def fuse(model: nn.Module, recompute: Recompute = "nothing", *, offload: bool = False) -> None:
    """Give every decoder layer the training pass of this module; decoding and saving stay as they are.

    Args:
        model: what `backbone.attach_adapter` returned, or a bare model.
        recompute: what the backward pass makes again.
        offload: hold the layers' inputs in host memory until then (needs recompute "layer").

    Raises:
        ValueError: a layer or adapter is of a kind whose arithmetic differs.
    """
    for layer in causal_lm(model).model.layers:
        refuse_unsupported(layer)
        layer.forward = MethodType(_training_forward(layer.forward, recompute, offload), layer)


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


def _training_forward(plain: Callable[..., Any], recompute: Recompute, offload: bool) -> Callable[..., Tensor]:
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
            return layer_forward(self, hidden_states, rotary, attend, recompute_mlp=recompute == "mlp")
        return _recomputed(
            lambda hidden, is_again: layer_forward(self, hidden, rotary, attend, skip_last=is_again),
            hidden_states,
            offload,
        )

    return forward


def layer_forward(
    layer: Any,
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
        rotary: cos, sin, (1 or batch, n, D) each.
        attend: see `mage_tune.backbone`.
        recompute_mlp: keep the feed-forward's input alone.
        skip_last: leave out the last product, whose value a recomputation needs nowhere; the result is then garbage.
    """
    attention, norm = layer.self_attn, layer.input_layernorm
    batch, length, _ = hidden.shape
    heads = (batch, length, -1, attention.head_dim)
    *projected, hidden = normed_linears(hidden, norm, [attention.q_proj, attention.k_proj, attention.v_proj])
    query, key, value = (x.view(heads) for x in projected)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = Rotate.apply(query.transpose(1, 2), key.transpose(1, 2), *(x[:, None] for x in rotary))
    out = attend(attention.layer_idx, query, key, value.transpose(1, 2), attention.scaling)
    out = out.transpose(1, 2).reshape(batch, length, -1)
    (attended,) = normed_linears(out, None, [attention.o_proj])
    return feed_forward(hidden + attended, layer.post_attention_layernorm, layer.mlp, recompute_mlp, skip_last)


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


def normed_linears(x: Tensor, norm: nn.Module | None, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Linear layers, with their adapters, of one (normalised) input.

    Args:
        x: (..., in).
        norm: an RMSNorm that is not trained, or None.
        modules: linear layers, PEFT's or plain.

    Returns:
        One (..., out) for each module; with a norm also x, for the residual: taken from here, its gradient is added in
        the norm's kernel.
    """
    linears, adapters = _opened(modules)
    gain = None if norm is None else (norm.weight, norm.variance_epsilon)
    return NormedLinears.apply(x, gain, linears, computing_dtype(x), *adapters)


def feed_forward(x: Tensor, norm: Any, mlp: Any, recompute: bool = False, skip_last: bool = False) -> Tensor:
    """x + SwiGLU of the normalised x, with adapters: (..., hidden) -> (..., hidden); flags as in `layer_forward`."""
    linears, adapters = _opened([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
    gain = (norm.weight, norm.variance_epsilon)
    return FeedForward.apply(x, gain, linears, computing_dtype(x), recompute, skip_last, *adapters)


def _opened(modules: Sequence[nn.Module]) -> tuple[list[Frozen], list[Tensor]]:
    found = [opened(module) for module in modules]
    return [linear for linear, _ in found], [tensor for _, pair in found for tensor in pair]


Gain = tuple[Tensor, float]
"""Weight and epsilon of an RMSNorm."""


class NormedLinears(torch.autograd.Function):
    """See `normed_linears`. Kept: the input before its norm, and the adapters' inner vectors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Gain | None, linears: list[Frozen], dtype: torch.dtype, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """The layers' outputs."""
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            wide, own = widened(flat, inner_width(adapters), dtype)
            _normed_into(own, flat, gain)
            outs, inner = project(wide, linears, adapters)
        ctx.gain, ctx.linears, ctx.dtype = gain, linears, dtype
        ctx.save_for_backward(x, inner, *adapters)
        outs = [out.view(*x.shape[:-1], -1) for out in outs]
        return tuple(outs) if gain is None else (*outs, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        x, inner, *adapters = ctx.saved_tensors
        flat, size = x.flatten(0, -2), x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            outs = [grad.reshape(len(flat), -1) for grad in grads]
            residual = None if ctx.gain is None else outs.pop()
            grad_wide = project_backward(outs, size, ctx.linears, adapters, ctx.dtype)
            grad_normed = _input_gradient(grad_wide, size, adapters)
            grad_in, normed = _normed_backward(grad_normed, flat, ctx.gain, residual)
            inner_grads = grad_wide[:, size:]
            grad_adapters = _adapter_gradients(outs, inner_grads, normed, inner, ctx.linears, adapters)
        return grad_in.view(x.shape) if ctx.needs_input_grad[0] else None, None, None, None, *grad_adapters


class FeedForward(torch.autograd.Function):
    """See `feed_forward`. Kept: input before its norm, inner vectors, and gate and up unless they are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Gain,
        linears: list[Frozen],
        dtype: torch.dtype,
        recompute: bool,
        skip_last: bool,
        *adapters: Tensor,
    ) -> Tensor:
        """The output."""
        first = 2 * sum(linear.has_adapter for linear in linears[:2])
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            gate, up, inner = _gate_and_up(flat, gain, linears, dtype, adapters[:first])
            wide, own = widened(gate, inner_width(adapters[first:]), dtype)
            fast(swiglu_into)(own, gate, up)
            outs, last_inner = project(wide, linears[2:][: 1 - skip_last], adapters[first:])
            out = flat + outs[0] if outs else flat
        ctx.gain, ctx.linears, ctx.dtype, ctx.first = gain, linears, dtype, first
        ctx.save_for_backward(x, last_inner, *((None,) * 3 if recompute else (gate, up, inner)), *adapters)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        x, last_inner, gate, up, inner, *adapters = ctx.saved_tensors
        flat, size, dtype = x.flatten(0, -2), x.shape[-1], ctx.dtype
        adapters, pair = adapters[: ctx.first], adapters[ctx.first :]
        with torch.autocast(x.device.type, enabled=False):
            if gate is None:
                gate, up, inner = _gate_and_up(flat, ctx.gain, ctx.linears, dtype, adapters)
            residual = grad.reshape(len(flat), -1)
            grads = [residual.to(dtype)]
            grad_wide = project_backward(grads, gate.shape[1], ctx.linears[2:], pair, dtype)
            inner_grads = grad_wide[:, gate.shape[1] :].contiguous()
            grad_product = _input_gradient(grad_wide, gate.shape[1], pair)
            product, grad_gate, grad_up = fast(swiglu_backward)(grad_product, gate, up)
            del grad_wide, grad_product, gate, up
            grad_last = _adapter_gradients(grads, inner_grads, product, last_inner, ctx.linears[2:], pair)
            del product
            grads = [grad_gate, grad_up]
            grad_wide = project_backward(grads, size, ctx.linears[:2], adapters, dtype)
            grad_normed = _input_gradient(grad_wide, size, adapters)
            grad_in, normed = _normed_backward(grad_normed, flat, ctx.gain, residual)
            grad_first = _adapter_gradients(grads, grad_wide[:, size:], normed, inner, ctx.linears[:2], adapters)
        grad_x = grad_in.view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None, *grad_first, *grad_last


def _gate_and_up(
    x: Tensor, gain: Gain, linears: Sequence[Frozen], dtype: torch.dtype, adapters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up, and their adapters' inner vectors."""
    wide, own = widened(x, inner_width(adapters), dtype)
    _normed_into(own, x, gain)
    (gate, up), inner = project(wide, linears[:2], adapters)
    return gate, up, inner


def padded(rank: int) -> int:
    """Columns that an adapter's inner vectors take: rows of 16-bit numbers must be multiples of 16 bytes."""
    return -(-rank // 8) * 8


def inner_width(adapters: Sequence[Tensor]) -> int:
    """Columns of the inner vectors of some A and B, in order."""
    return sum(padded(len(a)) for a in adapters[::2])


def widened(x: Tensor, inner: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for (n, in + inner) in the dtype of computation, and its first `in` columns, to be filled."""
    wide = x.new_empty(len(x), x.shape[1] + inner, dtype=dtype)
    return wide, wide[:, : x.shape[1]]


def project(wide: Tensor, linears: Sequence[Frozen], adapters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Linear layers with adapters, without gradient.

    Args:
        wide: (n, in + inner): the input, and room for the adapters' inner vectors, which are written there.
        linears: layers that read it.
        adapters: A and B of those that have an adapter, in order.

    Returns:
        (n, out) of each, and (n, inner), the input times every A.
    """
    size = wide.shape[1] - inner_width(adapters)
    inner = wide[:, :size] @ _firsts(adapters, wide.dtype).T if adapters else wide.new_empty(len(wide), 0)
    wide[:, size:] = inner
    weights = _wide_weights(linears, adapters, wide.dtype)
    outs = [
        F.linear(wide[:, : weight.shape[1]], weight, linear.bias(wide.dtype))
        for linear, weight in zip(linears, weights, strict=True)
    ]
    return outs, inner


def project_backward(
    grads: Sequence[Tensor], size: int, linears: Sequence[Frozen], adapters: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """(n, in + inner) gradient of the widened input of `project`, whose own width is `size`."""
    total = grads[0].new_empty(len(grads[0]), size + inner_width(adapters))
    for number, (grad, weight) in enumerate(zip(grads, _wide_weights(linears, adapters, dtype), strict=True)):
        part = total[:, : weight.shape[1]]
        if number == 0:
            torch.mm(grad, weight, out=part)
            total[:, weight.shape[1] :] = 0
        else:
            part.addmm_(grad, weight)
    return total


def _input_gradient(grad_wide: Tensor, size: int, adapters: Sequence[Tensor]) -> Tensor:
    """(n, in) gradient of the input by way of the weights and of the adapters; in place."""
    own = grad_wide[:, :size]
    return own.addmm_(grad_wide[:, size:], _firsts(adapters, own.dtype)) if adapters else own


def _firsts(adapters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(inner, in): every A, padded with rows of zeros."""
    parts = []
    for a in adapters[::2]:
        parts.append(a)
        if missing := padded(len(a)) - len(a):
            parts.append(a.new_zeros(missing, a.shape[1]))
    return torch.cat(parts).to(dtype)


def _wide_weights(linears: Sequence[Frozen], adapters: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """(out, in + inner) of each layer: its weight, and its scaled B at its own place among zeros.

    One at a time, as together they may be large. Layers without an adapter have (out, in).
    """
    inner, at, seconds = inner_width(adapters), 0, iter(adapters[1::2])
    for linear in linears:
        weight = linear.weight(dtype)
        if linear.has_adapter:
            b = next(seconds)
            parts, end = [weight, (b * linear.scaling).to(dtype)], at + b.shape[1]
            if b.shape[1] < inner:  # few launches: a small model's step waits for them
                zeros = weight.new_zeros(len(weight), inner)
                parts = [weight, zeros[:, :at], parts[1], zeros[:, end:]]
            weight, at = torch.cat(parts, dim=1), at + padded(b.shape[1])
        yield weight


def _adapter_gradients(
    grads: Sequence[Tensor],
    inner_grads: Tensor,
    x: Tensor,
    inner: Tensor,
    linears: Sequence[Frozen],
    adapters: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of every A and B, in order, in their own dtype."""
    if not adapters:
        return []
    of_firsts = inner_grads.T @ x  # (inner, in)
    found: list[Tensor] = []
    at, pairs = 0, iter(zip(adapters[::2], adapters[1::2], strict=True))
    for grad, linear in zip(grads, linears, strict=True):
        if not linear.has_adapter:
            continue
        a, b = next(pairs)
        rank, width = len(a), padded(len(a))
        of_second = (grad.T @ inner[:, at : at + width])[:, :rank]
        found += [of_firsts[at : at + rank].to(a.dtype), of_second.to(b.dtype) * linear.scaling]
        at += width
    return found


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


def _normed_into(out: Tensor, x: Tensor, gain: Gain | None) -> None:
    if gain is None:
        out.copy_(x)
    else:
        fast(rms_norm_into)(out, x, *gain)


def _normed_backward(grad: Tensor, x: Tensor, gain: Gain | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return (grad.to(x.dtype), x.to(grad.dtype)) if gain is None else fast(rms_norm_backward)(grad, x, *gain, residual)


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


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product once more, and the gradients of gate and up."""
    wide, flowing = _wide(gate), _wide(grad)
    sigmoid = torch.sigmoid(wide)
    silu = wide * sigmoid
    of_gate = flowing * _wide(up) * (sigmoid + silu * (1 - sigmoid))
    return silu.to(gate.dtype) * up, of_gate.to(gate.dtype), (flowing * silu).to(up.dtype)


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of (batch, heads, n, D) queries and keys, in the half-split form of Llama and Qwen."""
    cos, sin = _wide(cos), _wide(sin)

    def turn(x: Tensor) -> Tensor:
        first, second = _wide(x).chunk(2, dim=-1)
        return (_wide(x) * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

    return turn(query), turn(key)


class Rotate(torch.autograd.Function):
    """`rotated`; the backward pass turns back, as both halves of `sin` are alike."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turned queries and keys."""
        ctx.save_for_backward(cos, sin)
        return fast(rotated)(query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients, turned back."""
        cos, sin = ctx.saved_tensors
        return *fast(rotated)(grad_query, grad_key, cos, -sin), None, None


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
