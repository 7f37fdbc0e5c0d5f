"""mage-tune budgets on a tiny model: it finds the least of all allocations, and decoding takes what it wrote."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mage_tune import load
from mage_tune.cli import main
from mage_tune.decode.layer_budgets import read_layer_budgets
from mage_tune.decode.rules import Mage
from mage_tune.evals import layer_budgets as verb
from mage_tune.evals.run import SEED, cut_windows
from mage_tune.evals.windows import open_window
from mage_tune.recipe import Eval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from compare_rules import Arm, probe_window

SIZES = ["--budget", "8", "--dense-layers", "1", "--context", "256", "--windows", "2", "--blocks", "2"]


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    levels, layers = (4, 8, 16, 24, 40), (2, 3, 4, 5)
    change = {level: {layer: float(rng.normal()) for layer in layers} for level in levels}
    every = [keys for keys in itertools.product(levels, repeat=len(layers)) if sum(keys) <= 16 * len(layers)]
    cost = {keys: sum(change[k][layer] for k, layer in zip(keys, layers, strict=True)) for keys in every}
    found = verb.allocate(change, 16)
    assert list(found) == list(layers)
    assert cost[tuple(found.values())] == pytest.approx(min(cost.values()))


@pytest.fixture
def run_cli(capsys):
    """The command in this process: what `subprocess.run` would give."""

    def run_here(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=caught.value.code or 0, stdout=out, stderr=err)

    return run_here


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_backbone, converted_checkpoint):
    """A folder with a tiny model of four layers and text."""
    folder = tmp_path_factory.mktemp("budgets")
    backbone = tiny_backbone(block_size=8, vocab_size=272, num_layers=4)
    converted_checkpoint(backbone).rename(folder / "base")
    ids = backbone.tokenizer("This is the training text. It goes on and on.\n" * 100)["input_ids"]
    np.save(folder / "train.npy", np.asarray(ids, dtype=np.uint16))
    return folder


@pytest.fixture(scope="module")
def measured(base):
    """What the verb measured and wrote."""
    settings = verb.Settings(budget=8, dense_layers=1, context=256, windows=2, blocks=2)
    return verb.run(str(base / "base"), settings, text=str(base / "train.npy"), out=base / "measured.json")


def test_budgets_are_measured_chosen_and_kept(base, measured):
    found = json.loads(measured.read_text())
    assert set(found["budgets"]) == {"1", "2", "3"}
    assert sum(found["budgets"].values()) <= 3 * 8
    assert found["ce"] == min(found["ce_rounds"]) <= found["ce_equal"]
    assert found["environment"]["torch"] and found["text"].endswith("train.npy")

    lm, tokens = load(str(base / "base")), np.load(base / "train.npy")
    windows = cut_windows(tokens, 256, 2)
    rule, equal = Mage(budget=8, dense_layers=1), dict.fromkeys((1, 2, 3), 8)
    probes = [verb.Probe.of(open_window(lm, window, n, 2, SEED), rule) for n, window in enumerate(windows)]
    swept = verb.sweep(probes, equal, [24])[24]
    for layer, change in swept.items():  # one layer at a time, chosen by the rule itself
        apart = [np.diff(probe.losses([probe.choose(equal), probe.choose(equal | {layer: 24})])) for probe in probes]
        assert change == pytest.approx(np.mean(apart), abs=1e-6)
    given = Eval(text="train.npy", context=256, documents=2, blocks=2, budgets=[8], dense_layers=1)
    pairs = tuple((int(layer), keys) for layer, keys in found["budgets"].items())
    arms = [Arm("mage", "mage", options=(("layer_budgets", pairs),)), Arm("oracle", "oracle")]
    probed = [probe_window(lm, window, n, given, arms)["mage", 8].ce for n, window in enumerate(windows)]
    assert found["ce"] == pytest.approx(np.mean(probed), abs=1e-5)


def test_a_file_stands_for_the_rules_options(base, measured):
    lm, budgets = load(str(base / "base")), read_layer_budgets(measured).budgets
    asked = dict(prompt="This is the training text. It goes on", max_new_tokens=24, steps=8, attention="mage")
    by_file = lm.generate(**asked, layer_budgets=measured)
    by_hand = lm.generate(**asked, budget=8, dense_layers=1, rule_options={"layer_budgets": budgets})
    assert by_file.tokens == by_hand.tokens and by_file.settings == by_hand.settings
    twice = lm.generate(**asked, budget=16, layer_budgets=str(measured)).settings
    doubled = lm.generate(**asked, budget=16, dense_layers=1, layer_budgets={n: 2 * k for n, k in budgets.items()})
    assert twice == doubled.settings != by_file.settings
    fast = lm.generate(**asked, layer_budgets=measured, fast=True, acceptance="threshold")
    assert fast.tokens == by_file.tokens


def test_shares_are_rounded_and_never_nothing(tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"budget": 128, "dense_layers": 2, "budgets": {"2": 32, "3": 640}}))
    assert read_layer_budgets(path).scaled(512) == {2: 128, 3: 2560}
    assert read_layer_budgets(path).scaled(1) == {2: 1, 3: 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"budget": 8, "dense_layers": 1}', "budgets: field required"),
        ('{"budget": 8, "dense_layers": 1, "budgets": {"a": 8}}', "budgets.a"),
        ('{"budget": 8, "dense_layers": 1, "budgets": {"1": 0}}', "budgets.1"),
        ('{"budget": 8, "dense_layers": 1, "budgets": {"1": 8, "9": 8}}', "no layer 9"),
        ('{"budget": 8, "dense_layers": 2, "budgets": {"1": 8}}', "layer 1 is one of the 2 dense ones"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(base, tmp_path, run_cli, content, message):
    path = tmp_path / "b.json"
    path.write_text(content)
    told = ["--attention", "mage", "--layer-budgets", str(path), "--max-new-tokens", "8"]
    done = run_cli("generate", str(base / "base"), "This is the training text", *told)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(attention="exact"), "go with attention 'mage', not 'exact'"),
        (dict(attention="mage", dense_layers=0), "measured with 1 dense layers, not 0"),
    ],
)
def test_what_does_not_go_with_a_file_is_refused(base, measured, asked, message):
    with pytest.raises(ValueError, match=message):
        load(str(base / "base")).generate("This is", layer_budgets=measured, **asked)


def test_the_verb_on_a_run_folder(base, tmp_path, run_cli):
    run = tmp_path / "run"
    recipe = "name: r\nmodel: {path: BASE}\ndata: {length: 256, sources: [{kind: text, path: TEXT}]}\n"
    recipe += "train: {steps: 1, rows: 1}\nadapter: {rank: 2, alpha: 4}\neval: {text: TEXT}\n"
    (tmp_path / "r.yaml").write_text(
        recipe.replace("BASE", str(base / "base")).replace("TEXT", str(base / "train.npy"))
    )
    assert run_cli("train", str(tmp_path / "r.yaml"), "--set", f"output={json.dumps(str(run))}").returncode == 0
    done = run_cli("budgets", str(run), *SIZES)
    assert done.returncode == 0 and "--layer-budgets" in done.stdout and "spent where they count" in done.stdout
    assert read_layer_budgets(run / "layer_budgets.json").budget == 8
    again = run_cli("budgets", str(run), *SIZES)
    assert again.returncode == 2 and "--force measures again" in again.stderr


def test_an_evaluation_takes_a_file(base, measured, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = "dense_layers: 1\nrules:\n  - {rule: mage, budgets: [8]}\n"
    suite += f"  - {{rule: mage, budgets: [8], options: {{layer_budgets: {measured}}}}}\n"
    suite += "tasks:\n  - {kind: rules, context: 256, documents: 2, blocks: 2}\n"
    Path("s.yaml").write_text(suite + f"text: {base / 'train.npy'}\n")
    assert run_cli("eval", str(base / "base"), "--suite", "s.yaml").returncode == 0
    (results,) = tmp_path.glob("runs/**/results.json")
    found = json.loads(results.read_text())["arms"]["base"]
    equal, uneven = (found[f"rules.ce@mage 8{more}"]["mean"] for more in ("", " layer_budgets=measured.json"))
    assert uneven < equal  # on the windows it was measured on
    Path("s.yaml").write_text(suite.replace("dense_layers: 1", "dense_layers: 0") + f"text: {base / 'train.npy'}\n")
    done = run_cli("eval", str(base / "base"), "--suite", "s.yaml")
    assert done.returncode == 2 and "'rules[1]'" in done.stderr and "1 dense layers, not 0" in done.stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--text", "t.npy"], "say where the file goes"),
        (["--out", "b.json"], "name training text"),
        (["--budget", "10"], "no multiple of 4"),
    ],
)
def test_what_the_verb_misses_is_one_line(base, run_cli, asked, message):
    done = run_cli("budgets", str(base / "base"), *asked)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
