"""Decoder layers of a training pass with less memory traffic: the same mathematics as transformers' and PEFT's modules.

Between the matrix products a layer mostly moves bytes: PEFT adds each adapter's output in passes of its own, norms and
activations run one operation at a time in float32, and autograd keeps every intermediate. `fuse` gives the layers of a
Llama, Qwen2 or Qwen3 with plain LoRA another training pass:

- an adapter's output is accumulated into its layer's by the product itself, and the products that share an input
  (q, k, v; gate, up) read it once for all their adapters;
- norm, rotary positions and SwiGLU are one kernel each, forward and backward (compiled on a GPU, plain torch else);
- autograd keeps the residual stream, q, k, v, the attention's output, gate and up; the rest is made again in passing.
  That is about half of what the modules keep, which often lets a GPU do without recomputing products.

Parameters, names, saved adapters and decoding are untouched: only calls with `attend` (see `mage_tune.backbone`) take
this way. What is recomputed in the backward pass is chosen by `Recompute`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
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
    projected = normed_linears(hidden, norm, [attention.q_proj, attention.k_proj, attention.v_proj])
    query, key, value = (x.view(heads) for x in projected)
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = Rotate.apply(query.transpose(1, 2), key.transpose(1, 2), *(x[:, None] for x in rotary))
    out = attend(attention.layer_idx, query, key, value.transpose(1, 2), attention.scaling)
    out = out.transpose(1, 2).reshape(batch, length, -1)
    (attended,) = normed_linears(out, None, [attention.o_proj])
    hidden = hidden + attended
    return hidden + feed_forward(hidden, layer.post_attention_layernorm, layer.mlp, recompute_mlp, skip_last)


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
        One (..., out) for each module.
    """
    linears, adapters = _opened(modules)
    gain = None if norm is None else (norm.weight, norm.variance_epsilon)
    return NormedLinears.apply(x, gain, linears, computing_dtype(x), *adapters)


def feed_forward(x: Tensor, norm: Any, mlp: Any, recompute: bool = False, skip_last: bool = False) -> Tensor:
    """SwiGLU of the normalised input, with adapters: (..., hidden) -> (..., hidden); flags as in `layer_forward`."""
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
        with torch.autocast(x.device.type, enabled=False):
            flat = _normed(x.flatten(0, -2), gain, dtype)
            outs, inner = project(flat, linears, adapters)
        ctx.gain, ctx.linears, ctx.dtype = gain, linears, dtype
        ctx.save_for_backward(x, inner, *adapters)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        x, inner, *adapters = ctx.saved_tensors
        flat = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            normed = _normed(flat, ctx.gain, ctx.dtype)
            outs = [grad.reshape(len(flat), -1) for grad in grads]
            needs_input = ctx.needs_input_grad[0]
            grad_in, grad_adapters = project_backward(outs, normed, inner, ctx.linears, adapters, needs_input)
            if needs_input:
                assert grad_in is not None
                grad_in = _normed_backward(grad_in, flat, ctx.gain).view(x.shape)
        return grad_in, None, None, None, *grad_adapters


class FeedForward(torch.autograd.Function):
    """See `feed_forward`. Kept: the input before its norm, and gate and up unless they are recomputed."""

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
        with torch.autocast(x.device.type, enabled=False):
            normed = _normed(x.flatten(0, -2), gain, dtype)
            (gate, up), inner = project(normed, linears[:2], adapters[:first])
            if skip_last:
                out = normed
            else:
                ((out,), _) = project(fast(swiglu)(gate, up), linears[2:], adapters[first:])
        ctx.gain, ctx.linears, ctx.dtype, ctx.first = gain, linears, dtype, first
        ctx.save_for_backward(x, *(() if recompute else (gate, up, inner)), *adapters)
        ctx.recompute = recompute
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Gradients of the input and of every A and B."""
        x, *saved = ctx.saved_tensors
        flat, first = x.flatten(0, -2), ctx.first
        with torch.autocast(x.device.type, enabled=False):
            normed = _normed(flat, ctx.gain, ctx.dtype)
            if ctx.recompute:
                adapters = saved
                (gate, up), inner = project(normed, ctx.linears[:2], adapters[:first])
            else:
                gate, up, inner, *adapters = saved
            last, pair, grads = ctx.linears[2:], adapters[first:], [grad.reshape(len(flat), -1)]
            inner_grads = _inner_gradients(grads, last, pair)
            grad_product = _input_gradient(grads, inner_grads, last, pair)
            product, grad_gate, grad_up = fast(swiglu_backward)(grad_product, gate, up)
            del grad_product, gate, up
            last_inner = product @ pair[0].to(ctx.dtype).T if pair else inner_grads
            grad_last = _adapter_gradients(grads, inner_grads, product, last_inner, last, pair)
            del product
            needs_input = ctx.needs_input_grad[0]
            grad_in, grad_first = project_backward(
                [grad_gate, grad_up], normed, inner, ctx.linears[:2], adapters[:first], needs_input
            )
            if needs_input:
                assert grad_in is not None
                grad_in = _normed_backward(grad_in, flat, ctx.gain).view(x.shape)
        return grad_in, None, None, None, None, None, *grad_first, *grad_last


def project(x: Tensor, linears: Sequence[Frozen], adapters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Linear layers with adapters, without gradient.

    Args:
        x: (n, in) in the dtype of computation.
        linears: layers that read it.
        adapters: A and B of those that have an adapter, in order.

    Returns:
        (n, out) of each, and (n, sum of ranks) x times every A.
    """
    dtype = x.dtype
    firsts = [a.to(dtype) for a in adapters[::2]]
    inner = x @ torch.cat(firsts).T if firsts else x.new_empty(len(x), 0)
    outs, at, seconds = [], 0, iter(adapters[1::2])
    for linear in linears:
        out = F.linear(x, linear.weight(dtype), linear.bias(dtype))
        if linear.has_adapter:
            b = next(seconds)
            out.addmm_(inner[:, at : at + b.shape[1]], (b * linear.scaling).to(dtype).T)
            at += b.shape[1]
        outs.append(out)
    return outs, inner


def project_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    inner: Tensor,
    linears: Sequence[Frozen],
    adapters: Sequence[Tensor],
    needs_input: bool = True,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of `project`: of its input, (n, in), and of every A and B in their own dtype."""
    inner_grads = _inner_gradients(grads, linears, adapters)
    grad_adapters = _adapter_gradients(grads, inner_grads, x, inner, linears, adapters)
    return (_input_gradient(grads, inner_grads, linears, adapters) if needs_input else None), grad_adapters


def _inner_gradients(grads: Sequence[Tensor], linears: Sequence[Frozen], adapters: Sequence[Tensor]) -> Tensor:
    """(n, sum of ranks) gradient of the adapters' inner vectors."""
    seconds = iter(adapters[1::2])
    parts = [
        grad @ (next(seconds) * linear.scaling).to(grad.dtype)
        for grad, linear in zip(grads, linears, strict=True)
        if linear.has_adapter
    ]
    return torch.cat(parts, dim=1) if parts else grads[0].new_empty(len(grads[0]), 0)


def _input_gradient(
    grads: Sequence[Tensor], inner_grads: Tensor, linears: Sequence[Frozen], adapters: Sequence[Tensor]
) -> Tensor:
    """The sum over layers of grad (W + scaling B A), each product added to the same buffer."""
    dtype = grads[0].dtype
    total = grads[0] @ linears[0].weight(dtype)
    for grad, linear in zip(grads[1:], linears[1:], strict=True):
        total.addmm_(grad, linear.weight(dtype))
    if adapters:
        total.addmm_(inner_grads, torch.cat([a.to(dtype) for a in adapters[::2]]))
    return total


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
    of_firsts = inner_grads.T @ x  # (sum of ranks, in)
    found: list[Tensor] = []
    at, pairs = 0, iter(zip(adapters[::2], adapters[1::2], strict=True))
    for grad, linear in zip(grads, linears, strict=True):
        if not linear.has_adapter:
            continue
        a, b = next(pairs)
        columns = slice(at, at + len(a))
        found += [of_firsts[columns].to(a.dtype), (grad.T @ inner[:, columns]).to(b.dtype) * linear.scaling]
        at += len(a)
    return found


# --- elementwise kernels ----------------------------------------------------------------------------------------------


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, one kernel on a GPU: compiled there at its first call for a width, for any number of rows."""

    def call(*args: Any) -> Any:
        tensor = next(x for x in args if isinstance(x, Tensor))
        return (_compiled(function) if tensor.is_cuda else function)(*args)

    return call


def _normed(x: Tensor, gain: Gain | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if gain is None else fast(rms_norm)(x, gain[0], gain[1], dtype)


def _normed_backward(grad: Tensor, x: Tensor, gain: Gain | None) -> Tensor:
    return grad.to(x.dtype) if gain is None else fast(rms_norm_backward)(grad, x, *gain)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm of (n, d) in float32 or better, with transformers' rounding before the weight."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale).to(x.dtype)).to(dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm`'s input, in the input's dtype."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, flowing = wide * scale, _wide(grad) * _wide(weight)
    return (scale * (flowing - unit * (flowing * unit).mean(-1, keepdim=True))).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


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
