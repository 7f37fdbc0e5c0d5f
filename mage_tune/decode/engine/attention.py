"""Attention of one forward pass of the engine: what each kind of step sees, layer by layer.

    ExactAttention    the whole prefix, by any exact kernel; also a commit, whose keys stay in the cache
    ScoringAttention  the whole prefix, and what a selection rule needs to know of it
    CommittingAttention  either, of two blocks at once: a commit and the next block's first step
    KeptAttention     the keys chosen for this block
    QuestAttention    the best pages, chosen in every layer of every step
    TidalAttention    the best keys, chosen in two layers of every step

Every one of them writes the block's keys and values where its kernel wants them, in the same launch that rotates them.
The first `dense_layers` of the sparse ones are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mage_kernels.exact_attention import Attended, exact_attention
from mage_kernels.few_rows import new_arrivals
from mage_kernels.gather_attention import gather_attention
from mage_kernels.key_scores import mean_logit
from mage_kernels.layout import by_token
from mage_kernels.page_scores import page_scores, update_pages
from mage_kernels.rope_append import project_append, rope_append
from mage_kernels.small_attention import small_attention
from mage_kernels.top_k import top_k
from mage_tune.decode.engine.cache import Cache, KeptKeys
from mage_tune.decode.engine.forward import Projection
from mage_tune.decode.engine.kernels import ExactKernel
from mage_tune.decode.engine.weights import Weights
from mage_tune.decode.rules import Quest, Tidal


class Frame:
    """What all forward passes of blocks share: weights, cache, rotary tables, room for the block's own keys."""

    def __init__(self, weights: Weights, cache: Cache, block_size: int, impl: str) -> None:
        shape = weights.shape
        self.weights, self.cache, self.block_size, self.impl = weights, cache, block_size, impl
        self.scale = shape.head_dim**-0.5
        self.cosine, self.sine = weights.rope_table(cache.capacity)
        own = (2, cache.batch, shape.num_kv_heads, block_size, shape.head_dim)
        self.own_key, self.own_value = torch.zeros(own, dtype=weights.dtype, device=weights.device)
        """(batch, KV heads, B, D) of the layer in work."""
        self.no_slots = torch.zeros_like(cache.lengths)
        self.arrivals = new_arrivals(weights.device)

    def append(
        self,
        layer: int,
        qkv: Tensor | Projection,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Write a block's keys and values from `slots` on; returns its packed query rows (batch, KV heads, R, D).

        `qkv` is the projection, or parts of its sum (`forward.Attend`). `positions`: by default where the cache ends.
        """
        positions = self.cache.lengths if positions is None else positions
        place = self.cosine, self.sine, positions, keys, values, slots
        if isinstance(qkv, Projection):
            return project_append(
                qkv.x.values,
                qkv.weight,
                qkv.bias,
                *place,
                self.arrivals,
                squares=qkv.x.squares,
                eps=qkv.eps,
                rows=rows,
                impl=self.impl,
            )
        weights = self.weights.layers[layer]
        return rope_append(
            qkv,
            *place,
            weights.query_norm,
            weights.key_norm,
            self.weights.shape.norm_eps,
            rows=rows,
            impl=self.impl,
        )

    def append_own(self, layer: int, qkv: Tensor | Projection, rows: Tensor | None = None) -> Tensor:
        """`append` to the buffer beside the cache."""
        return self.append(layer, qkv, self.own_key, self.own_value, self.no_slots, rows)


@dataclass
class ExactAttention:
    """The whole prefix and the block, whose keys and values go where the prefix ends."""

    frame: Frame
    kernel: ExactKernel
    _seen: Tensor | None = field(default=None, init=False)

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`."""
        frame, cache = self.frame, self.frame.cache
        if layer == 0 or self._seen is None:  # once per pass; wherever some layers are exact, the first is
            self._seen = cache.lengths + frame.block_size
        rows = frame.append(layer, qkv, cache.keys[layer], cache.values[layer], cache.lengths)
        return self.kernel.attend(layer, rows, self._seen)


class Observer(Protocol):
    """A selection rule during the exact step that it chooses from."""

    first_layer: int
    tile: int | None
    """Keys per tile whose log-masses it wants; None for none."""

    def rows(self, layer: int) -> Tensor | None:
        """Where to put a layer's query rows, if the rule keeps them."""

    def masses(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Where to put a layer's log masses of tiles and of the prefix, if the rule keeps them."""

    def observe(self, layer: int, attended: Attended) -> None:
        """Take note of what a layer's rows saw; their outputs are in any order, with others'."""


@dataclass
class ScoringAttention:
    """An exact step, by our kernel, that a rule observes from its first sparse layer on."""

    frame: Frame
    observer: Observer
    exact: ExactAttention

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`."""
        frame, observer = self.frame, self.observer
        if layer < observer.first_layer:
            return self.exact(layer, qkv)
        rows = frame.append_own(layer, qkv, observer.rows(layer))
        attended = exact_attention(
            rows,
            frame.cache.keys[layer],
            frame.cache.values[layer],
            frame.cache.lengths,
            frame.scale,
            own_key=frame.own_key,
            own_value=frame.own_value,
            tile=observer.tile,
            masses=observer.masses(layer),
            block=frame.block_size,
            impl=frame.impl,
        )
        observer.observe(layer, attended)
        return attended.out


class CommittingAttention:
    """Two blocks of every row at once, by our kernel: finished ones, whose keys the cache takes, and those after them.

    The projection holds the finished blocks of all rows, then the next ones of all rows. A finished block sees what
    it sees in a commit; the next one sees it too, as the end of its prefix, and a rule observes the next one alone.
    """

    def __init__(self, frame: Frame, advance: Tensor, observer: Observer | None) -> None:
        self.frame, self.advance, self.observer = frame, advance, observer
        self.start = torch.zeros_like(frame.cache.lengths)
        """Where the finished blocks begin."""

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`; the first layer moves the cache's lengths on."""
        frame, cache = self.frame, self.frame.cache
        if layer == 0:
            self.start.copy_(cache.lengths)
            cache.lengths.add_(self.advance)
        observer = self.observer if self.observer is not None and layer >= self.observer.first_layer else None
        keys, values = cache.keys[layer], cache.values[layer]
        finished, following = qkv.halves() if isinstance(qkv, Projection) else _halves(qkv)
        first = frame.append(layer, finished, keys, values, self.start, positions=self.start)
        second = frame.append_own(layer, following, observer.rows(layer) if observer is not None else None)
        count = first.shape[2]
        attended = exact_attention(
            torch.cat([first, second], dim=2),
            keys,
            values,
            cache.lengths,
            frame.scale,
            own_key=frame.own_key,
            own_value=frame.own_value,
            own_from=count,
            tile=observer.tile if observer is not None else None,
            masses=observer.masses(layer) if observer is not None else None,
            impl=frame.impl,
        )
        if observer is not None:
            observer.observe(layer, attended)  # masses are of the rows that see their own block: the next one's
        return torch.cat([by_token(half, frame.block_size) for half in attended.out.split(count, dim=2)])


def _halves(qkv: Tensor) -> list[Tensor]:
    """The rows of either half of the batch."""
    return [half.contiguous() for half in qkv.chunk(2, dim=-2)]


MOST_SMALL_SLOTS = 4096
"""Keys beyond which the kept ones are attended like a prefix, split over the GPU, and not in a single launch."""


class KeptAttention:
    """The keys chosen for this block, and the block in the slots behind them."""

    def __init__(self, frame: Frame, kept: KeptKeys, exact: ExactAttention) -> None:
        self.frame, self.kept, self.exact = frame, kept, exact
        self.slots = torch.full_like(frame.cache.lengths, kept.slots)

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`."""
        frame, kept = self.frame, self.kept
        if layer < kept.first_layer:
            return self.exact(layer, qkv)
        keys, values = kept.at(layer)
        rows = frame.append(layer, qkv, keys, values, self.slots)
        if kept.slots > MOST_SMALL_SLOTS:
            return self._long(layer, rows, keys, values)
        count, size = kept.counts[layer - kept.first_layer], frame.block_size
        return small_attention(
            rows,
            keys,
            values,
            count,
            frame.scale,
            own=size,
            block=size,
            arrivals=frame.arrivals,
            impl=frame.impl,
        )[0]

    def _long(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The rules that keep so many keep equally many in every head of a row."""
        slots = self.kept.slots
        return exact_attention(
            rows,
            keys[:, :, :slots],
            values[:, :, :slots],
            self.kept.counts[layer - self.kept.first_layer, :, 0].contiguous(),
            self.frame.scale,
            own_key=keys[:, :, slots:],
            own_value=values[:, :, slots:],
            block=self.frame.block_size,
            impl=self.frame.impl,
        ).out


class QuestAttention:
    """Quest: in every layer of every step the pages whose key bounds allow the largest logits."""

    def __init__(self, frame: Frame, rule: Quest, form: str, exact: ExactAttention) -> None:
        self.frame, self.rule, self.form, self.exact = frame, rule, form, exact
        self.page, cache = rule.page, frame.cache
        if frame.block_size % self.page or rule.budget % self.page:
            raise ValueError(
                f"quest in the decode engine needs a block size and a budget of whole pages: block {frame.block_size}, "
                f"budget {rule.budget}, page {self.page}"
            )
        size = list(cache.keys.shape)
        size[3] = -(-cache.capacity // self.page)
        self.low, self.high = cache.keys.new_zeros(2, *size)
        """(layers, batch, KV heads, pages, D) channel-wise bounds of each page's keys."""
        self.within = torch.arange(self.page, dtype=torch.int32, device=cache.keys.device)

    def update(self, added: int) -> None:
        """Bounds of the pages that the last `added` cached keys fall into."""
        cache = self.frame.cache
        update_pages(self.low, self.high, cache.keys, cache.lengths, page=self.page, added=added, impl=self.frame.impl)

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`."""
        if layer < self.rule.dense_layers:
            return self.exact(layer, qkv)
        frame, rule, page = self.frame, self.rule, self.page
        rows, lengths = frame.append_own(layer, qkv), frame.cache.lengths
        score = page_scores(
            rows, self.low[layer], self.high[layer], lengths, page=page, form=self.form, impl=frame.impl
        )
        chosen = top_k(
            score, rule.budget // page, lengths, page=page, sinks=rule.sinks, recent=rule.recent, impl=frame.impl
        )
        index = torch.add(self.within, chosen.index[..., None], alpha=page).flatten(2)
        return _gathered(frame, layer, rows, index, chosen.count * page)


@dataclass
class TidalAttention:
    """TidalDecode: two layers attend to everything and choose keys; the layers after each reuse its choice."""

    frame: Frame
    rule: Tidal
    exact: ExactAttention
    _chosen: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __call__(self, layer: int, qkv: Tensor | Projection) -> Tensor:
        """See `forward.Attend`."""
        frame, rule, cache = self.frame, self.rule, self.frame.cache
        if layer < rule.dense_layers:
            return self.exact(layer, qkv)
        if rule.source_layer(layer) != layer:
            assert self._chosen is not None
            rows = frame.append_own(layer, qkv)
            return _gathered(frame, layer, rows, *self._chosen)
        rows = frame.append(layer, qkv, cache.keys[layer], cache.values[layer], cache.lengths)
        score = mean_logit(rows, cache.keys[layer], cache.lengths, frame.scale, impl=frame.impl)
        chosen = top_k(score, rule.budget, cache.lengths, sinks=rule.sinks, recent=rule.recent, impl=frame.impl)
        self._chosen = chosen.index, chosen.count
        return self.exact.kernel.attend(layer, rows, cache.lengths + frame.block_size)


def _gathered(frame: Frame, layer: int, rows: Tensor, index: Tensor, count: Tensor) -> Tensor:
    """Attention over keys `index` of the cache and the block's own, beside it."""
    out, _ = gather_attention(
        rows,
        frame.cache.keys[layer],
        frame.cache.values[layer],
        index,
        count,
        frame.scale,
        own_key=frame.own_key,
        own_value=frame.own_value,
        block=frame.block_size,
        impl=frame.impl,
    )
    return out
