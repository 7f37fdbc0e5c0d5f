"""scripts/study_further.py and bench_further.py: rules that go further than MAGE, the fused commit, their file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mage_tune.decode.attention import LayerView, block_forward, extend, observe_forward
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.rules import Mage
from mage_tune.evals.run import SEED
from mage_tune.evals.windows import open_window
from mage_tune.lm import from_backbone
from mage_tune.recipe import Eval, override_section

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import compare_rules
import study_further as script

ROOT = Path(__file__).resolve().parents[2]
SIZE, BLOCKS, LAYERS = 8, 12, 4


@pytest.fixture(scope="module")
def lm(tiny_backbone):
    """In float64, two ways of computing the same thing do not fall on different sides of a tie."""
    made = from_backbone(tiny_backbone(block_size=SIZE, num_layers=LAYERS))
    made.model.double()
    return made


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(4, 60, BLOCKS * SIZE).astype(np.uint16)


@pytest.fixture
def cache(lm, tokens):
    """The window but for its last two blocks, with room for them."""
    made = PrefixCache.for_model(lm.model, 1, len(tokens))
    extend(lm.model, made, [tokens[: -2 * SIZE].tolist()], SIZE)
    return made


def masks(lm, rows=1):
    return torch.full((rows, SIZE), lm.family.mask_id)


# The fused commit


@pytest.mark.parametrize("family", ["converted", "fast_dllm_v2", "sdar"])
def test_a_fused_commit_is_commit_and_first_step(family, tiny_backbone, tokens):
    lm = from_backbone(tiny_backbone(family, block_size=SIZE))
    lm.model.double()
    far = script.compare_fused(lm.model, tokens.tolist(), masks(lm), Mage(budget=20, dense_layers=0))
    assert far.pop("keys_chosen_alike") == 1.0
    assert max(far.values()) < 1e-12


@torch.no_grad()
def test_the_finished_block_sees_nothing_of_the_next_which_sees_all_of_it(lm, tokens):
    def fused(finished, start):
        cache = PrefixCache.for_model(lm.model, 1, len(tokens))
        extend(lm.model, cache, [tokens[: -2 * SIZE].tolist()], SIZE)
        ids = (torch.from_numpy(x.astype(np.int64))[None] for x in (finished, start))
        hidden, _ = script.fused_commit(lm.model, cache, *ids, Mage(budget=20, dense_layers=0))
        assert cache.ids[0] == [*tokens[: -2 * SIZE].tolist(), *finished.tolist()]
        return hidden, cache.keys[:, 0, :, : len(cache.ids[0])].clone()

    finished, start = tokens[-2 * SIZE : -SIZE], tokens[-SIZE:]
    hidden, keys = fused(finished, start)
    changed, same_keys = fused(finished, start[::-1].copy())
    torch.testing.assert_close(changed[:, :SIZE], hidden[:, :SIZE], rtol=0, atol=1e-12)
    torch.testing.assert_close(same_keys, keys, rtol=0, atol=1e-12)
    other = finished.copy()
    other[-1] = 4 + (other[-1] - 3) % 50
    moved, _ = fused(other, start)
    assert (moved[:, SIZE:] - hidden[:, SIZE:]).abs().amax(-1).min() > 1e-6


# Rules


@pytest.mark.parametrize("options", [{}, {"scaled": "channel"}, {"scaled": "head"}, {"mean_query": True}])
def test_a_budget_that_holds_the_prefix_is_exact(options, lm, cache):
    prefix = cache.prefix()
    exact = block_forward(lm.model, prefix, masks(lm))
    for budget, is_same in ((prefix.longest, True), (prefix.longest // 4, False)):
        rule = script.KeysOnly(budget=budget, dense_layers=0, **options)
        hidden = block_forward(lm.model, prefix, masks(lm), rule=rule)
        assert torch.allclose(hidden, exact, rtol=0, atol=1e-12) == is_same
    rule = script.Shadowed(budget=prefix.longest, dense_layers=0, scaled=options.get("scaled"))
    _, observed = observe_forward(lm.model, prefix, masks(lm), rule.observe)
    selection = rule.choose(observed, prefix.lengths)
    hidden = block_forward(lm.model, prefix, masks(lm), selection=selection)
    torch.testing.assert_close(hidden, exact, rtol=0, atol=1e-12)


def test_a_sparse_first_step_reads_only_the_values_it_chose(lm, tokens):
    """And its first sparse layer, whose queries are still exact, chooses as mage does."""
    window, budget = open_window(lm, tokens, 0, 2, SEED), 12
    for dense in (0, 2):
        keys_only = script.KeysOnly(budget=budget, dense_layers=dense)
        (sparse,), (first,) = script.choose_while_sparse(window, [keys_only])
        (mage,), (exact,) = script.choose_from_exact(window, [Mage(budget=budget, dense_layers=dense)])
        same = [torch.equal(a, b) for a, b in zip(sparse.index, mage.index, strict=True)]
        assert len(same) == LAYERS - dense and same[0] and not all(same)
        assert first != exact
    before = block_forward(lm.model, window.prefix(), window.start, rule=keys_only)
    seen = sparse.as_mask(window.cache.values.shape[3])[:, 0]  # of the first block
    values = window.cache.values[2:, 0]
    values[~seen] = 1e9
    after = block_forward(lm.model, window.prefix(), window.start, rule=keys_only)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    values[seen] = 1e9
    assert not torch.equal(block_forward(lm.model, window.prefix(), window.start, rule=keys_only)[0], before[0])


def test_eight_bits_keep_three_bits_of_every_channel():
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 3, 40, 16, generator=generator)
    key[..., 0] *= 1e6  # beside it the other channels of the head are less than the smallest number
    visible = torch.ones(2, 40, dtype=torch.bool)
    visible[1, 30:] = False
    view = LayerView(0, torch.zeros(2, 3, 4, 16), key, visible, (40, 30), 1.0)
    by_channel, by_head = (script.seen_in_fp8(view, scaled).key for scaled in ("channel", "head"))

    def error(copy):
        return ((copy - key).abs() / key.abs().clamp_min(0.1))[0].amax()

    assert 0.01 < error(by_channel) <= 2**-4 + 1e-3
    assert error(by_head) == 1.0
    elsewhere = key.clone()
    elsewhere[1, :, 30:] = 1e6  # beyond a row's prefix: another document, or nothing yet
    again = script.seen_in_fp8(replace(view, key=elsewhere), "channel").key
    assert torch.equal(again[1, :, :30], by_channel[1, :, :30])


def test_scores_from_eight_bits_differ_only_a_little(lm, tokens):
    window, budget = open_window(lm, tokens, 0, 2, SEED), 24
    rules = [Mage(budget=budget, dense_layers=0)]
    rules += [script.Shadowed(budget=budget, dense_layers=0, scaled=scaled) for scaled in ("channel", "head")]
    (mage, *copies), _ = script.choose_from_exact(window, rules)
    for copy in copies:
        assert 0.8 < float(copy.recall(mage).mean()) < 1.0


# The script


def test_its_mage_is_that_of_the_other_comparison(lm, tokens):
    arms = script.arms_of([12], [24])
    exact, _, found = script.probe_window(open_window(lm, tokens, 3, 2, SEED), arms)
    settings = Eval(context=BLOCKS * SIZE, blocks=2, budgets=[12, 24])
    compared = (compare_rules.MAGE, compare_rules.Arm("oracle", "oracle"))
    for dense in (0, 2):
        other = compare_rules.probe_window(
            lm, tokens, 3, override_section(settings, [f"dense_layers={dense}"]), compared
        )
        assert exact == pytest.approx(other["exact", None].ce, abs=1e-9)
        for k in (12, 24):
            assert found["mage", dense, k].ce == pytest.approx(other["mage", k].ce, abs=1e-9)
            assert found["mage", dense, k].recall == 1.0
    assert len({round(one.ce, 9) for key, one in found.items() if key[2] == 12}) == len(arms)


def test_the_file_holds_every_row(tmp_path, monkeypatch, tiny_backbone, converted_checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=SIZE, vocab_size=272, max_positions=1024)
    base = converted_checkpoint(backbone).rename(tmp_path / "base")
    backbone.tokenizer.save_pretrained(base)
    ids = backbone.tokenizer("This is the held-out text. It goes on.\n" * 20)["input_ids"]
    np.save("heldout.npy", np.asarray(ids, dtype=np.uint16))
    given = ["base", "heldout.npy", "results/further.json", "--device", "cpu", "--context", "96", "--blocks", "2"]
    given += ["--windows", "3", "--budgets", "8", "--large", "16", "--commit", "abc"]
    assert script.main(given) == 0
    result = json.loads(Path("results/further.json").read_text())
    assert sorted(result["settings"]["windows"]) == [0, 1, 2] and result["environment"]["commit"] == "abc"
    assert result["fused_commit"]["keys_chosen_alike"] > 0.99 and result["fused_commit"]["hidden"] < 1e-4
    exact, *rows = result["rows"]
    assert exact["ce"]["n"] == exact["first_ce"]["n"] == 3
    assert len(rows) == 2 * 2 + 8
    for row in rows:
        assert row["options"]["budget"] == row["budget"] and row["options"]["dense_layers"] == row["dense_layers"]
        assert row["ce_gap"]["n"] == row["recall"]["n"] == 3
        assert (row["first_ce_gap"] is None) == (not row["label"].startswith("keys-only"))
        assert ("against_mage" in row) == (row["label"] != "mage")
    assert set(rows[2]["against_dense"]) == {"8", "16"} and rows[0]["against_dense"] is None
    assert capsys.readouterr().out.count("keys-only, mean query") == 2
    speed = {"shape": "7B", "batch": 1, "layer_ms": {"exact": 0.1}, "saved_ms_per_block": {"keys-only": -0.5}}
    decoded = {"model": "7B", "batch": 1, "context": 131072, "rule": "mage", "dense_layers": 0, "budget": 512}
    decoded |= {"steps": 32, "graph": True, "block_ms": 200.0}
    failed = {"shape": "7B", "batch": 8, "failed": "AssertionError: far"}
    Path("results/further.json").write_text(json.dumps(result | {"speed": {"rows": [speed, failed]}}))
    Path("results/decode_h100.json").write_text(json.dumps({"rows": [decoded]}))
    assert script.main(["--table", "results/further.json"]) == 0
    tables = capsys.readouterr().out
    assert tables.count("\n| keys-only |") == 3 and "| -0.50 (-0.2%) |" in tables and "| exact | 0.1000 |" in tables
    assert "| 0 dense layers, k | minus 2 dense, k = 8 | minus 2 dense, k = 16 |" in tables
    assert script.main([*given, "--context", "4096"]) == 2
    assert "error: " in capsys.readouterr().err


KERNEL = """
import torch
from bench_further import FP8, TILE, tile_log_masses

generator = torch.Generator().manual_seed(0)
query, key = (torch.randn(2, 2, n, 16, generator=generator).half() for n in (72, 300))
lengths = torch.tensor([300, 130], dtype=torch.int32)
for kind in (torch.float16, FP8):
    copy = key.to(kind)
    found = tile_log_masses(query, copy, lengths, 0.25)
    logits = query.float() @ copy.float().transpose(-1, -2) * 0.25
    hidden = torch.arange(300) >= lengths[:, None, None, None]
    expected = torch.stack([t.logsumexp(-1) for t in logits.masked_fill(hidden, -torch.inf).split(TILE, -1)], 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected[1, :, 2].eq(-torch.inf).all() and found.isnan().sum() == 0
print("same")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark checks itself on a GPU")
def test_masses_from_keys_alone():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", "-c", KERNEL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "same"
