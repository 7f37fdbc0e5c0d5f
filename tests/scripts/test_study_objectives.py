"""scripts/study_objectives.py on a tiny model: arms are valid recipes, its file resumes, joins and becomes tables."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mage_tune import run as run_module
from mage_tune.recipe import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import study_objectives as script

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """\
name: tiny
model: {path: base}
data:
  length: 256
  sources: [{kind: text, path: train.npy}]
adapter: {rank: 2, alpha: 4}
objective:
  diffusion: {weight: 1.0}
  query_alignment: {weight: 1.0, skip_layers: 1}
train: {steps: 3, learning_rate: 1e-3, warmup_steps: 1}
eval: {text: heldout.npy}
"""


@pytest.fixture
def study(tmp_path, monkeypatch, tiny_backbone, converted_checkpoint):
    """A folder with a tiny model, data and recipe; the study's sizes cut down."""
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1536)
    converted_checkpoint(backbone).rename(tmp_path / "base")
    for name, times in (("train", 300), ("heldout", 200)):
        ids = backbone.tokenizer(f"This is the {name} text. It goes on.\n" * times)["input_ids"]
        np.save(f"{name}.npy", np.asarray(ids, dtype=np.uint16))
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes, and more words."}]
    Path("chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3)
    Path("recipe.yaml").write_text(RECIPE)
    sizes = {
        "RECIPE": Path("recipe.yaml"),
        "CHAT": Path("chat.jsonl"),
        "LAYER_BUDGETS": Path("layer_budgets"),
        "STEPS": 2,
        "BUDGETS": (8, 16),
        "MAIN": 768,
        "CONTEXTS": {768: 2, 1024: 1},
        "KEYS": 16,
        "TASK_BUDGETS": (8,),
        "NEEDLES": 6,
        "PROMPTS": 2,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(script, name, value)
    arms = [arm for arm in script.ARMS if arm.name in ("diffusion", "query", "recipe")]
    monkeypatch.setattr(script, "ARMS", tuple(replace(arm, seeds=(0,)) for arm in arms))
    monkeypatch.setattr(script, "LEVERS", (script.LEVERS[0], script.LEVERS[1], script.LEVERS[-1]))
    return tmp_path


@pytest.mark.parametrize("arm", script.ARMS, ids=[arm.name for arm in script.ARMS])
def test_every_arm_is_a_valid_recipe_of_equal_tokens(arm):
    plain = load_recipe(ROOT / script.RECIPE)
    recipe = load_recipe(ROOT / script.RECIPE, arm.overrides(3))
    assert recipe.seed == 3
    assert recipe.train.rows * recipe.train.accumulation == plain.train.rows * plain.train.accumulation
    assert recipe.train.steps == (plain.train.steps if arm.full else script.STEPS)
    assert recipe.data == plain.data


def test_arms_differ():
    changes = [arm.changes | ({"budgets": arm.name} if arm.name == script.BUDGETED else {}) for arm in script.ARMS]
    assert len({json.dumps(changed, sort_keys=True) for changed in changes}) == len(script.ARMS)
    assert len({arm.name for arm in script.ARMS}) == len(script.ARMS)


@pytest.mark.slow
def test_a_study_is_run_resumed_joined_and_shown(study, capsys, monkeypatch):
    assert script.main(["--only", "diffusion", "--out", "a.json"]) == 0
    first = json.loads(Path("a.json").read_text())
    assert [arm["name"] for arm in first["arms"]] == ["diffusion"]
    base, (arm,) = first["base"], first["arms"]
    assert set(arm["ce_mask"]) == {"8", "16"} and set(arm["gap"]) == {"768", "1024"}
    assert arm["gap"]["768"]["16"]["mean"] == pytest.approx(arm["ce_mask"]["16"] - base["ce_exact"], abs=2e-4)
    assert arm["against_base"]["768 ce exact"]["mean"] == pytest.approx(arm["ce_exact"] - base["ce_exact"], abs=2e-4)
    assert len(arm["units"]["768 ce exact"]) == 2 and len(arm["units"]["answers"]) == 3
    assert first["best"] in ("diffusion", None)  # None: it harmed exact attention
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("a finished arm was trained again"))
    assert script.main(["--only", "diffusion", "--out", "a.json"]) == 0
    assert json.loads(Path("a.json").read_text())["arms"] == first["arms"]
    monkeypatch.undo()


@pytest.fixture
def in_this_process(monkeypatch):
    """Arms are trained here; the process that another test starts for them imports torch for longer than it trains."""

    def run(command, stdout, stderr, check):
        assert command[1:4] == ["-m", "mage_tune.cli", "train"]
        run_module.train(load_recipe(command[4], command[6::2]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.mark.slow
def test_files_of_two_machines_become_one(study, in_this_process, capsys):
    for shard, out, commit in (("0/2", "a.json", "abc"), ("1/2", "b.json", "def")):
        command = ["--only", "query", "recipe", "--shard", shard, "--out", out, "--commit", commit]
        assert script.main(command) == 0
    assert script.main(["--join", "a.json", "b.json", "--out", "all.json"]) == 0
    joined = json.loads(Path("all.json").read_text())
    assert [(arm["name"], arm["commit"]) for arm in joined["arms"]] == [("query", "abc"), ("recipe", "def")]
    assert joined["base"]["commit"] == "abc"
    assert joined["arms"][1]["minutes"] >= 0 and joined["best"] != "recipe"
    assert script.main(["--best-lever", "--out", "all.json"]) == 2
    assert "run --levers first" in capsys.readouterr().err
    assert script.main(["--levers", "base", "--lever", "mage", "--out", "all.json"]) == 0
    assert set(json.loads(Path("all.json").read_text())["base"]["levers"]) == {"mage", "oracle"}
    assert script.main(["--levers", "--out", "all.json"]) == 0
    assert script.main(["--best-lever", "--out", "all.json"]) == 0
    joined = json.loads(Path("all.json").read_text())
    base, tuned = joined["base"], joined["arms"][1]
    assert set(base["levers"]) == {
        "mage", "draft refresh", "oracle",
        *(f"{rule}, {n} dense layers" for rule in ("mage", "oracle") for n in (0, 1)),
    }  # fmt: skip
    for measured in (base, tuned):
        assert measured["levers"]["mage"]["gap"]["mean"] == pytest.approx(
            measured["gap"]["768"]["16"]["mean"], abs=1e-5
        )
        assert measured["levers"]["oracle"]["recall"]["mean"] == 1.0
    assert joined["best_with_levers"]["levers"] == ["mage"]  # the only one here that adds no exact step
    script.LAYER_BUDGETS.mkdir()
    found = {"budget": 16, "dense_layers": 2, "budgets": {"2": 24}}
    (script.LAYER_BUDGETS / "query.json").write_text(json.dumps(found))
    assert script.main(["--levers", "query", "--out", "all.json"]) == 0
    assert set(json.loads(Path("all.json").read_text())["arms"][0]["levers"]) == {"mage", script.MEASURED, "oracle"}
    assert script.main(["--join", "all.json", "--out", "a.json"]) == 0
    assert script.MEASURED in json.loads(Path("a.json").read_text())["arms"][0]["levers"]
    assert joined["best_with_levers"]["ce_mask"] == tuned["ce_mask"]
    assert script.main(["--table", "--out", "all.json"]) == 0
    table = capsys.readouterr().out
    assert "| base | 1 |" in table and "| recipe | 1 |" in table and "| draft refresh |" in table
    other = json.loads(Path("b.json").read_text())
    other["base"]["ce_exact"] += 1
    Path("b.json").write_text(json.dumps(other))
    assert script.main(["--join", "a.json", "b.json", "--out", "other.json"]) == 2
    assert "another base" in capsys.readouterr().err


def test_the_arm_of_measured_budgets_needs_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "LAYER_BUDGETS", tmp_path / "none")
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"base": {"units": {}}}))
    assert script.main(["--only", script.BUDGETED, "--out", str(out)]) == 2
    assert "mage-tune budgets" in capsys.readouterr().err


def test_levers_without_a_tuned_model_are_one_line(tmp_path, capsys):
    assert script.main(["--levers", "--out", str(tmp_path / "none.json")]) == 2
    assert "levers need the arm 'recipe'" in capsys.readouterr().err


def test_levers_that_add_an_exact_step_do_not_compete():
    names = {lever.label for lever in script.LEVERS if script.adds_no_exact_step(lever)}
    assert {"mage", "residual", "follow 4", "layer budgets"} <= names
    assert not any("refresh" in name or "re-selected" in name or "oracle" in name for name in names)


def test_an_unknown_arm_is_one_line(capsys):
    assert script.main(["--only", "magic"]) == 2
    assert "no arm 'magic'" in capsys.readouterr().err


def test_the_winner_must_not_harm_exact_attention():
    def arm(name: str, gap: float, harm: float) -> dict:
        against = {f"{script.MAIN} ce exact": {"mean": harm}}
        return {"name": name, "seed": 0, "gap": {str(script.MAIN): {str(script.KEYS): {"mean": gap}}}} | {
            "against_base": against
        }

    assert script.gap_of([arm("a", 0.1, 0.02)]) is None
    assert script.gap_of([arm("a", 0.1, 0.005), arm("a", 0.3, -0.2)]) == pytest.approx(0.2)
    assert script.gap_of([]) is None


def test_plots_show_the_gap_and_the_arms(tmp_path):
    assert script.main(["--plot", str(tmp_path / "gap.png"), "--out", str(ROOT / "results/objectives.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gap-arms-dark.png", "gap-arms.png", "gap-dark.png", "gap.png"
    ]  # fmt: skip
