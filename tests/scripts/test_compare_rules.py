"""scripts/compare_rules.py: its probes against `evals.probes` and decoding's own steps, its needles, its file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.result import RowResult
from mage_tune.decode.steps import BlockSteps, Levers
from mage_tune.evals.needles import NeedlePrompt
from mage_tune.evals.probes import REVEALS, masked_cross_entropy, probe_window
from mage_tune.evals.run import SEED
from mage_tune.lm import from_backbone
from mage_tune.recipe import Eval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import compare_rules as script

SIZE, BLOCKS, BUDGETS = 32, 8, [12, 40]
SETTINGS = Eval(context=BLOCKS * SIZE, blocks=2, budgets=BUDGETS, dense_layers=1)
LABELS = [arm.label for arm in script.SPARSE]
DECODED = ("mage", "mage, union refresh", "mage, residual", "quest", "oracle")


@pytest.fixture(scope="module")
def lm(tiny_backbone):
    """In float64, two ways of computing the same thing do not fall on different sides of a tie."""
    made = from_backbone(tiny_backbone(block_size=SIZE, num_layers=4))
    made.model.double()
    return made


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(4, 60, BLOCKS * SIZE).astype(np.uint16)


ARMS = (
    *script.SPARSE,
    script.Arm("again and again", "mage", Levers(reselect_at=(3, 16, 20))),
    script.Arm("draft, then again", "mage", Levers(refresh="union", reselect_at=(12,))),
    script.Arm("sinks and recent keys", "mage", options=(("sinks", 2), ("recent", 5))),
)


@pytest.fixture(scope="module")
def found(lm, tokens):
    return script.probe_window(lm, tokens, 3, SETTINGS, ARMS)


def test_probes_are_those_of_the_evaluation(lm, tokens, found):
    records = probe_window(lm, tokens, 3, blocks=2, budgets=BUDGETS, dense_layers=1, seed=SEED)
    mean = {name: np.mean([getattr(r, name) for r in records], axis=0) for name in ("ce_exact", "ce_mask", "ce_oracle")}
    assert found["exact", None].ce == pytest.approx(mean["ce_exact"], abs=1e-6)
    for i, budget in enumerate(BUDGETS):
        assert found["mage", budget].ce == pytest.approx(mean["ce_mask"][i], abs=1e-6)
        assert found["oracle", budget].ce == pytest.approx(mean["ce_oracle"][i], abs=1e-6)
        assert found["mage", budget].recall == pytest.approx(np.mean([r.recall[i] for r in records]), abs=1e-6)


@torch.no_grad()
def decoded_loss(window, arm, rule, block, reveal):
    """One probed step of one block as `generate` would run it: step after step, alone in its batch."""
    lm, at = window.lm, block * len(REVEALS) + reveal
    steps = BlockSteps(lm.model, window.cache.prefix([0], [window.lengths[block]]), rule, arm.levers, SIZE)
    usable = [step for step in steps.choosing_steps if step <= window.revealed[reveal]]
    choosing = max(usable) if rule.chooses == "once" else -1
    for step in range(choosing + 1):
        hidden, _ = steps.forward(window.at_step(step)[block : block + 1])
        if steps.wants_draft:
            hidden = hidden.expand(len(window.lengths), -1, -1)
            steps.refresh(window.draft(hidden)[block : block + 1])
    hidden, is_sparse = steps.forward(window.later[at : at + 1])
    assert is_sparse == [True]
    before, mask = window.before[block : block + 1], window.is_masked[at : at + 1]
    return masked_cross_entropy(lm, hidden, before, mask, window.truth[block]).item()


@pytest.mark.parametrize("arm", ARMS, ids=[arm.label for arm in ARMS])
def test_every_arm_is_what_decoding_does(lm, tokens, found, arm):
    window = script.open_window(lm, tokens, 3, 2)
    for budget in BUDGETS:
        rule = arm.at(budget, 1)
        losses = [decoded_loss(window, arm, rule, block, reveal) for block in range(2) for reveal in range(3)]
        assert found[arm.label, budget].ce == pytest.approx(np.mean(losses), abs=1e-5)


def test_probes_tell_arms_apart(found):
    for budget in BUDGETS:
        measured = {label: found[label, budget].ce for label in LABELS}
        assert len({round(ce, 9) for ce in measured.values()}) == len(LABELS)
        assert found["oracle", budget].recall == 1.0
        assert found["mage, residual", budget].recall == found["mage", budget].recall
        others = [found[label, budget].recall for label in LABELS if label != "oracle"]
        assert 0.0 < min(others) <= max(others) < 1.0


def test_steps_before_the_probed_ones_reveal_one_token_each(lm, tokens):
    window = script.open_window(lm, tokens, 0, 2)
    mask_id = lm.family.mask_id
    for step in range(6):
        ids = window.at_step(step)
        assert ((ids != mask_id).sum(1) == 1 + step).all()  # the seed token, and one a step
        assert (ids[ids != mask_id] == window.truth[ids != mask_id]).all()
        known = ids != mask_id
        assert not (known & window.is_masked[:: len(REVEALS)]).any()  # the probed steps know more, in the same order
    assert window.revealed == [8, 16, 23]


def test_a_batch_with_kept_prompts_writes_what_generate_does(tiny_backbone):
    lm = from_backbone(tiny_backbone(block_size=8, vocab_size=272, max_positions=1024, num_layers=3))
    filler = np.asarray(lm.tokenizer("Plain text. It goes on.\n" * 400)["input_ids"])
    settings = Eval(context=768, needles=6, questions=2, documents=3, budgets=[16], dense_layers=1)
    tasks = script.tasks_of(lm, filler, settings, continuations=2)
    assert [task.name for task in tasks] == ["", "stepped_", "copy_", "text_"]
    for part in (tasks[:2], tasks[2:3], tasks[3:]):
        cache = PrefixCache.for_model(lm.model, 2, 0)
        for task in part:
            options = {"max_new_tokens": task.max_new_tokens, "threshold": 0.9, "steps": task.steps}
            options |= {"acceptance": task.acceptance, "stop_ids": None if task.stops else ()}
            for arm in (script.EXACT, *(arm for arm in script.SPARSE if arm.label in DECODED)):
                rule = arm.at(16, 1)
                rows = script.decode(lm, task, task.prompts, rule, arm.levers, cache)
                for prompt, row in zip(task.prompts, rows, strict=True):
                    alone = lm.generate(
                        prompt.input_ids.tolist(), attention=rule, **options, **arm.levers.settings()
                    ).rows[0]
                    assert row.tokens == alone.tokens
                    assert {**row.forwards, "prefill": 0} == {**alone.forwards, "prefill": 0}
                    assert row.finish == "length" or task.stops
            assert row.forwards["prefill"] == 1 < alone.forwards["prefill"]


def test_a_passage_is_copied_when_its_tokens_stand_in_their_places():
    window = np.arange(256, dtype=np.uint16)
    prompt = script.copy_prompt(window, 8, np.random.default_rng(0))
    assert len(prompt.input_ids) == 248 and len(prompt.continuation) == 8
    start = int(prompt.input_ids[-8])
    assert 32 <= start < 160
    assert prompt.input_ids[-8:].tolist() == list(range(start, start + 8))
    assert prompt.input_ids[:-8].tolist() == list(range(240))
    assert prompt.continuation.tolist() == list(range(start + 8, start + 16))
    row = RowResult(prompt.continuation.tolist(), None, "length", 1, {"exact": 1, "sparse": 7}, 1, 16.0)
    assert script.score(prompt, row) == script.Answered(True, 1.0, 8.0, 0.875)
    moved = replace(row, tokens=[9, *prompt.continuation.tolist()[:-1]])
    assert script.score(prompt, moved).found == 0.0


def test_an_answer_is_right_when_every_value_is_in_it():
    prompt = NeedlePrompt(np.zeros(8), ("111111", "222222"))
    row = RowResult([], "They are 222222.", "stop", 2, {"prefill": 4, "exact": 2, "sparse": 6, "commit": 1}, 2, 16.0)
    assert script.score(prompt, row) == script.Answered(False, 0.5, 4.0, 0.75)
    assert script.score(prompt, replace(row, text="222222 111111")).is_right


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, tiny_backbone, converted_checkpoint):
    """A tiny checkpoint with tokenizer and held-out ids, in the current directory."""
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1024)
    base = converted_checkpoint(backbone).rename(tmp_path / "base")
    backbone.tokenizer.save_pretrained(base)
    ids = backbone.tokenizer("This is the held-out text. It goes on.\n" * 100)["input_ids"]
    np.save("heldout.npy", np.asarray(ids, dtype=np.uint16))
    return ["base", "heldout.npy", "results/rules.json", "--device", "cpu"]


SMALL = [
    *("--context", "768", "--blocks", "2", "--budgets", "8", "32", "--dense-layers", "1"),
    *("--needles", "6", "--windows", "3", "--questions", "2", "--continuations", "2"),
]


def test_the_file_holds_every_row_and_what_it_took(checkpoint, capsys):
    assert script.main([*checkpoint, *SMALL, "--seconds", "0", "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(Path("results/rules.json").read_text())
    settings = result["settings"]
    assert settings["windows"]["given"] == 3 and settings["windows"]["done"] == 1  # the first unit is always done
    assert settings["questions"] == settings["continuations"] == {"given": 2, "done": 1}
    assert settings["batch"] == 1 and list(settings["seconds"]) == ["given", "probes", "questions", "copy_", "text_"]
    assert settings["model"] == "base" and settings["dtype"] == "torch.float32"
    assert result["environment"]["commit"] == "abc"
    exact, *rows = result["rows"]
    assert (exact["budget"], exact["recall"]) == (None, None)
    assert [(row["label"], row["budget"]) for row in rows] == [(label, k) for k in (8, 32) for label in LABELS]
    for row in rows:
        assert row["options"]["budget"] == row["budget"] and row["options"]["rule"] == row["rule"]
        assert row["ce_gap"]["mean"] == pytest.approx(row["ce"]["mean"] - exact["ce"]["mean"])
        assert row["ce_gap"]["n"] == row["recall"]["n"] == row["needles"]["n"] == row["text_sparse_steps"]["n"] == 1
        assert ("against_mage" in row) == (row["label"] != "mage")
    assert script.main(["--table", "results/rules.json"]) == 0
    tables = capsys.readouterr().out
    assert tables.count("\n| mage |") == 2 and tables.count("\n| exact |") == 2
    assert "k = 32" in printed and "oracle" in printed


def test_all_units_are_done_when_there_is_time(checkpoint):
    assert script.main([*checkpoint, *SMALL, "--budgets", "8", "--seconds", "600", "--batch", "2"]) == 0
    result = json.loads(Path("results/rules.json").read_text())
    assert sorted(result["settings"]["windows"]["numbers"]) == [0, 1, 2]
    assert {row["ce"]["n"] for row in result["rows"]} == {3}
    for name in ("found", "stepped_found", "copy_found", "text_forwards_per_block"):
        assert {row[name]["n"] for row in result["rows"]} == {2}


def test_a_run_that_is_cut_short_leaves_what_it_has(checkpoint, monkeypatch):
    monkeypatch.setattr(script, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(script, "answer_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        script.main([*checkpoint, *SMALL, "--budgets", "8", "--seconds", "600"])
    result = json.loads(Path("results/rules.json").read_text())
    assert len(result["settings"]["windows"]["numbers"]) == 3 and result["settings"]["questions"]["done"] == 0
    assert {row["ce"]["n"] for row in result["rows"]} == {3} and "needles" not in result["rows"][0]
    assert script.main(["--table", "results/rules.json"]) == 0


def test_probes_alone(checkpoint):
    assert script.main([*checkpoint, *SMALL, "--seconds", "0", "--questions", "0", "--continuations", "0"]) == 0
    result = json.loads(Path("results/rules.json").read_text())
    assert "needles" not in result["rows"][1] and result["settings"]["questions"]["done"] == 0
    assert script.markdown(result).count("| - |") > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budgets", "500"], "nothing would be sparse"),
        (["--context", "4096"], "longer than the model's"),
        (["--windows", "999"], "enough for"),
        (["--blocks", "0"], "blocks=0"),
        (["--questions", "-1"], "questions=-1"),
    ],
)
def test_what_cannot_be_measured_is_one_line(checkpoint, capsys, change, message):
    assert script.main([*checkpoint, *SMALL, *change]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after transformers' progress bar
    assert error.startswith("error: ") and message in error
    assert not Path("results").exists()


def test_paths_are_asked_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["base"])
    assert stopped.value.code == 2
    assert "MODEL, TEXT and OUT" in capsys.readouterr().err
