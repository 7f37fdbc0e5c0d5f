"""Commits that are part of the next block's first step: where they are, and that they change nothing."""

import pytest
import torch

from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings, generate
from mage_tune.decode.engine.weights import weights_of
from mage_tune.decode.rules import Exact, Mage

LENGTHS = (21, 3, 16, 40)
COMMON = {"max_new_tokens": 34, "stop_ids": ()}
MAGE = {"attention": "mage", "budget": 12, "dense_layers": 1}


@pytest.fixture
def sdar(tiny_lm):
    return tiny_lm("sdar", block_size=8, architecture="qwen3")


@pytest.fixture
def kinds(monkeypatch):
    """What engines run, in order."""
    ran, run = [], Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, kind: (ran.append(kind), run(self, kind))[1])
    return ran


@pytest.mark.parametrize(
    ("options", "first"),
    [
        (MAGE, "commit+score"),
        ({"attention": "exact"}, "commit+exact"),
        (MAGE | {"dense_layers": 0, "sinks": 1, "recent": 3}, "commit+score"),
        ({"attention": "mean-query", "budget": 12, "dense_layers": 1}, "commit+score"),
        ({"attention": "sparse-dllm", "budget": 12, "dense_layers": 0}, "commit+exact"),
        ({"attention": "sparsed", "budget": 16, "dense_layers": 0, "rule_options": {"tile": 16, "skip": 0.3}}, None),
        (MAGE | {"threshold": 0.0}, "commit+score"),
        (MAGE | {"acceptance": "static", "steps": 3, "sub_block": 4}, "commit+score"),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_plain_decoder(sdar, prompts, kinds, options, first):
    """Rows of different lengths; every block but the last of an answer is committed, none by a pass of its own."""
    batch = prompts(LENGTHS)
    expected, got = sdar.generate(batch, **COMMON | options), generate(sdar, batch, **COMMON | options)
    assert got.tokens == expected.tokens
    fused = [kind for kind in kinds if "+" in kind]
    assert "commit" not in kinds and len(fused) == max(row.forwards["commit"] for row in got.rows)
    assert first is None or first in fused


def test_rows_that_end_before_others(sdar, prompts, kinds):
    """A row that has ended moves on no more: its commit was asked for before, or never."""
    batch = prompts(LENGTHS)
    free = sdar.generate(batch, **COMMON | MAGE).tokens
    for stop in (free[0][0], free[1][7], free[2][20], free[3][11]):
        options = COMMON | MAGE | {"stop_ids": (stop,)}
        expected, got = sdar.generate(batch, **options), generate(sdar, batch, **options)
        assert got.tokens == expected.tokens
        assert [row.finish for row in got.rows] == [row.finish for row in expected.rows]
    assert any("+" in kind for kind in kinds)


@pytest.mark.parametrize(("family", "architecture"), [("converted", "llama"), ("fast_dllm_v2", "qwen2")])
def test_a_seed_needs_its_commit_first(tiny_lm, prompts, kinds, family, architecture):
    generate(tiny_lm(family, block_size=8, architecture=architecture), prompts(LENGTHS), **COMMON | MAGE)
    assert "commit" in kinds and not [kind for kind in kinds if "+" in kind]


@pytest.mark.parametrize(
    "options", [{"exact_kernel": "sdpa"}, {"attention": "quest", "rule_options": {"page_size": 4}}]
)
def test_only_exact_first_steps_by_our_kernel(sdar, prompts, kinds, options):
    generate(sdar, prompts((16, 16)), **COMMON | MAGE | options)
    assert "commit" in kinds and not [kind for kind in kinds if "+" in kind]


def engines(lm, prompts, rule, count):
    """Engines with the same prefixes of different lengths and the same finished block."""
    made = []
    for _ in range(count):
        engine = Engine(weights_of(lm.model), engine_settings(lm.family, rule, steps=4, acceptance="static"), 2, 64)
        for row, ids in enumerate(prompts((40, 16))):
            engine.prefill(row, ids)
        engine.blocks.lay_out(torch.full((2, 8), lm.family.mask_id))
        engine.denoise(4)
        made.append(engine)
    return made


def test_the_same_keys_values_and_choice(sdar, prompts):
    apart, fused = engines(sdar, prompts, Mage(budget=12, dense_layers=1), 2)
    for engine in (apart, fused):
        engine.commit(may_wait=engine is fused)
        assert engine.is_deferred == (engine is fused)
        engine.blocks.lay_out(torch.full((2, 8), sdar.family.mask_id))
        engine.denoise(2)
        assert engine.cache.lengths.tolist() == engine.cache.held == [48, 24]
    for name in ("keys", "values"):
        for row, length in enumerate((48, 24)):
            one, other = (getattr(engine.cache, name)[:, row, :, :length] for engine in (apart, fused))
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(apart.chooser.kept.keys, fused.chooser.kept.keys)
    assert torch.equal(apart.blocks.ids, fused.blocks.ids)


@pytest.mark.parametrize("asks", ["look", "set_active", "prefill", "commit"])
def test_whoever_asks_for_the_cache_gets_the_commit(sdar, prompts, asks):
    apart, fused = engines(sdar, prompts, Exact(), 2)
    for engine in (apart, fused):
        engine.commit(may_wait=engine is fused)
        engine.blocks.lay_out(torch.full((2, 8), sdar.family.mask_id))
        if asks == "look":
            engine.plan()
            engine.look("exact")
        elif asks == "commit":
            engine.commit()
        elif asks == "set_active":
            engine.set_active([True, False])
        else:
            engine.prefill(1, prompts((8,))[0])
        assert not engine.is_deferred
    for row, length in enumerate((48, 24)):
        torch.testing.assert_close(*(engine.cache.keys[:, row, :, :length] for engine in (apart, fused)))
