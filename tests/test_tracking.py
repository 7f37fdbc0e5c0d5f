"""Trackers and samples beside a run: what they get, and that none of them can end it."""

import json
import shutil
import sys
import time
import tomllib
from types import ModuleType, SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import mage_tune.tracking as tracking_module
import mage_tune.watch as watch_module
from mage_tune.progress import details, summary
from mage_tune.recipe import load_recipe
from mage_tune.run import train
from mage_tune.tracking import Run, Tracking
from mage_tune.watch import Samples, ideal_step_s
from tests.test_engines import RECIPE

QUICK = [
    "data.length=64",
    "objective.sparse_distillation.budget=16",
    "train.rows=1",
    "train.steps=3",
    "train.save_every=9",
]


class Recorder:
    """A tracker in memory that may fail at one of its methods."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.lines, self.is_finished = failing, [], False

    def start(self, run):
        self.fail("start")
        self.run = run
        return self

    def log(self, values, step):
        self.fail("log")
        self.lines.append((step, values))

    def finish(self):
        self.fail("finish")
        self.is_finished = True

    def fail(self, where: str) -> None:
        if where == self.failing:
            raise RuntimeError(f"no {where}\ntoday")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(trackers, *overrides) -> folder, standard error; the trackers are STARTERS by name."""

    def go(trackers, *overrides, **options):
        monkeypatch.setattr(tracking_module, "STARTERS", {name: t.start for name, t in trackers.items()})
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        recipe = load_recipe(RECIPE, [*QUICK, f"output={folder}", *overrides])
        return train(recipe, **options), capsys.readouterr().err

    return go


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_every_tracker_gets_every_line(run):
    trackers = {"trackio": Recorder(), "wandb": Recorder()}
    folder, err = run(trackers, "train.trackers=[trackio, wandb]")
    assert "warning" not in err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for tracker in trackers.values():
        assert [step for step, _ in tracker.lines] == [1, 2, 3]
        assert [values["loss"] for _, values in tracker.lines] == [line["loss"] for line in lines]
        assert {"diffusion", "query_alignment", "tokens_per_s", "grad_norm"} <= tracker.lines[0][1].keys()
        assert tracker.run.name == "debug" and tracker.run.config["train"]["steps"] == 3
        assert tracker.run.step == 0 and tracker.run.id == f"debug-{(folder / 'run_id').read_text().strip()}"
        assert tracker.is_finished


def test_trackers_that_fail_warn_once_and_change_nothing(run):
    plain, _ = run({})
    failing = {"trackio": Recorder("start"), "tensorboard": Recorder("log"), "wandb": Recorder("finish")}
    folder, err = run(failing, "train.trackers=[trackio, tensorboard, wandb]")
    for what in ("trackio does not start (no start", "tensorboard stopped (no log", "wandb did not finish (no finish"):
        assert err.count(f"warning: train.trackers: {what} today); training goes on, metrics.jsonl has it all") == 1
    assert err.count("warning: ") == 3
    assert len(failing["wandb"].lines) == 3  # the others are served still
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    for name, weight in weights(plain).items():
        assert torch.equal(weights(folder)[name], weight)


def test_a_tracker_that_is_not_installed_warns(tmp_path, monkeypatch, capsys):
    for name in ("trackio", "tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        tracking = Tracking([name], tmp_path, "x", {}, Console(stderr=True))
        tracking.on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=0), None)
        assert tracking.trackers == {}
        extra = {"trackio": "track"}.get(name, name)
        told = capsys.readouterr().err
        assert f"train.trackers: {name} is not there (" in told and f"pip install 'mage_tune[{extra}]')" in told
        assert (
            extra
            in tomllib.loads((RECIPE.parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        )


def test_a_run_keeps_its_id_and_another_has_its_own(run, tmp_path):
    """Two runs of one recipe are two runs in a tracker, and one that goes on is one."""
    first, second, resumed = Recorder(), Recorder(), Recorder()
    folder, _ = run({"trackio": first}, "train.trackers=[trackio]", "train.save_every=2")
    run({"trackio": second}, "train.trackers=[trackio]")
    assert first.run.id != second.run.id
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    (folder / "adapter_model.safetensors").unlink()
    run({"trackio": resumed}, "train.trackers=[trackio]", "train.save_every=2", f"output={folder}")
    assert resumed.run.id == first.run.id and resumed.run.step == 2
    assert [step for step, _ in resumed.lines] == [3]


def test_trackio_and_wandb_go_on_with_a_runs_id(tmp_path, monkeypatch):
    for name in ("trackio", "wandb"):
        seen = {}
        fake = ModuleType(name)
        fake.init = lambda seen=seen, **options: seen.update(options) or Recorder()
        monkeypatch.setitem(sys.modules, name, fake)
        assert isinstance(tracking_module.STARTERS[name](Run(tmp_path, "mine", "mine-1a", 0, {"seed": 1})), Recorder)
        assert (seen["project"], seen["config"], seen["resume"]) == ("mage_tune", {"seed": 1}, "allow")
        assert seen["id" if name == "wandb" else "name"] == "mine-1a"


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3)), (1, (2, 3))):  # stopped after step 3, gone on from a checkpoint of step 1
        tracker = tracking_module.STARTERS["tensorboard"](Run(tmp_path, "x", "x-1a", done, {}))
        for step in steps:
            tracker.log({"loss": 1.5 + done}, step=step)
        tracker.finish()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.5), (2, 2.5), (3, 2.5)]


def test_samples_are_printed_and_change_nothing(run):
    plain, _ = run({})
    folder, err = run({}, "train.sample_every=2", watch=Samples)
    assert err.count("writes: ") == 1
    assert "step 2: recall@16 0." in err
    first, second, third = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert f"recall@16 {second['recall']:.3f}" in err and second["sample_s"] > 0
    assert not {"recall", "sample_s"} & (first.keys() | third.keys())
    for name, weight in weights(plain).items():
        assert torch.equal(weights(folder)[name], weight)


def test_samples_go_to_trackers_and_do_not_slow_down_what_is_logged(run, monkeypatch):
    tracker, sample = Recorder(), Samples.sample
    monkeypatch.setattr(Samples, "sample", lambda self: time.sleep(3) or sample(self))
    run({"wandb": tracker}, "train.sample_every=3", "train.trackers=[wandb]", watch=Samples)
    step, values = tracker.lines[-1]
    assert step == 3 and 0 <= values["recall"] <= 1
    assert values["sample_s"] > 3 > values["step_s"]


def test_a_row_too_short_to_be_continued_is_told(run):
    folder, err = run({}, "train.sample_every=1", "data.sources=[{kind: text, path: recipes/data/debug-text.txt}]",
                      "data.length=32", watch=Samples)  # fmt: skip
    assert err.count("train.sample_every: none, as row 0 is shorter than two blocks of 32 tokens") == 1
    assert (folder / "adapter_model.safetensors").is_file()


def test_samples_that_fail_warn_once(run, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no probe today")

    monkeypatch.setattr(watch_module, "probe_window", broken)
    folder, err = run({}, "train.sample_every=1", watch=Samples)
    assert err.count("no more samples") == 1
    assert "RuntimeError: no probe today" in err
    assert (folder / "adapter_model.safetensors").is_file()


def test_a_sample_that_fails_ends_a_run_whose_processes_share_weights(run, monkeypatch, tmp_path):
    """The others wait for this one in a forward pass that it has left: no warning can help them."""

    def broken(*arguments, **options):
        raise RuntimeError("no probe today")

    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "probe_window", broken)
        patch.setattr(watch_module, "splits_weights", lambda: True)
        with pytest.raises(ValueError, match=r"after step 2 failed \(RuntimeError: no probe today\).*sample_every=0"):
            run({}, "train.sample_every=2", "train.save_every=1", watch=Samples)
    assert watch_module.splits_weights() is False
    folder, err = run({}, f"output={next(tmp_path.glob('run-*'))}", "train.sample_every=0", "train.save_every=1")
    assert "going on from" in err
    assert (folder / "adapter_model.safetensors").is_file()


def test_samples_take_as_many_forwards_on_every_process(run, monkeypatch):
    """Whatever the model writes: under FSDP a process with one forward more would wait for ever."""
    seen = []
    generate = watch_module.BlockDiffusionLM.generate

    def kept(self, *arguments, **options):
        seen.append(generate(self, *arguments, **options))
        return seen[-1]

    monkeypatch.setattr(watch_module.BlockDiffusionLM, "generate", kept)
    run({}, "train.sample_every=1", watch=Samples)
    assert [out.forwards_per_block for out in seen] == [watch_module.STEPS] * 3
    assert {len(out.tokens) for out in seen} == {watch_module.BLOCKS * 32}


def test_utilisation_is_the_ideal_time_over_the_step(run, monkeypatch):
    folder, _ = run({}, ideal_step_s=0.001)
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        assert line["mfu"] == pytest.approx(0.001 / line["step_s"])
    assert "MFU 25%" in summary({"loss": 1.0, "tokens_per_s": 5.0, "mfu": 0.25})
    recipe = load_recipe(RECIPE)
    assert ideal_step_s(recipe) is None  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    on_h100 = ideal_step_s(recipe)
    assert 0 < on_h100 < 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert ideal_step_s(recipe) == pytest.approx(on_h100 * 989 / 312)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some other card")
    assert ideal_step_s(recipe) is None


def test_small_terms_are_not_shown_as_zero():
    line = details({"diffusion": 0.999, "attention_alignment": 1.234e-5})
    assert "diffusion 0.9990 · attention_alignment 1.2e-05" in line
