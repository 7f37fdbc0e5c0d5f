"""Which layers take the fused training pass, and what that pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mage_tune.backbone import Attend, causal_lm
from mage_tune.fused.elementwise import Gains
from mage_tune.fused.passes import Products, after_attention, before_attention
from mage_tune.fused.product import Linears, computing_dtype, refresh
from mage_tune.fused.recompute import recomputed

Recompute = Literal["nothing", "mlp", "layer"]
"""Made again in the backward pass: nothing, the feed-forward's first products, or a layer but its last product."""


SUPPORTED = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""transformers' layers of the form norm, q k v, rotary, attention, o, norm, SwiGLU."""


KEPT_BYTES = 2**30
"""Bytes of the layers' frozen weights up to which `fuse` keeps their widened copies, 1.4 times as many in SmolLM2's
shape: steps of small models wait for the host, which would make them in every pass; larger ones lack the memory rather
than the time."""


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
        return recomputed(
            lambda hidden, is_again: layer_forward(self, linears, hidden, rotary, attend, skip_last=is_again),
            hidden_states,
            offload,
        )

    return forward


@dataclass(frozen=True)
class LayerLinears:
    """Linear layers of a decoder layer by the input they read."""

    qkv: Linears
    out: Linears
    gate_up: Linears
    down: Linears

    @torch.no_grad()
    def products(self, dtype: torch.dtype) -> Products:
        """With the values that the adapters have now."""
        found = Products(*(each.product(dtype) for each in (self.qkv, self.out, self.gate_up, self.down)))
        refresh((found.qkv, found.out, found.gate_up, found.down))
        return found


def layer_linears(layer: Any, keep: bool = False) -> LayerLinears:
    """Those of a supported layer; `keep` as in `Linears`."""
    attention, mlp = layer.self_attn, layer.mlp
    return LayerLinears(
        Linears([attention.q_proj, attention.k_proj, attention.v_proj], keep, stack=True),
        Linears([attention.o_proj], keep),
        Linears([mlp.gate_proj, mlp.up_proj], keep),
        Linears([mlp.down_proj], keep, stack=True),
    )


def head_gains(attention: Any) -> Gains | None:
    """Of the norms of queries' and keys' heads, which Qwen3 has."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight.detach(), attention.k_norm.weight.detach(), attention.q_norm.variance_epsilon


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
    products = linears.products(computing_dtype(hidden))
    cos, sin = (x[:, None] for x in rotary)
    query, key, value, hidden = before_attention(
        hidden, layer.input_layernorm, products.qkv, attention.head_dim, (cos, sin), head_gains(attention)
    )
    attended = attend(attention.layer_idx, query, key, value, attention.scaling)
    return after_attention(hidden, attended, layer.post_attention_layernorm, products, recompute_mlp, skip_last)
