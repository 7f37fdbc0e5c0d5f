"""Suites end to end on a tiny model: arms stored, found again, interrupted, shared out; bad input told in one line."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mage_tune.backbone import write_family
from mage_tune.cli import describe_error
from mage_tune.evals import run, store
from mage_tune.evals.compare import compare, compare_files, read_result
from mage_tune.evals.run import evaluate
from mage_tune.evals.store import Store, weights_digest
from mage_tune.evals.suites import find_suite, read_suite, shipped_suites
from mage_tune.evals.tasks import Arm, SampleRecord, Skipped, Task, TaskResult
from mage_tune.lm import load
from mage_tune.recipe import RecipeError, load_suite

SUITE = """\
description: tiny
dense_layers: 1
rules:
  - {rule: mage, budgets: [8]}
  - {rule: quest, budgets: [16]}
tasks:
  - {kind: text, context: 128, documents: 3, blocks: 2, budgets: [8, 16]}
  - {kind: layers, context: 128, documents: 2, blocks: 2, budget: 8}
  - {kind: rules, context: 128, documents: 2, blocks: 2}
  - {kind: needles, needle_kinds: [multi_query], lengths: [400, 512], depths: [0.5], needles: 2, asked: 2, questions: 1}
  - {kind: copy, context: 128, documents: 2}
  - {kind: continue, context: 128, documents: 1}
"""
ARMS = 2 * (2 + 4 * 3)
RECIPE = """\
name: tiny
model: {{path: {base}}}
data:
  length: 64
  sources: [{{kind: text, path: {text}}}]
eval: {{text: {text}}}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_backbone, tiny_adapter, converted_checkpoint):
    """A folder with a finished run, its base, a held-out text and a suite; made once, copied by nobody."""
    here = tmp_path_factory.mktemp("suites")
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1024)
    base = converted_checkpoint(backbone).rename(here / "base")
    backbone.tokenizer.save_pretrained(base)
    folder = here / "runs" / "tiny"
    tiny_adapter(backbone).save_pretrained(folder)
    write_family(folder, backbone.family)
    sentences = [f"This is sentence {i} of the held-out text.\n" for i in range(100)]
    (here / "heldout.jsonl").write_text(json.dumps({"text": "".join(sentences)}) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, text=here / "heldout.jsonl"))
    (here / "my.yaml").write_text(SUITE)
    return here


@pytest.fixture
def work(folders, tmp_path, monkeypatch):
    """The same folder with no results in it."""
    for name in ("base", "heldout.jsonl", "my.yaml"):
        (tmp_path / name).symlink_to(folders / name)
    run_folder = tmp_path / "runs" / "tiny"
    run_folder.mkdir(parents=True)
    for file in (folders / "runs" / "tiny").iterdir():
        if file.is_file():
            (run_folder / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch):
    """Results without drawing them, which takes longer than getting them."""
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    monkeypatch.setattr(run, "print_tables", lambda result: None)


@pytest.fixture(scope="module")
def finished(folders):
    """results.json of an uninterrupted evaluation."""
    before = Path.cwd()
    os.chdir(folders)
    try:
        return evaluate("runs/tiny", suite="my.yaml")
    finally:
        os.chdir(before)


def without_times(result):
    """What has to be equal from run to run; a commit made while the tests run counts for nothing."""
    found = json.loads(json.dumps(result))
    del found["timings"], found["environment"]["commit"]
    return found


def test_a_suite_measures_every_task_in_every_arm(finished, folders):
    out = folders / "runs" / "tiny" / "eval" / "my"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(finished))
    assert (out / "report.html").is_file()
    tasks = ["text", "layers", "rules", "needles_multi_query", "copy", "continue"]
    assert list(finished["tasks"]) == tasks
    readings = ["exact", "mage 8", "quest 16"]
    for task in tasks:
        expected = ["exact"] if task in ("text", "layers") else readings
        assert list(finished["tasks"][task]["arms"]) == expected
        for side in ("base", "adapter"):
            assert list(finished["records"][side][task]) == expected
    assert len(list((out / "arms").glob("*.json"))) == ARMS
    assert finished["metrics"].keys() == finished["paired"].keys() == finished["values"]["base"].keys()
    for key, found in finished["paired"].items():
        values = [finished["values"][side][key] for side in ("adapter", "base")]
        assert found["n"] == len(values[0]) == found["wins"] + found["ties"] + found["losses"]
        higher = finished["metrics"][key]["higher_is_better"]
        better = sum((a > b) if higher else (a < b) for a, b in zip(*values, strict=True))
        assert found["wins"] == better
    assert any(found["wins"] for found in finished["paired"].values())
    needles = finished["records"]["base"]["needles_multi_query"]["mage 8"]
    assert [r["facts"]["length"] for r in needles] == [400, 512]
    assert all(r["forwards_per_block"] >= 1 for r in needles)
    assert (
        finished["tasks"]["copy"]["sparse_share"]["mage 8"] > 0.5 > finished["tasks"]["copy"]["sparse_share"]["exact"]
    )
    assert finished["tasks"]["copy"]["decoding"]["steps"] == 8


def test_rules_agree_with_the_text_probes(finished):
    """Two ways to the same numbers: masks over the whole prefix, and decoding's own gathered keys."""
    text = {key: values[:2] for key, values in finished["values"]["base"].items()}
    # windows 0 and 1 of 2 are not windows 0 and 1 of 3; the first is the same in both
    assert text["rules.ce@mage 8"][0] == pytest.approx(text["ce_mask@8"][0], abs=1e-4)
    assert text["rules.recall@mage 8"][0] == pytest.approx(text["recall@8"][0], abs=1e-4)
    assert text["rules.ce@exact"][0] == pytest.approx(text["ce_exact"][0], abs=1e-4)
    cost = text["ce_mask@8"][0] - text["ce_oracle@8"][0]
    assert text["layers.foresight_cost@8"][0] == pytest.approx(cost, abs=1e-4)


def test_the_layer_view_adds_up(finished):
    """Sum of what single layers win equals the metric; dense layers are left out."""
    for side in ("base", "adapter"):
        records = finished["records"][side]["layers"]["exact"]
        for record, total in zip(records, finished["values"][side]["layers.sum_of_layers@8"], strict=True):
            assert len(record["facts"]["gain_by_layer"]) == 2 and record["facts"]["first_layer"] == 1
            assert sum(record["facts"]["gain_by_layer"]) == pytest.approx(total)
            assert max(map(abs, record["facts"]["gain_by_layer"])) > 1e-4


def test_a_finished_evaluation_is_not_run_again(finished, folders, no_report, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(Store, "write", None)
    again = evaluate("runs/tiny", suite="my.yaml")
    assert without_times(again) == without_times(finished)
    assert again["timings"]["finished"] == finished["timings"]["finished"]
    assert f"{ARMS} of {ARMS} arms are there already" in capsys.readouterr().err


@pytest.mark.parametrize("after", [1, 13, ARMS - 1])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(finished, work, no_report, monkeypatch, capsys, after):
    write, written = Store.write, []

    def stop(self, task, arm, fingerprint, result):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(arm.name)
        return write(self, task, arm, fingerprint, result)

    monkeypatch.setattr(Store, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate("runs/tiny", suite="my.yaml")
    told = capsys.readouterr().err
    assert f"stopped: {after} of {ARMS} arms are finished and kept in runs/tiny/eval/my/arms" in told
    assert "the same command goes on" in told
    assert not (work / "runs/tiny/eval/my/results.json").exists()
    monkeypatch.setattr(Store, "write", write)
    resumed = evaluate("runs/tiny", suite="my.yaml")
    assert f"{after} of {ARMS} arms are there already" in capsys.readouterr().err
    assert without_times(resumed) == without_times(finished)


def test_two_processes_share_the_arms_and_find_the_same(work):
    few = "tasks=[{kind: copy, context: 128, documents: 2}]"
    # As on GPUs; accelerate's --cpu starts one process without MPI, whatever it is told.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "mage_tune.cli", "eval", "runs/tiny", "--suite", "my.yaml", "--set", few]
    root = str(Path(run.__file__).parents[2])
    path = os.pathsep.join([root, str(Path(root) / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tokens copied (2 passages)") == 1  # one process reports
    shared = read_result("runs/tiny/eval/my")
    assert shared["timings"]["processes"] == 2
    shutil.rmtree("runs/tiny/eval")
    alone = evaluate("runs/tiny", suite="my.yaml", overrides=[few])
    assert without_times(shared) == without_times(alone)


def test_another_setting_is_another_arm(folders, finished, monkeypatch):
    monkeypatch.chdir(folders)
    folder = folders / "runs/tiny/eval/my/arms"
    before = set(folder.iterdir())
    plan = read_suite("my.yaml", ["tasks.4.documents=1"], str(folders / "heldout.jsonl"))
    lm = load("base", adapter="runs/tiny")
    run.measure(lm, plan, Store(folder), has_adapter=True)
    fresh = {file.name.split("--")[0] for file in set(folder.iterdir()) - before}
    assert fresh == {"copy"}
    for file in set(folder.iterdir()) - before:
        file.unlink()


def test_a_damaged_arm_is_run_again(finished, folders, work, no_report):
    arms = work / "runs/tiny/eval/my/arms"
    arms.mkdir(parents=True)
    kept = sorted((folders / "runs/tiny/eval/my/arms").iterdir())
    for file in kept:
        (arms / file.name).write_bytes(file.read_bytes())
    victim = arms / kept[5].name
    victim.write_text(victim.read_text()[:200])
    again = evaluate("runs/tiny", suite="my.yaml")
    assert without_times(again) == without_times(finished)
    assert json.loads(victim.read_text())["fingerprint"]


def test_a_full_disk_loses_nothing(work, monkeypatch):
    real, room = store.os.fsync, [3]

    def fsync(handle):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(store.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as full:
        evaluate("runs/tiny", suite="my.yaml")
    line, code = describe_error(full.value)
    assert code == 2 and "disk is full" in line and "the same command again" in line
    arms = list((work / "runs/tiny/eval/my/arms").iterdir())
    assert len(arms) == 3  # whole ones; nothing half-written is left
    assert all(json.loads(file.read_text())["fingerprint"] for file in arms)


def test_the_digest_of_weights_tells_models_apart(folders, monkeypatch):
    monkeypatch.chdir(folders)
    bare, tuned = load("base"), load("base", adapter="runs/tiny")
    base = weights_digest(bare.model, with_adapter=False)
    assert base == weights_digest(tuned.model, with_adapter=False)
    with_adapter = weights_digest(tuned.model, with_adapter=True)
    assert with_adapter != base
    name = next(name for name, _ in tuned.model.named_parameters() if "lora_B" in name)
    tuned.model.get_parameter(name).data[0, 0] += 1.0
    assert weights_digest(tuned.model, with_adapter=True) != with_adapter
    assert weights_digest(tuned.model, with_adapter=False) == base


# Bad input


class NotHere(Task):
    kind, name, title, settings, samples = "other", "elsewhere", "Elsewhere", {}, 1

    def prepare(self, lm):
        raise Skipped("its data are on the Hub, and there is no network")


class Constant(Task):
    """One right sample of two, whatever the arm."""

    kind, name, title, settings, samples = "other", "constant", "Constant", {}, 2

    def prepare(self, lm):
        return "0" * 64

    def run(self, lm, arm, advance):
        advance()
        advance()
        return TaskResult({"right": [True, False]}, [SampleRecord("a", "yes"), SampleRecord("b", "no")])


def test_a_task_that_cannot_run_here_is_told_and_the_others_run(folders, work, capsys):
    lm = load("base")
    plan = run.Plan("x", {}, [NotHere(), Constant()], [Arm()])
    found = run.measure(lm, plan, Store(work / "arms"), has_adapter=False)
    assert found["skipped"] == {"elsewhere": "its data are on the Hub, and there is no network"}
    assert found["arms"]["base"]["constant.right@exact"]["mean"] == 0.5
    run.print_tables(found)
    assert "elsewhere was skipped: its data are on the Hub" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="nothing to evaluate: elsewhere: its data"):
        run.measure(lm, run.Plan("x", {}, [NotHere()], [Arm()]), Store(work / "arms"), has_adapter=False)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("quik", [], "unknown suite 'quik'; did you mean 'quick'"),
        ("nothing.yaml", [], "nothing.yaml: no such suite file; shipped suites are quick"),
        ("my.yaml", ["tasks.0.kind=texts"], "unknown value 'texts'; did you mean 'text'"),
        ("my.yaml", ["tasks.0.document=4"], "unknown key; did you mean 'tasks\\[0\\].documents'"),
        ("my.yaml", ["rules.0.rule=mags"], "rules\\[0\\]': unknown selection rule 'mags'; did you mean 'mage'"),
        ("my.yaml", ["rules.0.options={recents: 4}"], "'mage' has no option 'recents'"),
        ("my.yaml", ["rules.0.budgets=[8, 8]"], "arm 'base mage 8' is there twice"),
        ("my.yaml", ["tasks.4.name=text"], "task 'text' is there twice"),
        ("my.yaml", ["tasks.3.asked=9"], "9 of 2 needles"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(work, name, overrides, message):
    with pytest.raises(RecipeError, match=message):
        read_suite(name, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.0.context=2048"], "text: context 2048 is longer than the model's 1024 positions"),
        (["tasks.0.context=129"], "text: context 129 is not two or more whole blocks of 8"),
        (["tasks.0.budgets=[64]"], "text: a budget of 64 keys is at least the shortest probed prefix"),
        (["rules.2={rule: tidal, budgets: [64]}"], None),
        (["dense_layers=3"], "dense_layers 3: the model has 3 layers"),
        (
            ["tasks.3.lengths=[1020]"],
            r"needles_multi_query: length 1020 \(and 24 to be written\) is longer",
        ),
        (["tasks.3.needles=30"], "needles: 30 needles do not fit"),
        (["tasks.0.documents=999"], "enough for .* windows of 128; 999 were asked for"),
        (["text=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_settings_that_do_not_fit_the_model_stop_before_anything_is_measured(work, monkeypatch, overrides, message):
    monkeypatch.setattr(run, "run_units", None)
    if message is None:
        overrides, message = ["rules.0.budgets=[64]"], "rules: a budget of 64 keys is at least the shortest probed"
    with pytest.raises((ValueError, OSError), match=message) as told:
        evaluate("runs/tiny", suite="my.yaml", overrides=overrides)
    assert describe_error(told.value)[1] == 2
    assert not (work / "runs/tiny/eval").exists()


def test_a_suite_needs_text_and_needles_a_tokenizer(work, tmp_path):
    with pytest.raises(ValueError, match=r"text: held-out text is needed; give a file \(--set text=PATH\)"):
        evaluate("base", suite="my.yaml")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (work / "base").iterdir():
        if "token" not in file.name:
            (bare / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="comes without a tokenizer"):
        evaluate("bare", suite="my.yaml", overrides=["text=heldout.jsonl"])


def test_shipped_suites_are_read(work):
    assert list(shipped_suites()) == ["quick", "standard", "full"]
    for name in shipped_suites():
        suite = load_suite(find_suite(name))
        assert suite.description.endswith(".")
    plan = read_suite("quick", text="heldout.jsonl")
    assert [arm.reading for arm in plan.readings] == ["exact", "mage 32"]
    assert plan.settings["text"] == "heldout.jsonl"


# Two results


def test_two_results_are_compared_sample_by_sample(finished, folders, work, monkeypatch, capsys):
    found = compare(finished, finished, sides=("base", "adapter"))
    for key in finished["metrics"]:
        assert found["paired"][key] == finished["paired"][key]
    found = compare(finished, finished)
    assert all(change["ties"] == change["n"] for change in found["paired"].values())
    monkeypatch.setenv("COLUMNS", "100")
    compare_files(str(folders / "runs/tiny/eval/my"), str(folders / "runs/tiny/eval/my/results.json"))
    printed = capsys.readouterr().out
    assert "recall@16 ↑" in printed and "0 / 3 / 0" in printed


def test_different_settings_are_not_compared_unless_told(finished, folders, work, no_report):
    tasks = "tasks=[{kind: text, context: 128, documents: 2, blocks: 2, budgets: [8, 16]}, {kind: copy, context: 128, "
    evaluate("runs/tiny", suite="my.yaml", overrides=[tasks + "documents: 2}]", "threshold=0.5"])
    other = read_result("runs/tiny/eval/my")
    with pytest.raises(ValueError, match=r"not comparable: text: settings.documents: 3 against 2 \(and .*--force"):
        compare(finished, other)
    found = compare(finished, other, force=True)
    assert "recall@16" not in found["metrics"]  # 3 windows against 2 cannot be paired
    assert "copy.copied@exact" in found["metrics"]
    assert any("threshold: 0.9 against 0.5" in line for line in found["differing"])
    changed = json.loads(json.dumps(finished))
    changed["tasks"]["copy"]["prompts"] = "0" * 64
    with pytest.raises(ValueError, match="copy: the prompts differ"):
        compare(finished, changed)


def test_results_that_are_not_there_are_told(tmp_path):
    with pytest.raises(ValueError, match="no results there"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": ')
    with pytest.raises(ValueError, match="damaged"):
        read_result(tmp_path)
    (tmp_path / "results.json").write_text('{"arms": {}}')
    with pytest.raises(ValueError, match="another version"):
        read_result(tmp_path)
