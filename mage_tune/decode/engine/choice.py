"""Rules that choose once per block: what they note during their exact step, and the keys of all layers they then keep.

Noting is cheap and happens layer by layer; choosing happens once, for all layers together, after the step's tokens are
accepted. Scores and choices are those of `decode.rules`; only the way there is another.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_kernels.compact import compact
from mage_kernels.exact_attention import TILES, Attended, best_tile
from mage_kernels.key_scores import mean_logit, tile_mass
from mage_kernels.select_keys import select_keys
from mage_kernels.top_k import top_k
from mage_tune.blocks import round_up
from mage_tune.decode.engine.attention import Frame
from mage_tune.decode.engine.cache import KeptKeys
from mage_tune.decode.engine.weights import Weights
from mage_tune.decode.rules import Mage, MeanQuery, Rule, SparseD, SparseDLLM


@dataclass(frozen=True)
class Keys:
    """A choice."""

    index: Tensor
    """(sparse layers, batch, KV heads, k) int32 prefix positions, ascending."""
    count: Tensor
    """(sparse layers, batch, KV heads) int32: how many are meant, the first ones."""


class Chooser:
    """A rule that chooses once: notes, choice, and the keys kept."""

    tile: int | None = None

    def __init__(self, rule: Rule, frame: Frame) -> None:
        shape, cache = frame.weights.shape, frame.cache
        self.rule, self.frame = rule, frame
        self.first_layer = rule.dense_layers
        if self.first_layer >= shape.num_layers:
            raise ValueError(f"dense_layers {rule.dense_layers} leave no layer of the model to be sparse")
        if rule.budget % rule.page:
            raise ValueError(f"budget {rule.budget} is not a whole number of {rule.name}'s pages of {rule.page} keys")
        self.kept = KeptKeys(frame.weights, self.first_layer, cache.batch, self.slots(), frame.block_size)
        self.pages = 0
        """Pages to keep per head."""
        self.heads = self.kept.counts.shape
        self.group_rows = shape.group * frame.block_size

    def slots(self) -> int:
        """Keys that a head keeps at most."""
        return self.rule.num_pages(self.frame.cache.capacity) * self.rule.page

    def keys_kept(self, held: int) -> float:
        """Mean over the sparse layers of what a row with such a prefix keeps."""
        return min(held, self.rule.num_pages(held) * self.rule.page)

    def plan(self, held: list[int]) -> int:
        """Fix how many pages are kept; returns what a captured graph depends on.

        Raises:
            ValueError: a share of prefixes of different lengths.
        """
        pages = {self.rule.num_pages(n) for n in held}
        if len(pages) > 1:
            raise ValueError(f"{self.rule.name} keeps a share of the prefix: the engine needs rows of equal length")
        self.pages = pages.pop()
        return self.pages

    def rows(self, layer: int) -> Tensor | None:
        """See `attention.Observer`."""
        return None

    def masses(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """See `attention.Observer`."""
        return None

    def observe(self, layer: int, attended: Attended) -> None:
        """See `attention.Observer`."""

    def choose(self) -> Keys:
        """The keys of all sparse layers."""
        raise NotImplementedError

    def select(self) -> None:
        """Choose, and copy the chosen keys and values together."""
        cache, kept, first = self.frame.cache, self.kept, self.first_layer
        keys, buffers = self.choose(), (kept.keys, kept.values)
        compact(cache.keys[first:], cache.values[first:], keys.index, keys.count, *buffers, impl=self.frame.impl)
        kept.counts.copy_(keys.count)

    def _top(self, score: Tensor, page: int = 1) -> Keys:
        """The best pages of all keys, as keys."""
        rule, lengths = self.rule, self.frame.cache.lengths
        chosen = top_k(
            score, self.pages, lengths, page=page, sinks=rule.sinks, recent=rule.recent, impl=self.frame.impl
        )
        if page == 1:
            return Keys(chosen.index, chosen.count)
        within = torch.arange(page, dtype=torch.int32, device=score.device)
        index = chosen.index[..., None] * page + within
        is_meant = torch.arange(self.pages, device=score.device) < chosen.count[..., None]
        is_meant = is_meant[..., None] & (index < lengths[:, None, None, None])  # the last page may be short
        return Keys(index.flatten(-2), is_meant.flatten(-2).sum(-1, dtype=torch.int32))


class _KeepsRows(Chooser):
    """A chooser that needs the queries again."""

    def __init__(self, rule: Rule, frame: Frame) -> None:
        super().__init__(rule, frame)
        weights = frame.weights
        size = (*self.heads, self.group_rows, weights.shape.head_dim)
        self.queries = torch.zeros(size, dtype=weights.dtype, device=weights.device)
        """(sparse layers, batch, KV heads, R, D)"""

    def rows(self, layer: int) -> Tensor | None:
        """Straight into the buffer."""
        return self.queries[layer - self.first_layer]


def masses_bytes(weights: Weights, batch: int, capacity: int, block_size: int) -> int:
    """Memory for the log masses of all layers that `MageChooser` keeps."""
    shape = weights.shape
    rows = torch.empty(batch, shape.num_kv_heads, shape.group * block_size, 1, device=weights.device)
    return 4 * shape.num_layers * rows.numel() * -(-capacity // best_tile(rows))


class MageChooser(_KeepsRows):
    """Mean probability: tile masses from the exact pass itself, then the keys of the best tiles scored one by one.

    The pass of each layer leaves every row's log masses in a buffer, and one launch averages those of all layers over
    the rows when keys are chosen: in a scoring step nothing runs beside the pass. The buffer takes `masses_bytes`:
    4 R / tile bytes per key and KV head, where the key itself and its value take 512. At 128K, in tiles of 128 keys,
    that is 103 MB for 7B at batch 1 and 0.8 GB at batch 8.
    """

    rule: Mage
    tile: int

    def __init__(self, rule: Mage, frame: Frame) -> None:
        super().__init__(rule, frame)
        rule.keys_by_layer(frame.weights.shape.num_layers, 1)  # refuses layers that there are not
        self.most = torch.zeros(self.heads, dtype=torch.int32, device=frame.weights.device)
        """(sparse layers, batch, KV heads) keys to keep, where layers differ."""
        self.tile = best_tile(self.queries[0])
        device, tiles = frame.weights.device, -(-frame.cache.capacity // self.tile)
        self.log_mass = torch.zeros(*self.heads, self.group_rows, device=device)
        self.tile_log_mass = torch.zeros(*self.heads, tiles, self.group_rows, device=device)
        """(sparse layers, batch, KV heads, T, R)"""

    def slots(self) -> int:
        """As many as the layer that keeps most."""
        return max(self.rule.budget, *(keys for _, keys in self.rule.layer_budgets), 0)

    def keys_kept(self, held: int) -> float:
        """Mean over the layers."""
        return fmean(self.rule.keys_by_layer(self.frame.weights.shape.num_layers, held))

    def plan(self, held: list[int]) -> int:
        """Fix how many keys each layer of each row keeps."""
        self.pages = self.slots()
        if self.rule.layer_budgets:
            keys = [self.rule.keys_by_layer(self.frame.weights.shape.num_layers, n) for n in held]
            self.most.copy_(torch.tensor(keys, dtype=torch.int32).clamp_min(1).T[..., None])
        return self.pages

    def masses(self, layer: int) -> tuple[Tensor, Tensor]:
        """Straight into the buffers."""
        return self.tile_log_mass[layer - self.first_layer], self.log_mass[layer - self.first_layer]

    def choose(self) -> Keys:
        """Top keys of the best tiles."""
        frame, rule = self.frame, self.rule
        mass = tile_mass(self.tile_log_mass, self.log_mass, frame.cache.lengths, self.tile, impl=frame.impl)
        selected = select_keys(
            self.queries,
            frame.cache.keys[self.first_layer :],
            self.log_mass,
            mass,
            frame.cache.lengths,
            frame.scale,
            self.pages,
            tile=self.tile,
            sinks=rule.sinks,
            recent=rule.recent,
            most=self.most if rule.layer_budgets else None,
            impl=frame.impl,
        )
        return Keys(selected.index, selected.count)


class MeanQueryChooser(_KeepsRows):
    """Logits of the block-average query."""

    def choose(self) -> Keys:
        """Top keys."""
        return self._top(self._logits())

    def _logits(self) -> Tensor:
        frame = self.frame
        keys = frame.cache.keys[self.first_layer :]
        return mean_logit(self.queries, keys, frame.cache.lengths, frame.scale, impl=frame.impl)


class SparseDLLMChooser(MeanQueryChooser):
    """The same averaged over all heads and max-pooled: one list per layer."""

    rule: SparseDLLM

    def choose(self) -> Keys:
        """Top keys, the same in every head."""
        score = self._logits().mean(2)
        is_prefix = torch.arange(score.shape[-1], device=score.device) < self.frame.cache.lengths[:, None]
        score = score.masked_fill(~is_prefix, float("-inf"))
        pooled = F.max_pool1d(score, self.rule.pool, stride=1, padding=self.rule.pool // 2)
        return self._top(pooled[:, :, None].expand(-1, -1, self.heads[2], -1).contiguous())


class SparseDChooser(Chooser):
    """Mean probability of whole tiles, which the exact pass gives away (in tiles that suit it).

    Averaged layer by layer: a rule that keeps a fifth of the prefix has no memory left for all layers' log masses.
    """

    def __init__(self, rule: SparseD, frame: Frame) -> None:
        super().__init__(rule, frame)
        if rule.page not in TILES:
            raise ValueError(f"sparsed in the decode engine needs tiles of {TILES} keys, not {rule.page}")
        rows = torch.empty(*self.heads[1:], self.group_rows, 1, device=frame.weights.device)
        self.tile = min(rule.page, best_tile(rows))
        tiles = round_up(frame.cache.capacity, rule.page) // self.tile
        self.mass = torch.zeros(*self.heads, tiles, device=frame.weights.device)

    def observe(self, layer: int, attended: Attended) -> None:
        """Tile masses."""
        assert attended.tile_log_mass is not None and self.tile is not None
        lengths, impl = self.frame.cache.lengths, self.frame.impl
        mass = tile_mass(attended.tile_log_mass, attended.prefix_log_mass, lengths, self.tile, impl=impl)
        self.mass[layer - self.first_layer, ..., : mass.shape[-1]].copy_(mass)

    def choose(self) -> Keys:
        """Top tiles of the rule's size."""
        assert self.tile is not None
        return self._top(self.mass.unflatten(-1, (-1, self.rule.page // self.tile)).sum(-1), self.rule.page)


CHOOSERS: dict[type[Rule], type[Chooser]] = {
    Mage: MageChooser,
    MeanQuery: MeanQueryChooser,
    SparseD: SparseDChooser,
    SparseDLLM: SparseDLLMChooser,
}


def make_chooser(rule: Rule, frame: Frame) -> Chooser:
    """The engine's form of a rule that chooses once.

    Raises:
        ValueError: it has none.
    """
    if type(rule) not in CHOOSERS:
        raise ValueError(f"the decode engine has no form of the selection rule {rule.name!r}")
    return CHOOSERS[type(rule)](rule, frame)
