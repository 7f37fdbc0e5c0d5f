"""`evaluate` end to end: a tiny checkpoint with its tokenizer, a tiny adapter, files on disk."""

import json

import numpy as np
import pytest

from mage_tune.backbone import write_family
from mage_tune.evals import run
from mage_tune.evals.run import cut_windows, evaluate
from mage_tune.recipe import RecipeError

SETTINGS = [
    "eval.context=768",
    "eval.documents=2",
    "eval.blocks=2",
    "eval.budgets=[8,32]",
    "eval.dense_layers=1",
    "eval.needles=6",
    "eval.questions=2",
    "eval.needle_budget=8",
]
RECIPE = """\
name: tiny
model: {{path: {base}}}
data:
  length: 64
  sources: [{{kind: text, path: {text}}}]
eval: {{text: {text}}}
"""


@pytest.fixture
def run_folder(tmp_path, monkeypatch, tiny_backbone, tiny_adapter, converted_checkpoint):
    """A finished run: recipe and adapter beside each other, its base checkpoint and held-out text elsewhere."""
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1024)
    base = converted_checkpoint(backbone).rename(tmp_path / "base")
    backbone.tokenizer.save_pretrained(base)
    folder = tmp_path / "runs" / "tiny"
    tiny_adapter(backbone).save_pretrained(folder)
    write_family(folder, backbone.family)
    sentences = [f"This is sentence {i} of the held-out text.\n" for i in range(200)]
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": "".join(sentences)}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, text=tmp_path / "heldout.jsonl"))
    return folder


def test_a_run_is_evaluated_against_its_base(run_folder, tmp_path, capsys):
    result = evaluate(str(run_folder), overrides=SETTINGS)
    out = run_folder / "eval"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "report.html").is_file()
    assert (out / "ce_gap.png").is_file()
    printed = capsys.readouterr().out
    assert "Held-out text (2 windows)" in printed
    assert "too few to tell" in printed
    assert list(result["arms"]) == ["base", "adapter"]
    assert result["arms"]["base"].keys() == result["arms"]["adapter"].keys() == result["paired"].keys()
    for name, change in result["paired"].items():
        difference = result["arms"]["adapter"][name]["mean"] - result["arms"]["base"][name]["mean"]
        assert change["mean"] == pytest.approx(difference, abs=1e-9)
    assert result["paired"]["ce_exact"]["mean"] != 0
    settings = result["settings"]
    assert (settings["text"], settings["model"], settings["adapter"]) == ("heldout.jsonl", "base", "runs/tiny")
    assert str(tmp_path) not in (out / "report.html").read_text() + (out / "results.json").read_text()
    assert result["environment"]["torch"]


def test_the_base_arm_is_the_base_model(run_folder):
    both = evaluate(str(run_folder), overrides=SETTINGS)
    alone = evaluate("base", overrides=[f"eval.text={run_folder.parent.parent / 'heldout.jsonl'}", *SETTINGS])
    assert list(alone["arms"]) == ["base"]
    assert alone["paired"] == {}
    assert alone["arms"]["base"].keys() == both["arms"]["base"].keys()
    for name, estimate in alone["arms"]["base"].items():
        assert estimate["mean"] == pytest.approx(both["arms"]["base"][name]["mean"], abs=1e-5)
    assert (run_folder.parent / "eval-base" / "eval" / "report.html").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.context=770", "eval.context 770 is not two or more whole blocks of 8"),
        ("eval.context=2048", "longer than the model's 1024 positions"),
        ("eval.dense_layers=3", "the model has 3 layers; nothing would be sparse"),
        ("eval.budgets=[8,384]", r"384 keys are at least the shortest probed prefix \(384\)"),
        ("eval.needles=3", "eval.needles: give 0 or at least 6"),
        ("eval.documents=500", "enough for .* windows of 768; 500 were asked for"),
    ],
)
def test_settings_that_cannot_work_stop_before_anything_is_measured(run_folder, monkeypatch, override, message):
    monkeypatch.setattr(run, "run_units", None)
    with pytest.raises(RecipeError, match=message):
        evaluate(str(run_folder), overrides=[*SETTINGS, override])
    assert not (run_folder / "eval").exists()


def test_a_model_without_tokenizer_is_told_to_skip_needles(run_folder, monkeypatch, tmp_path):
    for file in (tmp_path / "base").glob("*token*"):
        file.unlink()
    np.save("text.npy", np.random.default_rng(0).integers(8, 260, 2000))
    settings = [*SETTINGS, "eval.text=text.npy"]
    with pytest.raises(RecipeError, match="no tokenizer to ask with"):
        evaluate(str(run_folder), overrides=settings)
    result = evaluate(str(run_folder), overrides=[*settings, "eval.needles=0"])
    assert "recall@32" in result["paired"]
    assert not any("single" in name for name in result["paired"])


def test_windows_are_spread_over_the_whole_text():
    windows = cut_windows(np.arange(1000), 10, 3)
    assert [w[0] for w in windows] == [0, 500, 990]
    assert all(np.array_equal(w, np.arange(w[0], w[0] + 10)) for w in windows)
