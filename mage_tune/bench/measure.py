"""Time one case: each kind of step alone, and whole blocks from all-[MASK] to committed.

The cache holds random keys and values in place of a prompt's, which costs the same and saves the prefill.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from mage_tune.bench.cases import RULES, Case
from mage_tune.bench.clock import elapsed_ms, median_ms
from mage_tune.bench.floor import Ceilings, Roofline
from mage_tune.decode.engine.cache import Cache
from mage_tune.decode.engine.engine import Engine, Step
from mage_tune.decode.engine.weights import Weights
from mage_tune.families import Family

GIB = 2**30


def make_engine(case: Case, weights: Weights, family: Family, cache: Cache) -> Engine:
    """The engine of a case, its prefixes filled.

    Raises:
        ValueError: the case cannot run here.
    """
    engine = Engine(
        weights,
        case.settings(family),
        case.batch,
        cache.capacity,
        exact_kernel=case.exact_kernel,
        quest_form=RULES[case.rule].quest_form,
        use_graphs=case.is_graph and weights.device.type == "cuda",
        cache=cache,
    )
    assert engine.fuses_commits or not case.fuses
    cache.set_lengths([case.context] * case.batch)
    if engine.quest is not None:
        engine.quest.update(cache.capacity)
    return engine


def measure(case: Case, engine: Engine, ceilings: Ceilings, *, repeats: int = 5, blocks: int = 3) -> dict[str, Any]:
    """Medians of a case.

    Returns:
        A row of the result: the case, its times in ms, the floors beside them, peak memory.
    """
    device = engine.weights.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = _steps_ms(case, engine, repeats)
    counts = {"exact": 0, "sparse": 0}
    times = []
    for _ in range(blocks):
        _lay_out(case, engine)
        _finish_one(case, engine)
        times.append(elapsed_ms(lambda: counts.update(_block(case, engine)), device))
    roofline = Roofline(engine.weights.shape, ceilings, case.batch, case.context, engine.block_size)
    exact_floor = roofline.exact_ms()
    sparse_floor = roofline.step_ms(case.sparse_load(engine)) if counts["sparse"] else 0.0
    return {
        "model": case.model,
        "context": case.context,
        "batch": case.batch,
        "steps": counts["exact"] + counts["sparse"],
        "rule": case.rule,
        "exact_kernel": case.exact_kernel,
        "dense_layers": case.dense_layers,
        "budget": case.budget if case.rule != "exact" else None,
        "graph": engine.graphs.is_used,
        "block_ms": statistics.median(times),
        "exact_ms": steps.get("score", steps["exact"]),
        "sparse_ms": steps.get("sparse"),
        "commit_ms": steps["commit"],
        "select_ms": steps.get("select"),
        "floor_ms": (counts["exact"] + (not case.fuses)) * exact_floor + counts["sparse"] * sparse_floor,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None,
        "fused": case.fuses,
        "fused_ms": steps.get("commit+score") if case.fuses else None,
        "acceptance": engine.settings.acceptance.name,
        "exact_steps": counts["exact"],
        "plain_exact_ms": steps["exact"],
        "exact_floor_ms": exact_floor,
        "sparse_floor_ms": sparse_floor if counts["sparse"] else None,
        "block_ms_all": times,
    }


def _steps_ms(case: Case, engine: Engine, repeats: int) -> dict[str, float]:
    """Each kind of step alone."""
    kinds: list[Step] = ["exact", "score", "select", "sparse", "commit"]
    if engine.chooser is None:
        kinds = ["exact", "sparse", "commit"]
    if not any(map(engine.rule.is_sparse, engine.cache.held)):
        kinds = ["exact", "commit"]
    if case.fuses:
        kinds.append("commit+score" if "score" in kinds else "commit+exact")
    _lay_out(case, engine)
    engine.plan()
    engine.set_active([False] * case.batch)  # commits are done, and move nothing on
    device = engine.weights.device
    times: dict[str, float] = {kind: median_ms(partial(engine.run, kind), device, repeats=repeats) for kind in kinds}
    engine.set_active([True] * case.batch)
    return times


def _lay_out(case: Case, engine: Engine) -> None:
    """All-[MASK] blocks after the prefix."""
    engine.cache.set_lengths([case.context] * case.batch)
    engine.blocks.ids.fill_(engine.blocks.mask_id)
    if engine.settings.family.seed_token:
        engine.blocks.ids[:, 0] = 0
    engine.blocks.lay_out(engine.blocks.ids.clone())


def _finish_one(case: Case, engine: Engine) -> None:
    """Where commits are fused: the block before, finished at the end of the prefix and not committed yet."""
    if case.fuses:
        engine.cache.set_lengths([case.context - engine.block_size] * case.batch)
        engine.commit(may_wait=True)


def _block(case: Case, engine: Engine) -> dict[str, int]:
    """All steps and a commit; with static acceptance exactly the steps asked for."""
    counts = engine.denoise(case.steps or engine.block_size)
    if not case.fuses:  # else the first step did the commit of the block before
        engine.commit()
    return counts
