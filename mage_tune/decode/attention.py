"""Forward passes against a prefix cache: extend it with clean blocks, or peek one noisy block per row.

    extend          clean whole blocks, block-causal, written to the cache (prefill, and the commit of a finished block)
    block_forward   one block per row, every token of it sees the row's prefix and the whole block; nothing is written

A peek is exact, or sparse under a `Selection` (keys chosen at an earlier forward) or under a rule that chooses within
the forward itself. Attention over prefix and own block is one softmax. This is plain PyTorch, for CPU and GPU: the
oracle of the kernels, and what runs where they do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mage_tune.backbone import hidden_states
from mage_tune.decode.cache import OwnBlock, Prefix, PrefixCache
from mage_tune.selection import at_least_float32, packed_rows, unpacked_rows

T = TypeVar("T")


@dataclass(frozen=True)
class LayerView:
    """What one layer of a peek shows to a selection rule."""

    layer: int
    rows: Tensor
    """(batch, KV heads, R, D) post-RoPE queries of the block, R = group * B packed rows."""
    key: Tensor
    """(batch, KV heads, N, D) keys of the prefix."""
    is_visible: Tensor
    """(batch, N) bool."""
    lengths: tuple[int, ...]
    """Visible keys of each row."""
    scaling: float


@dataclass(frozen=True)
class Selection:
    """The keys that sparse steps see: one list per (layer, row, KV head), ascending by position."""

    index: Tensor
    """(layers, batch, KV heads, k) int64 prefix positions; entry 0 belongs to `first_layer`."""
    is_kept: Tensor
    """Same shape, bool: False marks an unused slot, whose index is arbitrary but valid."""
    first_layer: int = 0
    """Layers before it are dense: they see the whole prefix."""

    def at(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """(index, is_kept) of a layer, or None when it is dense."""
        if layer < self.first_layer:
            return None
        return self.index[layer - self.first_layer], self.is_kept[layer - self.first_layer]

    def take(self, batch_rows: Sequence[int]) -> Selection:
        """The selection of some rows of the batch."""
        rows = torch.tensor(list(batch_rows), device=self.index.device)
        return replace(self, index=self.index[:, rows], is_kept=self.is_kept[:, rows])

    def as_mask(self, length: int) -> Tensor:
        """(layers, batch, KV heads, length) bool: which prefix positions are chosen."""
        mask = self.index.new_zeros(*self.index.shape[:-1], length + 1, dtype=torch.bool)
        slots = torch.where(self.is_kept, self.index, length)  # unused slots fall into a column that is cut off
        return mask.scatter_(-1, slots, True)[..., :length]

    def keys_kept(self) -> Tensor:
        """(batch,) float32: keys per KV head, averaged over sparse layers and heads."""
        return self.is_kept.sum(-1).float().mean(dim=(0, 2))

    def recall(self, own: Selection) -> Tensor:
        """(layers, batch, KV heads) float32: share of `own`'s keys that this selection holds (same layers)."""
        assert self.first_layer == own.first_layer
        length = int(max(self.index.max(), own.index.max())) + 1
        mine, theirs = self.as_mask(length), own.as_mask(length)
        return (mine & theirs).sum(-1) / theirs.sum(-1).clamp_min(1)


class InStepRule(Protocol):
    """A rule that chooses keys anew in every forward, layer by layer (Quest, TidalDecode)."""

    @property
    def dense_layers(self) -> int:
        """First layers that always see everything."""

    @property
    def sources_are_exact(self) -> bool:
        """Whether a layer that chooses attends to everything itself."""

    def source_layer(self, layer: int) -> int:
        """The layer whose choice `layer` uses, itself or an earlier one."""

    def choose_in_step(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """(index, is_kept), each (batch, KV heads, k), for a layer that is its own source."""


@dataclass(frozen=True)
class Residual:
    """Attention of a block's rows over the keys *not* selected, kept from the choosing step (FlashBlock's idea)."""

    out: tuple[Tensor, ...]
    """Per sparse layer (batch, KV heads, R, D) float32."""
    log_mass: tuple[Tensor, ...]
    """Per sparse layer (batch, KV heads, R, 1) float32 log-sum-exp; -inf where everything was selected."""

    def take(self, batch_rows: Sequence[int]) -> Residual:
        """The residual of some rows of the batch."""
        rows = torch.tensor(list(batch_rows), device=self.out[0].device)
        return Residual(tuple(x[rows] for x in self.out), tuple(x[rows] for x in self.log_mass))


@dataclass(frozen=True)
class Window:
    """Which part of the blocks a peek recomputes, and where the rest of their keys and values is kept."""

    own: OwnBlock
    rows: Tensor
    """(batch,) int64 rows in `own`."""
    start: Tensor | None = None
    """(batch,) int64 first place of each row's window; None recomputes whole blocks."""


@dataclass
class BlockAttention(Generic[T]):
    """Attention of one peek: give its `attend` to the model (see `mage_tune.backbone`).

    `observe` sees each layer from `observe_from` on, whatever the attention; its results, by layer, are in `observed`.
    """

    prefix: Prefix
    selection: Selection | None = None
    rule: InStepRule | None = None
    residual: Residual | None = None
    window: Window | None = None
    observe: Callable[[LayerView], T] | None = None
    observe_from: int = 0
    observed: list[T] = field(default_factory=list)
    _in_step: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(batch, heads, B, D) post-RoPE q, k, v of the block, or of its window -> (batch, query heads, B, D)."""
        if self.window is not None:
            key, value = self.window.own.update(layer, self.window.rows, self.window.start, key, value)
        num_heads, size = query.shape[1], query.shape[2]
        rows = packed_rows(query, key.shape[1], size).squeeze(2)
        if self.observe is not None and layer >= self.observe_from:
            self.observed.append(self.observe(self._view(layer, rows, scaling)))
        chosen = self._keys_of(layer, rows, scaling)
        if chosen is None:
            out = self._exact(layer, rows, key, value, scaling)
        else:
            out = self._sparse(layer, rows, key, value, scaling, *chosen)
        return unpacked_rows(out.unsqueeze(2), num_heads, size)

    def _view(self, layer: int, rows: Tensor, scaling: float) -> LayerView:
        return LayerView(layer, rows, self.prefix.read(layer)[0], self.prefix.is_visible, self.prefix.lengths, scaling)

    def _keys_of(self, layer: int, rows: Tensor, scaling: float) -> tuple[Tensor, Tensor] | None:
        """(index, is_kept) that this layer is limited to, or None for the whole prefix."""
        if self.selection is not None:
            return self.selection.at(layer)
        if self.rule is None or layer < self.rule.dense_layers:
            return None
        if self.rule.source_layer(layer) == layer:
            self._in_step = self.rule.choose_in_step(self._view(layer, rows, scaling))
            if self.rule.sources_are_exact:
                return None
        return self._in_step

    def _exact(self, layer: int, rows: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self.prefix.longest:
            past_key, past_value = self.prefix.read(layer)
            key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        mask = with_own_block(self.prefix.is_visible[:, None], key) if self.prefix.is_ragged else None
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)

    def _sparse(
        self, layer: int, rows: Tensor, key: Tensor, value: Tensor, scaling: float, index: Tensor, is_kept: Tensor
    ) -> Tensor:
        past_key, past_value = self.prefix.gather(layer, index)
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        mask = with_own_block(is_kept, key)
        if self.residual is None:
            return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        assert self.selection is not None
        out, log_mass = attention_with_log_mass(rows, key, value, mask, scaling)
        at = layer - self.selection.first_layer
        return merge_attention(out, log_mass, self.residual.out[at], self.residual.log_mass[at]).to(rows.dtype)


def with_own_block(is_kept: Tensor, key: Tensor) -> Tensor:
    """(batch, heads or 1, n) bool for prefix keys -> (batch, heads or 1, 1, n + B) with the own block always seen."""
    own = is_kept.new_ones(*is_kept.shape[:2], key.shape[2] - is_kept.shape[2])
    return torch.cat([is_kept, own], dim=-1).unsqueeze(-2)


def attention_with_log_mass(
    rows: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention in float32 with its log-sum-exp; rows that see nothing give zeros and -inf.

    Args:
        rows: (..., R, D); key, value: (..., n, D).
        mask: bool, broadcastable to (..., R, n).

    Returns:
        (..., R, D) and (..., R, 1), float32.
    """
    logits = (at_least_float32(rows) @ at_least_float32(key).transpose(-1, -2) * scaling).masked_fill(
        ~mask, float("-inf")
    )
    log_mass = logits.logsumexp(-1, keepdim=True)
    weights = (logits - log_mass).exp().nan_to_num(0.0)  # -inf - -inf where nothing is seen
    return weights @ at_least_float32(value), log_mass


def merge_attention(out: Tensor, log_mass: Tensor, other: Tensor, other_log_mass: Tensor) -> Tensor:
    """Softmax attention over the union of two disjoint key sets, from the outputs and log-sum-exps of each."""
    share = torch.sigmoid(log_mass - other_log_mass)  # exp(a) / (exp(a) + exp(b)); 1 when the other saw nothing
    return share * out + (1.0 - share) * other


def block_forward(
    model: nn.Module,
    prefix: Prefix | PrefixCache,
    block_ids: Tensor,
    *,
    selection: Selection | None = None,
    rule: InStepRule | None = None,
    residual: Residual | None = None,
    window: Window | None = None,
) -> Tensor:
    """Peek: one block per row against its prefix, without writing. Exact unless a selection or a rule is given.

    Args:
        model: bare or with adapters.
        prefix: what each row has before the block; a cache stands for all its rows in full.
        block_ids: (batch, B) int64; the window's tokens alone where there is one with a start.
        selection: keys chosen at an earlier forward.
        rule: chooses keys within this forward.
        residual: only with a selection; attention over the keys not selected, merged in.
        window: what is recomputed, if not simply everything.

    Returns:
        (batch, B, hidden) after the final norm.
    """
    prefix = prefix.prefix() if isinstance(prefix, PrefixCache) else prefix
    attention: BlockAttention[None] = BlockAttention(prefix, selection, rule, residual, window)
    return _run(model, prefix, block_ids, attention)


def observe_forward(
    model: nn.Module,
    prefix: Prefix | PrefixCache,
    block_ids: Tensor,
    observe: Callable[[LayerView], T],
    *,
    first_layer: int = 0,
    selection: Selection | None = None,
    window: Window | None = None,
) -> tuple[Tensor, list[T]]:
    """A peek that also returns `observe(view)` of each layer from `first_layer` on, in order of layers."""
    prefix = prefix.prefix() if isinstance(prefix, PrefixCache) else prefix
    attention = BlockAttention(prefix, selection, window=window, observe=observe, observe_from=first_layer)
    return _run(model, prefix, block_ids, attention), attention.observed


@torch.no_grad()
def _run(model: nn.Module, prefix: Prefix, block_ids: Tensor, attention: BlockAttention[T]) -> Tensor:
    block_ids = block_ids.to(prefix.cache.keys.device)
    positions = prefix.positions(block_ids.shape[1])
    if attention.window is not None and attention.window.start is not None:
        positions = positions + attention.window.start[:, None]
    return hidden_states(model, block_ids, positions, attention.attend)


@dataclass
class _ExtendAttention:
    """Block-causal attention of new clean tokens, which are written to the cache as they pass.

    Row r brings counts[r] real tokens; what pads it to the width is neither written nor seen by real tokens, because
    counts are whole blocks and a later block is invisible.
    """

    prefix: Prefix
    counts: Sequence[int]
    width: int
    block_size: int

    def __post_init__(self) -> None:
        device = self.prefix.cache.keys.device
        is_real = torch.arange(self.width, device=device) < torch.tensor(self.counts, device=device)[:, None]
        self.batch_row, self.source = is_real.nonzero(as_tuple=True)
        self.row = self.prefix.row_index[self.batch_row]
        positions = self.prefix.positions(self.width)
        self.target = positions[self.batch_row, self.source]
        self.total = int(max(n + c for n, c in zip(self.prefix.lengths, self.counts, strict=True)))
        if self.width == self.block_size and not self.prefix.is_ragged:
            self.mask = None  # one block after prefixes of one length: everything is seen
        else:
            key_block = torch.arange(self.total, device=device) // self.block_size
            self.mask = (key_block <= (positions // self.block_size)[..., None])[:, None]  # (batch, 1, width, total)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(batch, heads, width, D) -> (batch, query heads, width, D)."""
        cache = self.prefix.cache
        cache.keys[layer][self.row, :, self.target] = key[self.batch_row, :, self.source]
        cache.values[layer][self.row, :, self.target] = value[self.batch_row, :, self.source]
        past_key, past_value = self.prefix.read(layer, self.total)
        return F.scaled_dot_product_attention(
            query, past_key, past_value, attn_mask=self.mask, scale=scaling, enable_gqa=True
        )


def extend(
    model: nn.Module,
    cache: PrefixCache,
    ids: Sequence[Sequence[int]],
    block_size: int,
    *,
    rows: Sequence[int] | None = None,
    chunk: int = 512,
) -> tuple[Tensor, list[int]]:
    """Append clean whole blocks to rows of the cache: the prefill of a prompt, or the commit of a finished block.

    Args:
        ids: for each row the tokens to append, a whole number of blocks, possibly none.
        rows: rows of the cache, distinct; all by default.
        chunk: tokens of a row per forward pass, rounded to whole blocks; bounds memory on long prompts.

    Returns:
        (rows, hidden) after the final norm at each row's last new token (zeros where a row got none), and how many
        forward passes each row took part in.

    Raises:
        ValueError: ids are not whole blocks, or do not fit in the cache.
    """
    chosen = list(range(len(cache.ids)) if rows is None else rows)
    if any(len(new) % block_size for new in ids):
        raise ValueError(f"only whole blocks of {block_size} tokens can be cached, got {[len(n) for n in ids]}")
    if any(len(cache.ids[row]) + len(new) > cache.capacity for row, new in zip(chosen, ids, strict=True)):
        raise ValueError(f"{max(map(len, ids))} more tokens do not fit in a cache of {cache.capacity}")
    chunk = max(block_size, chunk // block_size * block_size)
    last: Tensor | None = None
    passes = [0] * len(chosen)
    for start in range(0, max(map(len, ids), default=0), chunk):
        active = [i for i, new in enumerate(ids) if len(new) > start]
        parts = [list(ids[i][start : start + chunk]) for i in active]
        hidden = _extend_once(model, cache.prefix([chosen[i] for i in active]), parts, block_size)
        if last is None:
            last = hidden.new_zeros(len(chosen), hidden.shape[-1])
        for i, part, row_hidden in zip(active, parts, hidden, strict=True):
            last[i] = row_hidden[len(part) - 1]
            cache.ids[chosen[i]].extend(part)
            passes[i] += 1
    return (torch.zeros(len(chosen), 0) if last is None else last), passes


@torch.no_grad()
def _extend_once(model: nn.Module, prefix: Prefix, parts: list[list[int]], block_size: int) -> Tensor:
    width = max(map(len, parts))
    padded = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=prefix.cache.keys.device)
    attention = _ExtendAttention(prefix, [len(part) for part in parts], width, block_size)
    return hidden_states(model, padded, prefix.positions(width), attention.attend)
