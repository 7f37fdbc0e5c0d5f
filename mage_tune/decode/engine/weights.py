"""What the engine needs of a model: its shape, and its weights merged into few large matrices.

Weights come from a transformers model of a supported architecture (an attached adapter is merged into the engine's own
copy; the model stays as it was) or are drawn at random on the device, for timings of published shapes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mage_tune.backbone import causal_lm
from mage_tune.families import PUBLISHED

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""transformers classes whose forward pass the engine knows."""

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rope scalings whose frequencies do not depend on the length reached."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model."""

    name: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    is_tied: bool = False
    """Whether the output head is the embedding."""
    has_qkv_bias: bool = False
    has_qk_norm: bool = False

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_rows(self) -> int:
        """Output size of the merged query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def matmul_weights(self) -> int:
        """Numbers that every forward pass multiplies with: all matrices and the output head, not the embedding."""
        attention = self.hidden * (self.qkv_rows + self.num_heads * self.head_dim)
        return self.num_layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocab

    @property
    def stored_weights(self) -> int:
        """Numbers in memory (norms and biases left out)."""
        return self.matmul_weights + (0 if self.is_tied else self.hidden * self.vocab)

    @property
    def kv_per_token(self) -> int:
        """Numbers cached for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _published(name: str) -> Shape:
    """The shape of a model in `families.published`."""
    sizes = PUBLISHED[name].sizes
    return Shape(
        name=name.upper(),
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        vocab=sizes["vocab_size"],
        is_tied=sizes["tie_embeddings"],
        has_qkv_bias=sizes["architecture"] == "qwen2",
        has_qk_norm=sizes["architecture"] == "qwen3",
    )


QWEN_1_5B, QWEN_7B, SDAR_8B = map(_published, ("1.5b", "7b", "sdar-8b"))
SHAPES = {shape.name: shape for shape in (QWEN_1_5B, QWEN_7B, SDAR_8B)}
"""Published models (families.md); timings need nothing but their shapes."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer; matrices are (outputs, inputs) as in nn.Linear."""

    attention_norm: Tensor
    """(hidden,)"""
    qkv: Tensor
    """((query heads + 2 * KV heads) * D, hidden): queries, then keys, then values."""
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    """(D,), where heads are normalised before rope."""
    key_norm: Tensor | None
    out: Tensor
    """(hidden, query heads * D)"""
    mlp_norm: Tensor
    gate_up: Tensor
    """(2 * intermediate, hidden): gate, then up."""
    down: Tensor
    """(hidden, intermediate)"""


@dataclass(frozen=True)
class Weights:
    """A whole model."""

    shape: Shape
    embedding: Tensor
    """(vocab, hidden)"""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor
    """(vocab, hidden); the embedding itself where they are tied."""
    inverse_frequency: Tensor
    """(D / 2,) float32 rope frequencies."""
    rope_scale: float = 1.0
    """Factor on cosines and sines (yarn's attention factor)."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights, activations and cache."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.embedding.device

    def rope_table(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0..length-1, each (length, D / 2) float32."""
        position = torch.arange(length, device=self.device, dtype=torch.float32)
        angle = position[:, None] * self.inverse_frequency
        return angle.cos() * self.rope_scale, angle.sin() * self.rope_scale


@torch.no_grad()
def weights_of(model: nn.Module) -> Weights:
    """A transformers model's weights, an attached adapter merged into a copy; what needs no merging is shared with it.

    Args:
        model: bare or with adapters; it is not changed.

    Raises:
        ValueError: the engine does not know the architecture or one of its options.
    """
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    lm = causal_lm(model)
    shape = _shape_of(lm)
    body, rotary = lm.model, lm.model.rotary_emb
    head = lm.get_output_embeddings().weight
    return Weights(
        shape=shape,
        embedding=body.embed_tokens.weight.detach(),
        layers=tuple(_layer_weights(layer, shape) for layer in body.layers),
        final_norm=body.norm.weight.detach(),
        head=head.detach(),
        inverse_frequency=rotary.inv_freq.detach().float(),
        rope_scale=float(rotary.attention_scaling),
    )


def _layer_weights(layer: Any, shape: Shape) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return LayerWeights(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=torch.cat([p.weight for p in projections]),
        qkv_bias=torch.cat([p.bias for p in projections]) if shape.has_qkv_bias else None,
        query_norm=attention.q_norm.weight.detach() if shape.has_qk_norm else None,
        key_norm=attention.k_norm.weight.detach() if shape.has_qk_norm else None,
        out=attention.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=mlp.down_proj.weight.detach(),
    )


def _shape_of(lm: PreTrainedModel) -> Shape:
    """The sizes of a model the engine can run.

    Raises:
        ValueError: it cannot.
    """
    name, config = type(lm).__name__, lm.config
    if name not in ARCHITECTURES:
        raise ValueError(f"the decode engine does not know {name} (it knows {', '.join(ARCHITECTURES)})")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    first = lm.model.layers[0]
    attention, mlp = first.self_attn, first.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj)
    refused = {
        f"rope scaling {rope!r}, which changes with the length": rope not in _FIXED_ROPE,
        "quantised weights": any(type(linear) is not nn.Linear for linear in linears),
        "a bias on the attention output": getattr(attention.o_proj, "bias", None) is not None,
        "a bias in the MLP": getattr(mlp.gate_proj, "bias", None) is not None,
        "sliding-window attention": bool(getattr(config, "use_sliding_window", False)),
        f"activation {config.hidden_act!r}": config.hidden_act != "silu",
    }
    for what, is_there in refused.items():
        if is_there:
            raise ValueError(f"the decode engine does not support {what}")
    return Shape(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters.get("rope_theta", 1e4),
        is_tied=lm.get_output_embeddings().weight is lm.model.embed_tokens.weight,
        has_qkv_bias=attention.q_proj.bias is not None,
        has_qk_norm=hasattr(attention, "q_norm"),
    )


@torch.no_grad()
def random_weights(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Weights:
    """Weights of a shape drawn on the device: activations keep a sane size, the text is noise."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(0.0, size[-1] ** -0.5, generator=generator)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    layers = tuple(
        LayerWeights(
            attention_norm=ones(shape.hidden),
            qkv=draw(shape.qkv_rows, shape.hidden),
            qkv_bias=draw(1, shape.qkv_rows)[0] if shape.has_qkv_bias else None,
            query_norm=ones(shape.head_dim) if shape.has_qk_norm else None,
            key_norm=ones(shape.head_dim) if shape.has_qk_norm else None,
            out=draw(shape.hidden, shape.num_heads * shape.head_dim),
            mlp_norm=ones(shape.hidden),
            gate_up=draw(2 * shape.intermediate, shape.hidden),
            down=draw(shape.hidden, shape.intermediate),
        )
        for _ in range(shape.num_layers)
    )
    embedding = draw(shape.vocab, shape.hidden)
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.float32, device=device) / shape.head_dim
    return Weights(
        shape=shape,
        embedding=embedding,
        layers=layers,
        final_norm=ones(shape.hidden),
        head=embedding if shape.is_tied else draw(shape.vocab, shape.hidden),
        inverse_frequency=1.0 / shape.rope_theta**exponent,
    )
