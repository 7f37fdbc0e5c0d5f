"""Held-out windows under any selection rule: what its choice costs in cross-entropy, and which keys it finds.

The windows, blocks, reveals and seeds are those of `evals.probes`, which is MAGE's alone and slow and obvious; here the
keys come from the rules that decode, through decoding's own attention. A rule that chooses at a step s > 0 (sparsed,
sparse-dllm, a re-selection) does so on the block with its first s tokens revealed, one a step, as with a block's worth
of steps; a refresh chooses on the argmax draft of the all-[MASK] step; quest, tidal and oracle choose at the very step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_tune.backbone import output_head
from mage_tune.blocks import noise_generator
from mage_tune.decode.attention import LayerView, Residual, Selection, block_forward, extend, observe_forward
from mage_tune.decode.cache import Prefix, PrefixCache
from mage_tune.decode.rules import Observed, Rule, merge_observed
from mage_tune.decode.steps import Choice, Levers, choose_forward
from mage_tune.evals.probes import REVEALS, block_variants, masked_cross_entropy
from mage_tune.lm import BlockDiffusionLM

State = int | Literal["draft", "later"]
"""What a block looks like when a rule chooses: after so many steps, as its argmax draft, or as it is probed."""


class Reading(Protocol):
    """An arm, as far as it matters here."""

    @property
    def levers(self) -> Levers:
        """What is done on top of the rule."""


SomeReading = TypeVar("SomeReading", bound=Reading)


def chosen_at(rule: Rule, levers: Levers, block_size: int, revealed: int) -> State:
    """What the block looked like when the choice in force after so many reveals was made, one reveal a step.

    Not for rules that choose within a step.
    """
    if rule.chooses == "step":
        return "later"
    first = min(rule.select_at(block_size), revealed)
    again = [step for step in levers.reselect_at if first < step <= revealed]
    if again:
        return max(again)
    return first if levers.refresh is None else "draft"


@dataclass(frozen=True)
class Probed:
    """One row of the result on one window."""

    ce: float
    recall: float | None


@dataclass(frozen=True)
class Window:
    """Some blocks of a held-out window behind their cached prefixes.

    Rows of a probe pass are ordered by budget (where several are stacked), then block, then reveal.
    """

    lm: BlockDiffusionLM
    cache: PrefixCache
    lengths: list[int]
    """Prefix of each block."""
    before: Tensor
    """(blocks, hidden) clean hidden state of the token before each block."""
    truth: Tensor
    """(blocks, B) int64."""
    start: Tensor
    """(blocks, B) int64: the all-[MASK] step."""
    order: list[np.ndarray]
    """Places of each block in the order in which they are revealed."""
    later: Tensor
    """(blocks * reveals, B) int64: the steps that are probed."""
    is_masked: Tensor
    """Same shape, bool."""

    def prefix(self, per_block: int = 1, times: int = 1) -> Prefix:
        """What every row sees: each block `per_block` times in a row, all of that `times` times."""
        lengths = [length for length in self.lengths for _ in range(per_block)] * times
        return self.cache.prefix([0] * len(lengths), lengths)

    @property
    def revealed(self) -> list[int]:
        """Tokens of a block that are known at each probed step, the fewest of any block."""
        known = torch.tensor([len(places) for places in self.order], device=self.is_masked.device)[:, None]
        return (known - self.is_masked.sum(-1).view(-1, len(REVEALS))).amin(0).tolist()

    def at_step(self, step: int) -> Tensor:
        """(blocks, B) int64: every block with so many tokens revealed."""
        ids = self.start.clone()
        for row, places in enumerate(self.order):
            known = torch.from_numpy(places[:step]).to(ids.device)
            ids[row, known] = self.truth[row, known]
        return ids

    def draft(self, hidden: Tensor) -> Tensor:
        """(blocks, B) int64: the all-[MASK] blocks filled with their most probable tokens; hidden: (blocks, B, H)."""
        if self.lm.family.token_shift:
            hidden = torch.cat([self.before[:, None], hidden[:, :-1]], dim=1)
        logits, mask_id = output_head(self.lm.model)(hidden), self.lm.family.mask_id
        assert mask_id is not None
        logits[..., mask_id] = float("-inf")
        return torch.where(self.start.eq(mask_id), logits.argmax(-1), self.start)

    def losses(self, hidden: Tensor, times: int = 1) -> list[float]:
        """Mean cross-entropy of each of `times` stacks of probed rows; hidden: (times * blocks * reveals, B, H)."""
        stacks = hidden.unflatten(0, (times, len(self.lengths), len(REVEALS)))
        masks = self.is_masked.unflatten(0, (len(self.lengths), len(REVEALS)))
        losses = [
            masked_cross_entropy(
                self.lm,
                stacks[:, block].flatten(0, 1),
                self.before[block : block + 1],
                masks[block].repeat(times, 1),
                self.truth[block],
            )
            for block in range(len(self.lengths))
        ]
        return torch.stack(losses, dim=1).view(times, -1).mean(-1).tolist()


@torch.no_grad()
def open_window(lm: BlockDiffusionLM, tokens: np.ndarray, number: int, blocks: int, seed: int) -> Window:
    """Cache a window and lay out its probed blocks, those of `evals.probes.probe_window`."""
    size, total = lm.family.block_size, len(tokens) // lm.family.block_size
    numbers = sorted(set(np.linspace(total // 2, total - 1, blocks).round().astype(int).tolist()))
    cache = PrefixCache.for_model(lm.model, 1, len(tokens))
    before, rows, masks = [], [], []
    for block in numbers:
        hidden, _ = extend(lm.model, cache, [tokens[len(cache.ids[0]) : block * size].tolist()], size)
        before.append(hidden[0])
        ids, is_masked = block_variants(lm.family, np.asarray(tokens), block, (), noise_generator(seed, number, block))
        rows.append(torch.from_numpy(ids).to(lm.device))
        masks.append(is_masked)
    truth = np.stack([tokens[block * size : (block + 1) * size] for block in numbers]).astype(np.int64)
    return Window(
        lm,
        cache,
        [block * size for block in numbers],
        torch.stack(before),
        torch.from_numpy(truth).to(lm.device),
        torch.stack([ids[0] for ids in rows]),
        [
            noise_generator(seed, number, block).permutation(np.flatnonzero(mask[0]))
            for block, mask in zip(numbers, masks, strict=True)
        ],
        torch.cat([ids[1:] for ids in rows]),
        torch.from_numpy(np.concatenate([mask[1:] for mask in masks])).to(lm.device),
    )


class Look(NamedTuple):
    """One exact forward and what rules saw of it."""

    hidden: Tensor
    observed: dict[Rule, list[Observed]]


def look(window: Window, ids: Tensor, rules: Sequence[Rule], per_block: int = 1) -> Look:
    """An exact forward that all `rules` observe."""

    def observe(view: LayerView) -> list[Observed]:
        return [rule.observe(view) for rule in rules]

    prefix = window.prefix(per_block)
    hidden, seen = observe_forward(window.lm.model, prefix, ids, observe, first_layer=rules[0].dense_layers)
    return Look(hidden, {rule: [layer[i] for layer in seen] for i, rule in enumerate(rules)})


def look_everywhere(window: Window, arms: Mapping[SomeReading, Sequence[Rule]]) -> dict[State, Look]:
    """One exact forward for every state of the block in which some rule chooses."""
    size = window.lm.family.block_size
    wanted: dict[State, dict[Rule, None]] = defaultdict(dict)  # of dicts: sets that keep their order
    for arm, rules in arms.items():
        for rule in rules:
            if rule.chooses == "layer" or arm.levers.residual:
                continue
            for revealed in window.revealed:
                wanted[chosen_at(rule, arm.levers, size, revealed)][rule] = None
            if arm.levers.refresh is not None:
                wanted[0][rule] = None
    looks: dict[State, Look] = {}
    if 0 in wanted:  # first: a draft is made from it
        looks[0] = look(window, window.start, list(wanted.pop(0)))
    for state, rules_there in wanted.items():
        if state == "later":
            looks[state] = look(window, window.later, list(rules_there), len(REVEALS))
        else:
            ids = window.draft(looks[0].hidden) if state == "draft" else window.at_step(state)
            looks[state] = look(window, ids, list(rules_there))
    return looks


def choose(window: Window, arm: Reading, rule: Rule, looks: Mapping[State, Look]) -> Choice:
    """The keys that every probed row sees under a rule that chooses from an exact forward."""
    size, blocks = window.lm.family.block_size, range(len(window.lengths))
    if rule.chooses == "step":
        lengths = window.prefix(len(REVEALS)).lengths
        return Choice(rule.choose(looks["later"].observed[rule], lengths), None, [])
    if arm.levers.residual:  # needs the choosing step's queries, not its scores alone
        assert not arm.levers.reselect_at and arm.levers.refresh is None
        _, choice = choose_forward(window.lm.model, window.prefix(), window.start, rule, residual=True)
        return choice.take([block for block in blocks for _ in REVEALS])
    chosen = []
    for revealed in window.revealed:
        state = chosen_at(rule, arm.levers, size, revealed)
        observed = looks[state].observed[rule]
        if state == "draft":
            assert arm.levers.refresh is not None
            observed = merge_observed(looks[0].observed[rule], observed, arm.levers.refresh)
        chosen.append(Choice(rule.choose(observed, window.lengths), None, []))
    selection, _ = stack(chosen)  # by reveal, then block: turned around
    rows = [reveal * len(blocks) + block for block in blocks for reveal in range(len(REVEALS))]
    return Choice(selection, None, []).take(rows)


def stack(choices: Sequence[Choice]) -> tuple[Selection, Residual | None]:
    """Choices of different budgets one after the other, as rows of one batch."""
    index = _side_by_side([c.selection.index for c in choices], dim=1)
    is_kept = _side_by_side([c.selection.is_kept for c in choices], dim=1)
    residuals = [c.residual for c in choices if c.residual is not None]
    residual = None
    if residuals:
        residual = Residual(
            tuple(torch.cat(layer) for layer in zip(*(r.out for r in residuals), strict=True)),
            tuple(torch.cat(layer) for layer in zip(*(r.log_mass for r in residuals), strict=True)),
        )
    return Selection(index, is_kept, choices[0].selection.first_layer), residual


def _side_by_side(lists: Sequence[Tensor], dim: int) -> Tensor:
    slots = max(x.shape[-1] for x in lists)
    return torch.cat([F.pad(x, (0, slots - x.shape[-1])) for x in lists], dim=dim)


@dataclass
class StackedRule:
    """Rules of one kind that choose within a forward, each for its equal share of the batch, in order."""

    rules: Sequence[Rule]
    chosen: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By source layer: (index, is_kept) of every rule."""

    @property
    def dense_layers(self) -> int:
        """First layers that always see everything."""
        return self.rules[0].dense_layers

    @property
    def sources_are_exact(self) -> bool:
        """Whether a layer that chooses attends to everything itself."""
        return self.rules[0].sources_are_exact

    def source_layer(self, layer: int) -> int:
        """The layer whose choice `layer` uses."""
        return self.rules[0].source_layer(layer)

    def choose_in_step(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """(index, is_kept), each (batch, KV heads, k): every rule asked about its own rows."""
        share = len(view.lengths) // len(self.rules)
        parts = []
        for i, rule in enumerate(self.rules):
            mine = slice(i * share, (i + 1) * share)
            own = LayerView(
                view.layer, view.rows[mine], view.key[mine], view.is_visible[mine], view.lengths[mine], view.scaling
            )
            parts.append(rule.choose_in_step(own))
        self.chosen[view.layer] = parts
        return _side_by_side([p[0] for p in parts], dim=0), _side_by_side([p[1] for p in parts], dim=0)

    def recall(self, which: int, own: Selection) -> float:
        """Recall of one rule's keys against what its rows would choose from exact attention."""
        shares = []
        for at, layer in enumerate(range(self.dense_layers, self.dense_layers + len(own.index))):
            source = self.source_layer(layer)
            if source == layer and self.sources_are_exact:
                shares.append(1.0)
                continue
            index, is_kept = self.chosen[source][which]
            theirs = Selection(own.index[at : at + 1], own.is_kept[at : at + 1])
            shares.append(float(Selection(index[None], is_kept[None]).recall(theirs).mean()))
        return float(np.mean(shares))


def probe_arm(
    window: Window, arm: Reading, rules: Sequence[Rule], looks: Mapping[State, Look], own: Sequence[Selection]
) -> list[Probed]:
    """One arm at every budget, in one forward; `own` is what the probed steps would choose from exact attention."""
    times = len(rules)
    model, prefix, ids = window.lm.model, window.prefix(len(REVEALS), times), window.later.repeat(times, 1)
    if rules[0].chooses == "layer":
        stacked = StackedRule(rules)
        hidden = block_forward(model, prefix, ids, rule=stacked)
        recalls = [stacked.recall(i, keys) for i, keys in enumerate(own)]
    else:
        choices = [choose(window, arm, rule, looks) for rule in rules]
        selection, residual = stack(choices)
        hidden = block_forward(model, prefix, ids, selection=selection, residual=residual)
        recalls = [float(c.selection.recall(keys).mean()) for c, keys in zip(choices, own, strict=True)]
    return [Probed(ce, recall) for ce, recall in zip(window.losses(hidden, times), recalls, strict=True)]
