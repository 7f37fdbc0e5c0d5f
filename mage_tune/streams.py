"""Attention of a training row: exact streams, the sparse stream, and what the alignment terms see of each layer.

The row is [sparse? ; mask? ; noisy ... ; clean], every stream `length` tokens long:

- the *mask* stream x_m is the all-[MASK] step of every block at once;
- *noisy* streams x_t are later steps with exact attention;
- the *sparse* stream is x_t again, but each of its blocks sees only the keys that the mask stream's attention chose in
  the same layer. That is what decoding does, so one forward pass gives exact step, sparse step and clean cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mage_tune.blocks import StreamLayout
from mage_tune.selection import choose_keys, gather_keys, packed_rows, unpacked_rows


@dataclass(frozen=True)
class RowStreams:
    """Which streams a row holds, in order; `length` tokens each on a grid of `block_size`."""

    length: int
    block_size: int
    sparse: bool = False
    mask: bool = False
    noisy: int = 1

    @property
    def exact(self) -> StreamLayout:
        """Layout of the row without its sparse stream."""
        return StreamLayout(self.noisy + self.mask, self.length, self.block_size)

    @property
    def total(self) -> int:
        """Tokens of the whole row."""
        return self.exact.total + self.sparse * self.length

    def offset(self, name: str, view: int = 0) -> int:
        """First row position of a stream: "sparse", "mask", "noisy" (with its view) or "clean"."""
        before = {"sparse": 0, "mask": self.sparse, "noisy": self.sparse + self.mask + view}
        before["clean"] = self.sparse + self.mask + self.noisy
        return before[name] * self.length


@dataclass(frozen=True)
class LayerView:
    """What one layer shows to an alignment term."""

    mask_rows: Tensor
    """(batch, KV heads, blocks, R, D) post-RoPE queries of the mask stream."""
    later_rows: tuple[Tensor, ...]
    """The same of each noisy stream."""
    clean_key: Tensor
    """(batch, KV heads, N, D)."""
    scaling: float


Observer = Callable[[LayerView], Tensor]


@dataclass
class StreamAttention:
    """One forward pass of a row: give its `attend` to the model (see `mage_tune.backbone`).

    `observers` maps a term's name to (first layer it sees, function of a LayerView); results are kept per layer in
    `observed`. Under checkpointing a layer runs twice and is counted once.
    """

    streams: RowStreams
    budget: int = 0
    dense_layers: int = 0
    observers: Mapping[str, tuple[int, Observer]] = field(default_factory=dict)
    observed: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    needs_gradient: bool = field(default_factory=torch.is_grad_enabled)
    """Whether the pass is meant to train; layers are checked, as re-entrant checkpointing hides gradients."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(batch, heads, total, D) post-RoPE q, k, v -> (batch, query heads, total, D).

        Raises:
            RuntimeError: an alignment term would get no gradient from these queries.
        """
        row = self.streams
        if self.observers and row.mask:
            self._observe(layer, query, key, scaling)
        if not row.sparse:
            return exact_attention(query, key, value, row.exact, scaling)
        if layer < self.dense_layers:
            layout = StreamLayout(row.noisy + row.mask + 1, row.length, row.block_size)
            return exact_attention(query, key, value, layout, scaling)
        exact = exact_attention(
            query[:, :, row.length :], key[:, :, row.length :], value[:, :, row.length :], row.exact, scaling
        )
        return torch.cat([self._sparse(query, key, value, scaling), exact], dim=2)

    def mean_over_layers(self, name: str) -> Tensor:
        """The observed term averaged over the layers that saw it.

        Raises:
            ValueError: none did.
        """
        if not self.observed[name]:
            raise ValueError(f"{name}: skip_layers leaves out every layer of the model; choose a smaller number")
        return torch.stack(list(self.observed[name].values())).mean()

    def _rows(self, query: Tensor, num_kv_heads: int, name: str, view: int = 0) -> Tensor:
        start = self.streams.offset(name, view)
        return packed_rows(query[:, :, start : start + self.streams.length], num_kv_heads, self.streams.block_size)

    def _observe(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        due = {name: observer for name, (first_layer, observer) in self.observers.items() if layer >= first_layer}
        if not due:
            return
        if self.needs_gradient and not query.requires_grad:
            raise RuntimeError(
                f"layer {layer}: queries carry no gradient, so alignment terms would train nothing "
                "(re-entrant checkpointing, or no adapter at or before this layer's q_proj)"
            )
        heads = key.shape[1]
        view = LayerView(
            self._rows(query, heads, "mask"),
            tuple(self._rows(query, heads, "noisy", i) for i in range(self.streams.noisy)),
            key[:, :, self.streams.offset("clean") :],
            scaling,
        )
        for name, observer in due.items():
            value = observer(view)  # also in the recomputation, which must repeat the same operations
            self.observed[name].setdefault(layer, value)

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        row, heads = self.streams, key.shape[1]
        clean = row.offset("clean")
        with torch.no_grad():
            blocks = torch.arange(row.length // row.block_size, device=query.device)
            mask_rows = self._rows(query, heads, "mask")
            index, kept = choose_keys(mask_rows, key[:, :, clean:], blocks, row.block_size, self.budget, scaling)
        own = slice(0, row.length)
        out = sparse_block_attention(
            self._rows(query, heads, "sparse"),
            gather_keys(key[:, :, clean:], index),
            gather_keys(value[:, :, clean:], index),
            kept,
            packed_rows(key[:, :, own], heads, row.block_size),
            packed_rows(value[:, :, own], heads, row.block_size),
            scaling,
        )
        return unpacked_rows(out, query.shape[1], row.block_size)


def sparse_block_attention(
    rows: Tensor, key: Tensor, value: Tensor, kept: Tensor, own_key: Tensor, own_value: Tensor, scaling: float
) -> Tensor:
    """Attention of packed block rows over their chosen keys and their own block, with gradient.

    Args:
        rows: (batch, KV heads, blocks, R, D).
        key, value: (batch, KV heads, blocks, k, D) chosen from the prefix.
        kept: (batch, KV heads, blocks, k) bool, slots in use.
        own_key, own_value: (batch, KV heads, blocks, B, D).

    Returns:
        (batch, KV heads, blocks, R, D).
    """
    batch, heads, blocks = rows.shape[:3]

    def one_head(x: Tensor) -> Tensor:  # every (row, KV head, block) is an attention problem of its own
        return x.reshape(batch * heads * blocks, 1, *x.shape[3:])

    is_visible = torch.cat([kept, kept.new_ones(own_key.shape[:4])], dim=-1)
    out = F.scaled_dot_product_attention(
        one_head(rows),
        one_head(torch.cat([key, own_key], dim=3)),
        one_head(torch.cat([value, own_value], dim=3)),
        attn_mask=one_head(is_visible).unsqueeze(-2),
        scale=scaling,
    )
    return out.reshape(rows.shape)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, layout: StreamLayout, scaling: float) -> Tensor:
    """Attention of a row under its layout, with gradient.

    FlexAttention on a GPU for lengths it can tile (training rows are padded to them), else one masked SDPA per stream,
    whose masks take length x 2 length bytes.
    """
    if query.is_cuda and layout.is_tiled:
        mask = layout.block_mask(query.device)
        return _compiled_flex()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return _attention_per_stream(query, key, value, layout, scaling)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _attention_per_stream(query: Tensor, key: Tensor, value: Tensor, layout: StreamLayout, scaling: float) -> Tensor:
    length = layout.length
    clean = slice(layout.num_noisy * length, layout.total)
    outputs = []
    for stream in range(layout.num_noisy + 1):
        own = slice(stream * length, (stream + 1) * length)
        is_clean = stream == layout.num_noisy
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                key[:, :, clean] if is_clean else torch.cat([key[:, :, own], key[:, :, clean]], dim=2),
                value[:, :, clean] if is_clean else torch.cat([value[:, :, own], value[:, :, clean]], dim=2),
                attn_mask=layout.clean_mask(query.device) if is_clean else layout.noisy_mask(query.device),
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2)
