"""scripts/layer_budgets.py on a tiny model: it finds the least of all allocations, and measures what the study does."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mage_tune import load
from mage_tune.decode.rules import Mage
from mage_tune.recipe import Eval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import layer_budgets as script
from compare_rules import Arm, probe_window


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    levels, layers = (4, 8, 16, 24, 40), (2, 3, 4, 5)
    change = {level: {layer: float(rng.normal()) for layer in layers} for level in levels}
    every = [keys for keys in itertools.product(levels, repeat=len(layers)) if sum(keys) <= 16 * len(layers)]
    cost = {keys: sum(change[k][layer] for k, layer in zip(keys, layers, strict=True)) for keys in every}
    found = script.allocate(change, 16)
    assert list(found) == list(layers)
    assert cost[tuple(found.values())] == pytest.approx(min(cost.values()))


def test_a_budget_without_quarters_is_one_line(tmp_path, capsys):
    assert script.main(["model", "text", "--budget", "10", "--out", str(tmp_path / "out.json")]) == 2
    assert "no multiple of 4" in capsys.readouterr().err


@pytest.mark.slow
def test_budgets_are_measured_chosen_and_kept(tmp_path, monkeypatch, capsys, tiny_backbone, converted_checkpoint):
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=8, vocab_size=272, num_layers=4)
    converted_checkpoint(backbone).rename(tmp_path / "base")
    ids = backbone.tokenizer("This is the training text. It goes on and on.\n" * 100)["input_ids"]
    np.save("train.npy", np.asarray(ids, dtype=np.uint16))
    options = ["--budget", "8", "--dense-layers", "1", "--context", "256", "--windows", "2", "--blocks", "2"]
    for name in ("a", "b"):
        assert script.main(["base", "train.npy", "--name", name, "--out", "out.json", *options]) == 0
    content = json.loads(Path("out.json").read_text())
    found = content["a"]
    assert content["b"]["budgets"] == found["budgets"] and set(found["budgets"]) == {"1", "2", "3"}
    assert sum(found["budgets"].values()) <= 3 * 8
    assert found["ce"] == min(found["ce_rounds"]) <= found["ce_equal"]
    assert "| a |" in capsys.readouterr().out

    lm, tokens = load("base"), np.asarray(ids)
    windows = script.cut_windows(tokens, 256, 2)
    rule, equal = Mage(budget=8, dense_layers=1), dict.fromkeys((1, 2, 3), 8)
    probes = [script.Probe.of(script.open_window(lm, window, n, 2), rule) for n, window in enumerate(windows)]
    swept = script.sweep(probes, equal, [24])[24]
    for layer, change in swept.items():  # one layer at a time, chosen by the rule itself
        apart = [np.diff(probe.losses([probe.choose(equal), probe.choose(equal | {layer: 24})])) for probe in probes]
        assert change == pytest.approx(np.mean(apart), abs=1e-6)
    given = Eval(text="train.npy", context=256, documents=2, blocks=2, budgets=[8], dense_layers=1)
    pairs = tuple((int(layer), keys) for layer, keys in found["budgets"].items())
    arms = [Arm("mage", "mage", options=(("layer_budgets", pairs),)), Arm("oracle", "oracle")]
    probed = [probe_window(lm, window, n, given, arms)["mage", 8].ce for n, window in enumerate(windows)]
    assert found["ce"] == pytest.approx(np.mean(probed), abs=1e-5)
    assert Mage(budget=8, dense_layers=1, layer_budgets=found["budgets"]).layer_budgets == pairs
