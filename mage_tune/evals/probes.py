"""How well the all-[MASK] step of a block foresees its later steps, on held-out text.

For a block of a held-out window the probe runs, in one forward pass against the cached clean prefix,

    row 0                    the all-[MASK] step, exact
    for every reveal share   the same block partly revealed (teacher-forced):
                               exact | mask-k: keys chosen at the all-[MASK] step | oracle-k: keys chosen at this step

and measures, for every budget k (definitions of the project's feasibility study):

    recall     share of the later step's own top-k prefix keys that the all-[MASK] step had chosen
    mass       share of the later step's attention over the prefix that falls on the keys chosen at all-[MASK]
    qcos       cosine of block-average queries, all-[MASK] step against later step
    ce_*       cross-entropy of the still masked tokens, in nats: exact, mask-k and oracle-k

The first `dense_layers` layers stay exact and are left out of recall, mass and qcos. The selection is MAGE v2's: mean
probability over the block and the group, top-k per KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_tune.backbone import hidden_states, output_head
from mage_tune.blocks import all_mask_positions, noise_generator
from mage_tune.families import Family
from mage_tune.lm import BlockDiffusionLM
from mage_tune.selection import mean_probability, packed_rows, top_keys
from mage_tune.streams import RowStreams, exact_attention

REVEALS = (0.25, 0.5, 0.75)
"""Shares of a block's masked positions that are revealed at the later steps."""


@dataclass
class PrefixRecorder:
    """Attention of a plain block-causal pass that keeps every layer's keys and values."""

    streams: RowStreams
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(1, heads, n, D) q, k, v of the clean window -> block-causal attention."""
        self.keys.append(key)
        self.values.append(value)
        return exact_attention(query, key, value, self.streams.exact, scaling)


@dataclass
class ProbeAttention:
    """Attention of one probe pass: rows [all-mask ; per reveal: exact, mask-k ..., oracle-k ...] of one block.

    Prefix keys are restricted by a mask over the whole prefix, which is slow and obvious: this is a reference.
    """

    keys: list[Tensor]
    values: list[Tensor]
    prefix: int
    budgets: Sequence[int]
    reveals: int
    dense_layers: int
    recall: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)
    query_cosine: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the pass."""
        return 1 + self.reveals * (1 + 2 * len(self.budgets))

    def exact_row(self, reveal: int) -> int:
        """Row of a reveal's exact variant; its mask-k and oracle-k rows follow, budget by budget."""
        return 1 + reveal * (1 + 2 * len(self.budgets))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(rows, heads, B, D) q, k, v of the block's variants -> attention over [chosen prefix ; own block]."""
        heads = key.shape[1]
        prefix_key = self.keys[layer][:, :, : self.prefix].expand(self.rows, -1, -1, -1)
        prefix_value = self.values[layer][:, :, : self.prefix].expand(self.rows, -1, -1, -1)
        visible = torch.ones(self.rows, heads, self.prefix, dtype=torch.bool, device=query.device)
        if layer >= self.dense_layers:
            visible = self._restrict(visible, query, prefix_key, scaling)
        rows = packed_rows(query, heads, query.shape[2])[:, :, 0]  # (rows, KV heads, R, D)
        own = torch.ones(self.rows, heads, key.shape[2], dtype=torch.bool, device=query.device)
        out = F.scaled_dot_product_attention(
            rows,
            torch.cat([prefix_key, key], dim=2),
            torch.cat([prefix_value, value], dim=2),
            attn_mask=torch.cat([visible, own], dim=-1)[:, :, None],
            scale=scaling,
        )
        return out.reshape(query.shape)

    def _restrict(self, visible: Tensor, query: Tensor, prefix_key: Tensor, scaling: float) -> Tensor:
        """Mark which prefix keys each row sees, and measure how well the all-[MASK] choice fits the later steps."""
        sources = [0] + [self.exact_row(r) for r in range(self.reveals)]
        rows = packed_rows(query[sources], prefix_key.shape[1], query.shape[2])
        everything = torch.ones(1, 1, 1, self.prefix, dtype=torch.bool, device=query.device)
        score = mean_probability(rows, prefix_key[sources], everything, scaling)[:, :, 0]  # (1 + reveals, KV heads, N)
        chosen = [torch.zeros_like(score, dtype=torch.bool) for _ in self.budgets]
        for picked, budget in zip(chosen, self.budgets, strict=True):
            picked.scatter_(-1, top_keys(score, budget, everything[:, :, 0])[0], True)
        for reveal in range(self.reveals):
            first = self.exact_row(reveal) + 1
            for i, picked in enumerate(chosen):
                visible[first + 2 * i] = picked[0]
                visible[first + 2 * i + 1] = picked[reveal + 1]
        at_mask = torch.stack([picked[0] for picked in chosen])[:, None]  # (budgets, 1, KV heads, N)
        later = torch.stack([picked[1:] for picked in chosen])  # (budgets, reveals, KV heads, N)
        self.recall.append(((at_mask & later).sum(-1) / later.sum(-1)).mean(dim=(1, 2)))
        self.mass.append((score[None, 1:] * at_mask).sum(-1).mean(dim=(1, 2)))
        mean_query = rows[:, :, 0].float().mean(dim=-2)
        self.query_cosine.append(F.cosine_similarity(mean_query[:1], mean_query[1:], dim=-1).mean())
        return visible


@dataclass(frozen=True)
class ProbedBlock:
    """The measurements of one block; per-budget values are in the order of the budgets."""

    window: int
    block: int
    ce_exact: float
    ce_mask: list[float]
    ce_oracle: list[float]
    recall: list[float]
    mass: list[float]
    query_cosine: float
    recall_by_layer: list[list[float]]


@torch.no_grad()
def probe_window(
    lm: BlockDiffusionLM,
    tokens: np.ndarray,
    window: int,
    *,
    blocks: int,
    budgets: Sequence[int],
    dense_layers: int,
    seed: int,
) -> list[ProbedBlock]:
    """Probe some blocks of one held-out window.

    Args:
        lm: model under test.
        tokens: (n,) token ids, n a whole number of blocks.
        window: number of the window; reveals are drawn from (seed, window, block).
        blocks: blocks probed, evenly spread over the second half of the window.
        budgets: keys kept per KV head, ascending, each smaller than half the window.
        dense_layers: first layers that stay exact.

    Returns:
        One record per probed block.
    """
    size = lm.family.block_size
    ids = torch.tensor(tokens, dtype=torch.int64, device=lm.device)[None]  # a copy: memory maps are read-only
    recorder = PrefixRecorder(RowStreams(len(tokens), size, noisy=0))
    positions = torch.arange(len(tokens), device=lm.device)[None]
    clean = hidden_states(lm.model, ids, positions, recorder.attend)
    total = len(tokens) // size
    chosen = np.linspace(total // 2, total - 1, blocks).round().astype(int)
    records = []
    for block in sorted(set(chosen.tolist())):
        rng = noise_generator(seed, window, block)
        variants, is_masked = block_variants(lm.family, np.asarray(tokens), block, budgets, rng)
        attention = ProbeAttention(recorder.keys, recorder.values, block * size, budgets, len(REVEALS), dense_layers)
        batch = torch.from_numpy(variants).to(lm.device)
        at = torch.arange(block * size, (block + 1) * size, device=lm.device).expand(len(variants), -1)
        hidden = hidden_states(lm.model, batch, at, attention.attend)
        before = clean[:, block * size - 1]
        masked = torch.from_numpy(is_masked).to(lm.device)
        cross_entropy = masked_cross_entropy(lm, hidden, before, masked, ids[0, at[0]])
        records.append(_record(window, block, attention, cross_entropy.tolist()))
    return records


def block_variants(
    family: Family, tokens: np.ndarray, block: int, budgets: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every row of a probe pass (rows, B), and which positions are masked (rows, B)."""
    size = family.block_size
    truth = tokens[block * size : (block + 1) * size]
    at_start = all_mask_positions(np.ones(len(tokens)), family)[block * size : (block + 1) * size]
    order = rng.permutation(np.flatnonzero(at_start))
    masks = [at_start]
    for share in REVEALS:
        later = at_start.copy()
        later[order[: min(round(share * len(order)), len(order) - 1)]] = False  # something is always left to predict
        masks += [later] * (1 + 2 * len(budgets))
    is_masked = np.stack(masks)
    assert family.mask_id is not None
    return np.where(is_masked, family.mask_id, truth).astype(np.int64), is_masked


def masked_cross_entropy(
    lm: BlockDiffusionLM, hidden: Tensor, before: Tensor, is_masked: Tensor, truth: Tensor
) -> Tensor:
    """Mean cross-entropy of the masked tokens of every row.

    Args:
        hidden: (rows, B, hidden) of the block.
        before: (1, hidden) clean hidden state of the token before the block, which predicts its first token where
            the family shifts tokens.
        is_masked: (rows, B) bool.
        truth: (B,) token ids.

    Returns:
        (rows,) float32, nats per masked token.
    """
    if lm.family.token_shift:
        hidden = torch.cat([before[:, None].expand(len(hidden), -1, -1), hidden[:, :-1]], dim=1)
    logits = output_head(lm.model)(hidden).float()
    logits[..., lm.family.mask_id] = float("-inf")  # decoding never writes the mask token
    losses = F.cross_entropy(logits.flatten(0, 1), truth.repeat(len(hidden)), reduction="none").view(is_masked.shape)
    return (losses * is_masked).sum(-1) / is_masked.sum(-1)


def _record(window: int, block: int, attention: ProbeAttention, cross_entropy: list[float]) -> ProbedBlock:
    per_reveal = range(attention.reveals)
    budgets = range(len(attention.budgets))

    def mean(offset: int) -> float:
        return float(np.mean([cross_entropy[attention.exact_row(r) + offset] for r in per_reveal]))

    recall, mass = torch.stack(attention.recall), torch.stack(attention.mass)  # (layers, budgets)
    return ProbedBlock(
        window=window,
        block=block,
        ce_exact=mean(0),
        ce_mask=[mean(1 + 2 * i) for i in budgets],
        ce_oracle=[mean(2 + 2 * i) for i in budgets],
        recall=recall.mean(0).tolist(),
        mass=mass.mean(0).tolist(),
        query_cosine=float(torch.stack(attention.query_cosine).mean()),
        recall_by_layer=recall.T.tolist(),
    )


def probe_text(
    lm: BlockDiffusionLM,
    windows: Sequence[np.ndarray],
    *,
    blocks: int,
    budgets: Sequence[int],
    dense_layers: int,
    seed: int = 0,
    on_window: Callable[[], None] = lambda: None,
) -> list[ProbedBlock]:
    """`probe_window` over many windows; `on_window` is called after each, for progress."""
    records = []
    for number, window in enumerate(windows):
        records += probe_window(
            lm, window, number, blocks=blocks, budgets=budgets, dense_layers=dense_layers, seed=seed
        )
        on_window()
    return records
