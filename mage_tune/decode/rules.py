"""Selection rules: who picks the keys that the sparse steps of a block see.

    name        scores a key by                                            granularity     chosen
    exact       -                                                          -               never: every step is exact
    mage        attention probability, mean over block and group           token           once, all-[MASK] step
    mage-v1     votes of per-query top-k lists; budget varies by layer     token           once, all-[MASK] step
    mean-query  logit of the block-average query                           token           once, all-[MASK] step
    sparsed     attention probability, mean over block and group           128-key tile    once, last dense step
    sparse-dllm logit of the block-average query, mean over *all* heads    token, pooled   once, second step
    quest       upper bound from per-page min and max of the keys          16-key page     every step, every layer
    tidal       logit of the block's queries, mean, in two source layers   token           every step, two layers
    oracle      as mage, at the very step that uses it                     token           every step

All of them are ports to block diffusion: the B positions of a block and the G query heads of a KV head share one list,
chosen among the cached prefix; the block itself is always seen and does not count. A prefix that fits in the budget is
attended exactly, by the same code as `exact`. Sources: mage_paper.md sections 1 and 5, kernels.md section 1.
Probabilities are normalised over the prefix alone, as in training (`mage_tune.selection.mean_probability`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_tune.decode.attention import LayerView, Selection
from mage_tune.selection import mean_logit, mean_probability, page_bound, query_votes, spread_forward, top_pages


class Observed(NamedTuple):
    """What a rule keeps of one layer until it chooses."""

    score: Tensor
    """(batch, KV heads, pages) float32, higher is better; a page is one key for token-level rules."""
    strength: Tensor | None = None
    """(batch,) float32: share of the model's budget this layer deserves; None: every layer the same."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A selection rule and its options: the base of them all, which scores nothing by itself.

    Raises:
        ValueError: an option is out of range, or two contradict each other.
    """

    name: ClassVar[str]
    chooses: ClassVar[Literal["never", "once", "step", "layer"]] = "once"
    """When: once per block; at every step, from a look at exact attention; or within every step, layer by layer."""

    budget: int = 512
    """Prefix keys per KV head that a sparse step sees, sinks and recent window included."""
    dense_layers: int = 2
    """First layers that always see the whole prefix."""
    sinks: int = 0
    """Keys at the very beginning that are always kept."""
    recent: int = 0
    """Keys right before the block that are always kept."""
    follow: int = 0
    """Keys behind a key that are scored as well as it is; the budget stays."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"budget {self.budget}: a sparse step needs at least one key per KV head")
        if self.follow and self.page > 1:
            raise ValueError(
                f"follow {self.follow}: {self.name} keeps pages of {self.page} keys, which hold neighbours"
            )
        for option in ("dense_layers", "sinks", "recent", "follow"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option} {getattr(self, option)} is negative")
        if self.sinks + self.recent > self.budget:
            raise ValueError(
                f"sinks {self.sinks} + recent {self.recent} exceed the budget of {self.budget} keys they count towards"
            )

    @property
    def page(self) -> int:
        """Keys that are kept or dropped together."""
        return 1

    def select_at(self, steps: int) -> int:
        """The step (from 0) whose attention chooses, in a block of at most `steps`; it and those before are exact."""
        return 0

    def is_sparse(self, prefix_length: int) -> bool:
        """Whether a block after such a prefix gets sparse steps at all."""
        return prefix_length > self.budget

    def num_pages(self, prefix_length: int) -> int:
        """Pages that a row with this prefix keeps."""
        return max(1, self.budget // self.page)

    def observe(self, view: LayerView) -> Observed:
        """Score the prefix of one layer from the block's queries."""
        raise NotImplementedError

    def choose(self, observed: Sequence[Observed], prefix_lengths: Sequence[int]) -> Selection:
        """Keys of every layer from `dense_layers` on, from what was observed there, in order of layers.

        Args:
            observed: one entry per sparse layer.
            prefix_lengths: of each row of the batch; a row that needs no sparse step keeps its whole prefix.
        """
        device = observed[0].score.device
        lengths = torch.tensor(prefix_lengths, device=device)
        lists = [
            top_pages(spread_forward(o.score, self.follow), counts, self.page, lengths, self.sinks, self.recent)
            for o, counts in zip(observed, self._counts(observed, prefix_lengths), strict=True)
        ]
        slots = max(index.shape[-1] for index, _ in lists)
        return Selection(
            torch.stack([F.pad(index, (0, slots - index.shape[-1])) for index, _ in lists]),
            torch.stack([F.pad(is_kept, (0, slots - is_kept.shape[-1])) for _, is_kept in lists]),
            first_layer=self.dense_layers,
        )

    def _counts(self, observed: Sequence[Observed], prefix_lengths: Sequence[int]) -> list[list[int]]:
        """Pages to keep, by layer and row."""
        counts = [self.num_pages(n) if self.is_sparse(n) else -(-n // self.page) for n in prefix_lengths]
        return [counts] * len(observed)

    def settings(self) -> dict[str, Any]:
        """Name and every option, for results."""
        return {"rule": self.name} | {f.name: getattr(self, f.name) for f in fields(self)}

    # Rules that choose in every layer do so inside the forward pass: attention.InStepRule.

    @property
    def sources_are_exact(self) -> bool:
        """Whether a layer that chooses attends to everything itself."""
        return False

    def source_layer(self, layer: int) -> int:
        """The layer whose choice `layer` uses."""
        return layer

    def choose_in_step(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """(index, is_kept), each (batch, KV heads, k), for one layer of this step."""
        if self.chooses != "layer":
            raise ValueError(f"rule {self.name!r} chooses from an exact forward: use steps.choose_forward")
        selection = self.choose([self.observe(view)], view.lengths)
        return selection.index[0], selection.is_kept[0]


@dataclass(frozen=True, kw_only=True)
class Exact(Rule):
    """Every step sees the whole prefix."""

    name: ClassVar[str] = "exact"
    chooses: ClassVar = "never"

    def is_sparse(self, prefix_length: int) -> bool:
        """Never."""
        return False


@dataclass(frozen=True, kw_only=True)
class Mage(Rule):
    """MAGE (arXiv 2602.14209 v2): mean probability at the all-[MASK] step, top-k per KV head, fixed budget."""

    name: ClassVar[str] = "mage"
    layer_budgets: tuple[tuple[int, int], ...] = ()
    """(layer, keys) of layers that keep another number of keys than `budget`; a mapping is taken too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.layer_budgets.items() if isinstance(self.layer_budgets, Mapping) else self.layer_budgets
        pairs = tuple(sorted((int(layer), int(keys)) for layer, keys in given))
        object.__setattr__(self, "layer_budgets", pairs)  # frozen; a recipe's mapping has text as keys
        if len(dict(pairs)) < len(pairs):
            raise ValueError("layer_budgets name a layer twice")
        for layer, keys in pairs:
            if layer < self.dense_layers:
                raise ValueError(f"layer_budgets: layer {layer} is one of the {self.dense_layers} dense ones")
            if keys < max(1, self.sinks + self.recent):
                raise ValueError(f"layer_budgets: {keys} keys of layer {layer} are too few (sinks and recent included)")

    def keys_by_layer(self, num_layers: int, prefix_length: int) -> list[int]:
        """Keys that each layer from `dense_layers` on keeps of such a prefix.

        Raises:
            ValueError: `layer_budgets` name a layer that the model has not got.
        """
        keys = dict(self.layer_budgets)
        if keys and max(keys) >= num_layers:
            raise ValueError(f"layer_budgets: the model has no layer {max(keys)}")
        if not self.is_sparse(prefix_length):
            return [prefix_length] * (num_layers - self.dense_layers)
        return [min(keys.get(layer, self.budget), prefix_length) for layer in range(self.dense_layers, num_layers)]

    def _counts(self, observed: Sequence[Observed], prefix_lengths: Sequence[int]) -> list[list[int]]:
        num_layers = self.dense_layers + len(observed)
        return [list(row) for row in zip(*(self.keys_by_layer(num_layers, n) for n in prefix_lengths), strict=True)]

    def observe(self, view: LayerView) -> Observed:
        """Mean attention probability of each key over the block and the group."""
        return Observed(_mean_probability(view))


@dataclass(frozen=True, kw_only=True)
class MageV1(Rule):
    """MAGE v1: union of per-query top-k lists ranked by votes, and budgets that follow how diffuse a layer is.

    Layer strength s_l = max_h [|U_h| * (1 - log p_h)], with U_h the union of head h's lists and p_h the mean
    probability it covers; K_l = max(min_budget, floor(s_l / sum s * budget * layers)). A head with K_l > |U_h| fills up
    with the most recent keys. Not recovered from any source, chosen here: votes = queries that list the key, ties by
    mean probability; min_budget = budget / 4.
    """

    name: ClassVar[str] = "mage-v1"
    min_budget: int | None = None

    def observe(self, view: LayerView) -> Observed:
        """Votes inside the union, recency outside it, and the layer's strength."""
        votes, mean = query_votes(view.rows, view.key, view.is_visible[:, None], view.scaling, self.budget)
        in_union = votes > 0
        recency = torch.arange(votes.shape[-1], device=votes.device) / votes.shape[-1] - 1.0  # in [-1, 0)
        covered = (mean * in_union).sum(-1).clamp(min=1e-9, max=1.0)
        strength = (in_union.sum(-1) * (1.0 - covered.log())).amax(-1)
        return Observed(torch.where(in_union, votes + 0.5 * mean, recency), strength)

    def _counts(self, observed: Sequence[Observed], prefix_lengths: Sequence[int]) -> list[list[int]]:
        strengths = torch.stack([o.strength for o in observed if o.strength is not None])  # (layers, batch)
        shares = strengths / strengths.sum(0)
        least = self.budget // 4 if self.min_budget is None else self.min_budget
        # The slack keeps a whole number whole: layers of equal strength must not lose a key to rounding.
        budgets = (shares * self.budget * len(observed) + 1e-3).floor().clamp(min=max(1, least)).long()
        is_sparse = [self.is_sparse(n) for n in prefix_lengths]
        return [
            [min(k, n) if sparse else n for k, n, sparse in zip(row, prefix_lengths, is_sparse, strict=True)]
            for row in budgets.tolist()
        ]


@dataclass(frozen=True, kw_only=True)
class MeanQuery(Rule):
    """The block-average query's logits: the selector that the alignment loss speaks of, at the price of one query."""

    name: ClassVar[str] = "mean-query"

    def observe(self, view: LayerView) -> Observed:
        """Logit of the average of the packed rows."""
        return Observed(mean_logit(view.rows, view.key, view.scaling))


@dataclass(frozen=True, kw_only=True)
class SparseDLLM(Rule):
    """Sparse-dLLM (arXiv 2508.02558): mean-query logits averaged over all heads, max-pooled, from the second step."""

    name: ClassVar[str] = "sparse-dllm"
    ratio: float | None = None
    """Share of the prefix to keep (0.5 in the original) instead of `budget`."""
    pool: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio(self.ratio)
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool {self.pool} must be odd, so that a key is the centre of its window")

    def select_at(self, steps: int) -> int:
        """The second step ("delayed by one")."""
        return 1

    def is_sparse(self, prefix_length: int) -> bool:
        """A ratio below 1 always drops something."""
        return super().is_sparse(prefix_length) if self.ratio is None else self.num_pages(prefix_length) < prefix_length

    def num_pages(self, prefix_length: int) -> int:
        """The budget, or the ratio of the prefix."""
        return super().num_pages(prefix_length) if self.ratio is None else max(1, int(prefix_length * self.ratio))

    def observe(self, view: LayerView) -> Observed:
        """One score per key for the whole layer, shared by its KV heads."""
        heads = view.key.shape[1]
        score = mean_logit(view.rows, view.key, view.scaling).mean(1, keepdim=True)
        score = score.masked_fill(~view.is_visible[:, None], float("-inf"))
        pooled = F.max_pool1d(score, self.pool, stride=1, padding=self.pool // 2)
        return Observed(pooled.expand(-1, heads, -1))


@dataclass(frozen=True, kw_only=True)
class SparseD(Rule):
    """SparseD (arXiv 2509.24014): dense for the first share of steps, then fixed tiles of 128 keys.

    Its "20 % of the steps" counts the steps given, or the block's length where decoding stops by threshold; so blocks
    that finish early may never turn sparse. One list per KV head (the original keeps one per query head).
    """

    name: ClassVar[str] = "sparsed"
    skip: float = 0.2
    """Share of a block's steps that stay dense."""
    ratio: float | None = None
    """Share of the tiles to keep (0.3 in the original) instead of `budget`."""
    tile: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ratio(self.ratio)
        if not 0.0 <= self.skip < 1.0:
            raise ValueError(f"skip {self.skip} is not a share of the steps (0 <= skip < 1)")

    @property
    def page(self) -> int:
        """The tile; smaller where the budget is smaller than one."""
        return self.tile if self.ratio is not None else min(self.tile, self.budget)

    def select_at(self, steps: int) -> int:
        """The last dense step."""
        return max(1, round(self.skip * steps)) - 1

    def is_sparse(self, prefix_length: int) -> bool:
        """With a ratio, whenever a tile is dropped."""
        if self.ratio is None:
            return super().is_sparse(prefix_length)
        return self.num_pages(prefix_length) < -(-prefix_length // self.tile)

    def num_pages(self, prefix_length: int) -> int:
        """The budget in tiles, or the ratio of the prefix's tiles plus one, as in the original."""
        if self.ratio is None:
            return super().num_pages(prefix_length)
        return int(-(-prefix_length // self.tile) * self.ratio) + 1

    def observe(self, view: LayerView) -> Observed:
        """Mean probability of each tile."""
        return Observed(_sum_pages(_mean_probability(view), self.page))


@dataclass(frozen=True, kw_only=True)
class Quest(Rule):
    """Quest (arXiv 2406.10774): per page the largest logit its min and max keys allow, averaged over the rows."""

    name: ClassVar[str] = "quest"
    chooses: ClassVar = "layer"
    page_size: int = 16

    @property
    def page(self) -> int:
        """The page; smaller where the budget is smaller than one."""
        return min(self.page_size, self.budget)

    def observe(self, view: LayerView) -> Observed:
        """sum_d max(q_d * max_d, q_d * min_d), mean over the packed rows."""
        return Observed(page_bound(view.rows, view.key, view.is_visible, self.page))


@dataclass(frozen=True, kw_only=True)
class Tidal(Rule):
    """TidalDecode (arXiv 2410.05076): two layers attend to everything and choose; the layers after each reuse its keys.

    Chosen by mean logit over block and group, per KV head (the original, for one query, chooses per query head).
    """

    name: ClassVar[str] = "tidal"
    chooses: ClassVar = "layer"
    correction_layer: int = 13
    """The second source; the first is the layer right after the dense ones."""

    @property
    def sources_are_exact(self) -> bool:
        """A source attends to everything."""
        return True

    def source_layer(self, layer: int) -> int:
        """The last source at or before the layer."""
        return self.correction_layer if layer >= self.correction_layer > self.dense_layers else self.dense_layers

    def observe(self, view: LayerView) -> Observed:
        """Mean logit over the packed rows."""
        return Observed(mean_logit(view.rows, view.key, view.scaling))


@dataclass(frozen=True, kw_only=True)
class Oracle(Mage):
    """MAGE's score from exact attention at the very step that uses it: what a perfect forecast would choose."""

    name: ClassVar[str] = "oracle"
    chooses: ClassVar = "step"


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Exact, Mage, MageV1, MeanQuery, SparseD, SparseDLLM, Quest, Tidal, Oracle)
}


def make_rule(rule: str | Rule, **options: Any) -> Rule:
    """A rule by name with its options, or the rule given; options that are None keep their defaults.

    Raises:
        ValueError: no such rule, or an option it does not have or cannot take.
    """
    options = {name: option for name, option in options.items() if option is not None}
    if isinstance(rule, Rule):
        if options:
            raise ValueError(f"give {', '.join(options)} to the {rule.name!r} rule itself")
        return rule
    if rule not in RULES:
        nearest = difflib.get_close_matches(str(rule), RULES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown selection rule {rule!r}{hint} (known: {', '.join(RULES)})")
    known = {f.name for f in fields(RULES[rule])}
    for name in options:
        if name not in known:
            raise ValueError(f"selection rule {rule!r} has no option {name!r} (it has: {', '.join(sorted(known))})")
    return RULES[rule](**options)


def merge_observed(
    first: Sequence[Observed], second: Sequence[Observed], how: Literal["draft", "union"]
) -> list[Observed]:
    """What two exact forwards of a block saw: the draft's alone, or for each key the better of the two scores."""
    if how == "draft":
        return list(second)
    return [Observed(torch.maximum(a.score, b.score), b.strength) for a, b in zip(first, second, strict=True)]


def _mean_probability(view: LayerView) -> Tensor:
    visible = view.is_visible[:, None, None, :]
    return mean_probability(view.rows.unsqueeze(2), view.key, visible, view.scaling).squeeze(2)


def _sum_pages(score: Tensor, page: int) -> Tensor:
    """(..., N) -> (..., pages): sums over pages of keys, the last one possibly short."""
    padded = F.pad(score, (0, -score.shape[-1] % page))
    return padded.unflatten(-1, (-1, page)).sum(-1)


def _check_ratio(ratio: float | None) -> None:
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ValueError(f"ratio {ratio} is not a share of the prefix (0 < ratio <= 1)")
