"""The engine against the plain decoder, on this machine and in the precision that is timed.

On tiny random models of each family, with rows of different lengths, and with one row alone, whose step has kernels of
its own: logits of an exact step, the keys a rule chooses, logits of a sparse step under those very keys, all against
the plain decoder in float64 on the same weights and measured by what plain PyTorch loses in the engine's precision; and
the text of graphs against the text of single launches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mage_tune.backbone import output_head, random_backbone
from mage_tune.blocks import round_up
from mage_tune.decode.attention import Selection, block_forward, extend
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings, generate
from mage_tune.decode.engine.weights import weights_of
from mage_tune.decode.rules import Exact, Mage
from mage_tune.decode.steps import choose_forward
from mage_tune.lm import BlockDiffusionLM, from_backbone

TINY: dict[str, int] = {
    "vocab_size": 263,  # below the byte tokenizer's 264, whose ids would replace those given
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 64,
    "tie_embeddings": True,
    "max_positions": 2048,
}
MASK_ID = 262
FAMILIES = {"converted": "llama", "fast_dllm_v2": "qwen2", "sdar": "qwen3"}
BLOCK = 32
LENGTHS = (640, 96, 416)
BUDGET = 128
ALONE: dict[str, int] = {
    "vocab_size": 320,
    "hidden_size": 1024,
    "intermediate_size": 2304,
    "num_layers": 2,
    "num_heads": 8,
    "head_dim": 128,
}
"""A shape whose products in a step of one row are those of a few rows, some in whole tiles, some not (`few_rows`)."""
SLACK = 2.0
"""An engine may lose this many times what plain PyTorch loses in the same precision."""


@dataclass(frozen=True)
class Check:
    """One comparison: passed when `found` is at most `allowed`."""

    what: str
    found: float
    allowed: float

    @property
    def is_fine(self) -> bool:
        """False for NaN too."""
        return self.found <= self.allowed


def check_engine(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """Every comparison for every family."""
    checks: list[Check] = []
    for family in FAMILIES:
        checks += check_model(family, tiny_lm(family, device, dtype), LENGTHS, BUDGET)
        alone = tiny_lm(family, device, dtype, **ALONE)
        checks += check_model(f"{family}, one row", alone, LENGTHS[:1], 4 * BUDGET)
    return checks


@torch.no_grad()
def check_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Check:
    """Logits of an exact step by another exact kernel: rows of equal length, heads of 128 as in published models.

    Raises:
        ValueError: it cannot run here.
    """
    lm = tiny_lm("converted", device, dtype, head_dim=128)
    prompts = torch.randint(2, MASK_ID, (2, 640), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(weights_of(lm.model), engine_settings(lm.family, Exact()), 2, 704, exact_kernel=name)
    for row, ids in enumerate(prompts):
        engine.prefill(row, ids)
    engine.plan()
    found = engine.look("exact")
    wide = BlockDiffusionLM(copy.deepcopy(lm.model).double(), None, lm.family)
    true, plain = (_exact_logits(one, prompts, engine.blocks.ids) for one in (wide, lm))
    return Check(f"{name}: logits, exact step", _error(found, true), SLACK * _error(plain, true))


def _exact_logits(lm: BlockDiffusionLM, prompts: list[list[int]], block: Tensor) -> Tensor:
    cache = PrefixCache.for_model(lm.model, len(prompts), max(map(len, prompts)))
    extend(lm.model, cache, prompts, BLOCK)
    return output_head(lm.model)(block_forward(lm.model, cache, block))


def tiny_lm(family: str, device: torch.device, dtype: torch.dtype, **shape: int) -> BlockDiffusionLM:
    """A tiny random model whose weights are large enough for attention to have favourites."""
    sizes: dict[str, Any] = TINY | {"architecture": FAMILIES[family]} | shape
    facts: dict[str, Any] = {"block_size": BLOCK, "mask_id": MASK_ID, "stop_ids": (1,), "pad_id": 0}
    lm = from_backbone(random_backbone(sizes, family, dtype="float32", device=str(device), **facts))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    lm.model.to(dtype)
    return lm


@torch.no_grad()
def check_model(
    name: str, lm: BlockDiffusionLM, lengths: tuple[int, ...], budget: int, impl: str | None = None
) -> Iterator[Check]:
    """Every comparison for a model, with a row of random tokens of each length; `impl` as in `Engine`."""
    first = next(lm.model.parameters())
    device, dtype = first.device, first.dtype
    wide = BlockDiffusionLM(copy.deepcopy(lm.model).double(), None, lm.family)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, MASK_ID, (n,), generator=generator).tolist() for n in lengths]
    block = torch.full((len(prompts), BLOCK), MASK_ID, device=device)
    block[:, 0] = 5
    rule = Mage(budget=budget, dense_layers=1)

    capacity = round_up(max(lengths) + BLOCK, BLOCK)
    engine = Engine(weights_of(lm.model), engine_settings(lm.family, rule), len(prompts), capacity, impl=impl)
    for row, ids in enumerate(prompts):
        engine.prefill(row, ids)
    engine.blocks.lay_out(block)
    engine.plan()
    exact, _ = engine.look("exact"), engine.look("score")
    assert engine.chooser is not None
    engine.chooser.select()
    chosen = engine.chooser.choose()
    slots = torch.arange(chosen.index.shape[-1], device=device)
    selection = Selection(chosen.index.long(), slots < chosen.count[..., None], rule.dense_layers)
    sparse = engine.look("sparse")

    true_exact, true_sparse, true_choice = _plain(wide, prompts, block, rule, selection)
    plain_exact, plain_sparse, plain_choice = _plain(lm, prompts, block, rule, selection)
    rounding = torch.finfo(dtype).eps
    for what, ours, plain, true in (
        ("exact step", exact, plain_exact, true_exact),
        ("sparse step", sparse, plain_sparse, true_sparse),
    ):
        yield Check(f"{name}: logits, {what}", _error(ours, true), SLACK * _error(plain, true) + rounding)
    missed = 1.0 - float(true_choice.recall(selection).mean())
    yield Check(f"{name}: keys missed", missed, SLACK * (1.0 - float(true_choice.recall(plain_choice).mean())) + 0.01)
    if engine.fuses_commits:
        yield _fused_commit(name, lm, wide, prompts, block, rule)
    if device.type == "cuda":
        yield Check(f"{name}: tokens, graphs against launches", float(_differing(lm, prompts, budget)), 0.0)


def _fused_commit(
    name: str, lm: BlockDiffusionLM, wide: BlockDiffusionLM, prompts: list[list[int]], block: Tensor, rule: Mage
) -> Check:
    """Keys and values that a block leaves in the cache, committed with the next one's first step or on its own."""
    found = []
    for model, may_wait in ((lm, True), (lm, False), (wide, False)):
        settings = engine_settings(lm.family, Exact() if model is wide else rule)  # no rule keeps masses in float64
        options: dict[str, Any] = {"impl": "reference", "use_graphs": False} if model is wide else {}
        engine = Engine(weights_of(model.model), settings, len(prompts), max(LENGTHS) + 2 * BLOCK, **options)
        for row, ids in enumerate(prompts):
            engine.prefill(row, ids)
        engine.blocks.lay_out(block.clamp(max=MASK_ID - 1))  # any block without masks
        engine.commit(may_wait=may_wait)
        engine.blocks.lay_out(block)
        engine.denoise(1)
        ends = [slice(len(ids), len(ids) + BLOCK) for ids in prompts]
        memory = torch.stack([engine.cache.keys, engine.cache.values])
        found.append(torch.cat([memory[:, :, row, :, end].flatten() for row, end in enumerate(ends)]))
    fused, single, true = found
    allowed = SLACK * _error(single, true) + torch.finfo(fused.dtype).eps
    return Check(f"{name}: keys and values, fused commit", _error(fused, true), allowed)


def _plain(
    lm: BlockDiffusionLM, prompts: list[list[int]], block: Tensor, rule: Mage, selection: Selection
) -> tuple[Tensor, Tensor, Selection]:
    """Logits of an exact step, of a sparse one under given keys, and the plain decoder's own choice."""
    cache = PrefixCache.for_model(lm.model, len(prompts), max(map(len, prompts)))
    extend(lm.model, cache, prompts, BLOCK)
    hidden, choice = choose_forward(lm.model, cache.prefix(), block, rule)
    sparse = block_forward(lm.model, cache, block, selection=selection)
    head = output_head(lm.model)
    return head(hidden), head(sparse), choice.selection


def _error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def _differing(lm: BlockDiffusionLM, prompts: list[list[int]], budget: int) -> int:
    """Tokens in which graphs and single launches differ, exact and sparse, over rows of different lengths."""
    options: dict[str, Any] = {"max_new_tokens": 70, "stop_ids": (), "budget": budget}
    differing = 0
    for attention in ("exact", "mage"):
        texts = [
            generate(lm, [ids[:-7] for ids in prompts], attention=attention, use_graphs=graphs, **options).tokens
            for graphs in (True, False)
        ]
        differing += sum(a != b for one, other in zip(*texts, strict=True) for a, b in zip(one, other, strict=True))
    return differing
