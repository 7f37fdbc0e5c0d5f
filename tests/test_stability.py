"""Runs that are killed, stopped, out of disk or out of numbers: what they leave can be trusted, and they say why."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import mage_tune.run as run_module
import mage_tune.run_folder as run_folder_module
import mage_tune.stability as stability_module
import mage_tune.stream_loss as stream_loss_module
import mage_tune.trainer as trainer_module
from mage_tune.cli import describe_error
from mage_tune.objectives import cross_entropy_sum
from mage_tune.recipe import Recipe, resolved_yaml
from mage_tune.run import train
from mage_tune.run_folder import ADAPTER_FILE, last_checkpoint
from mage_tune.stability import NonFiniteError, SpikeGuard, TrainingStopped
from mage_tune.trainer import MageTrainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="exactness is promised on a CPU")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tiny_backbone, converted_checkpoint) -> Path:
    return converted_checkpoint(tiny_backbone())


@pytest.fixture
def recipe(tmp_path, base):
    """recipe(output, **train) -> Recipe of the tiny model on two sources, five steps, a checkpoint after each."""
    for name in ("one", "two"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(4, 60, 24 * 24))

    def make(output: str = "run", **settings) -> Recipe:
        sources = [{"kind": "text", "path": str(tmp_path / f"{name}.npy")} for name in ("one", "two")]
        schedule = {"steps": 5, "save_every": 1, "keep_checkpoints": 1, "learning_rate": 1e-2, "precision": "float32"}
        parts = {
            "name": "test",
            "output": str(tmp_path / output),
            "model": {"path": str(base), "dtype": "float32"},
            "data": {"length": 24, "sources": sources},
            "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
            "train": schedule | settings,
        }
        return Recipe.model_validate(parts)

    return make


@pytest.fixture(scope="module")
def made() -> dict[str, bytes]:
    return {}


@pytest.fixture
def uninterrupted(recipe, made):
    """uninterrupted(**train) -> bytes of the adapter of such a run that nothing happened to."""

    def run(**settings) -> bytes:
        key = json.dumps(settings)
        if key not in made:
            made[key] = (train(recipe("whole", **settings)) / ADAPTER_FILE).read_bytes()
        return made[key]

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_any_file_event_resumes_to_the_same_adapter(recipe, tmp_path):
    """SIGKILL before mkdir, open, rename and delete, before a write, in the middle of one; every run is a process."""
    (tmp_path / "recipe.yaml").write_text(resolved_yaml(recipe(steps=2)))
    command = [sys.executable, str(ROOT / "tests" / "crash_driver.py"), str(tmp_path / "recipe.yaml"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([*command, "6"], capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # DeepSpeed talks too
    assert len(rows) == 6
    assert {row["signal"] for row in rows} == {signal.SIGKILL}
    assert all(row["equal"] for row in rows), rows
    assert {"open", "write", "half"} & {row["event"].split()[0] for row in rows}
    assert [] in [row["left"] for row in rows]
    assert ["checkpoint-1"] in [row["left"] for row in rows]


def test_what_a_killed_save_left_is_swept_away(recipe):
    folder = Path(recipe().output)
    half = folder / "checkpoints" / ".saving" / "checkpoint-9"
    half.mkdir(parents=True)
    (half / "trainer_state.json").touch()
    assert last_checkpoint(folder / "checkpoints") is None
    train(recipe(steps=2))
    assert names(folder / "checkpoints") == {"checkpoint-2"}


def test_the_old_checkpoint_goes_only_after_the_new_one_is_whole(recipe, monkeypatch):
    seen = []
    save = trainer_module.Trainer._save_checkpoint

    def watch(self, *args):
        save(self, *args)  # written, not yet published
        seen.append(last_checkpoint(Path(self.args.output_dir)))

    monkeypatch.setattr(trainer_module.Trainer, "_save_checkpoint", watch)
    folder = train(recipe(steps=3)) / "checkpoints"
    assert seen == [None, str(folder / "checkpoint-1"), str(folder / "checkpoint-2")]
    assert names(folder) == {"checkpoint-3"}


def test_going_on_from_an_older_checkpoint_replaces_the_newer_one(recipe):
    folder = train(recipe(steps=3, keep_checkpoints=3))
    whole = (folder / ADAPTER_FILE).read_bytes()
    (folder / ADAPTER_FILE).unlink()
    train(recipe(steps=3, keep_checkpoints=3, resume=str(folder / "checkpoints" / "checkpoint-1")))
    assert (folder / ADAPTER_FILE).read_bytes() == whole
    assert names(folder / "checkpoints") == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_half_written_line_of_metrics_is_dropped(recipe):
    folder = train(recipe(steps=2))
    (folder / ADAPTER_FILE).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    train(recipe(steps=2))
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 0.9])
def test_a_write_that_fails_keeps_the_last_checkpoint(recipe, uninterrupted, monkeypatch, share):
    """The system itself refuses, first the adapter and then the optimizer: in step 3 files may only grow to a limit."""
    save = trainer_module.Trainer._save_checkpoint
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(self, *args):
        if self.state.global_step < 3:
            return save(self, *args)
        whole = Path(self.args.output_dir) / "checkpoint-2" / "optimizer.pt"  # the largest file
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * whole.stat().st_size), before[1]))
        try:
            return save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "_save_checkpoint", save_on_a_small_disk)
        with pytest.raises(OSError, match=r"step 3: its checkpoint could not be written \(.*\); .*checkpoint-2"):
            train(recipe("small"))
    folder = Path(recipe("small").output)
    assert names(folder / "checkpoints") == {"checkpoint-2"}
    train(recipe("small"))
    assert (folder / ADAPTER_FILE).read_bytes() == uninterrupted()


def test_an_adapter_that_cannot_be_written_leaves_nothing_of_itself(recipe, uninterrupted, monkeypatch):
    save = run_folder_module.save_adapter
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_small_disk(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_adapter", save_on_a_small_disk)
        with pytest.raises(OSError, match=r"the adapter could not be written \(.*\); .*checkpoint-5") as caught:
            train(recipe())
    assert describe_error(caught.value)[1] == 2
    assert not list(Path(recipe().output).glob("*adapter*"))
    assert (train(recipe()) / ADAPTER_FILE).read_bytes() == uninterrupted()


def test_torchs_error_on_a_full_disk_is_said_to_be_one(recipe, monkeypatch):
    def full(self, path):
        try:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        except RuntimeError:
            raise RuntimeError("whatever its __exit__ says")  # noqa: B904 - as torch does

    monkeypatch.setattr(MageTrainer, "_save_optimizer_and_scheduler", full)
    monkeypatch.setattr(run_folder_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    with pytest.raises(OSError, match="step 1: its checkpoint could not be written") as caught:
        train(recipe())
    line, code = describe_error(caught.value)
    assert (line[:23], code) == ("the disk is full (step ", 2)
    assert "No space left on device; 0.0 GiB free); there is no checkpoint yet); free some space" in line
    assert not names(Path(recipe().output) / "checkpoints")


def test_what_a_failed_save_left_is_swept_away_before_the_run_needs_space(recipe, monkeypatch):
    folder = Path(recipe().output)
    for half in (folder / "checkpoints" / ".saving" / "checkpoint-9", folder / ".adapter"):
        half.mkdir(parents=True)
    seen = []

    def load(_):
        seen.append(list(folder.rglob(".*")))
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "load_recipe_backbone", load)
    with pytest.raises(ZeroDivisionError):
        train(recipe())
    assert seen == [[]]


def test_a_full_disk_is_said_in_one_line(recipe, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MageTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="could not be written") as caught:
        train(recipe())
    line, code = describe_error(caught.value)
    assert code == 2
    assert line.startswith("the disk is full (step 1: its checkpoint could not be written")


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["compute_loss", "_save_checkpoint"])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_from_it(
    recipe, uninterrupted, monkeypatch, capsys, number, where
):
    inner, calls = getattr(MageTrainer, where), iter(range(1, 100))

    def interrupted(self, *args, **kwargs):
        if next(calls) == 2:
            signal.raise_signal(number)
        return inner(self, *args, **kwargs)

    handlers = [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)]
    settings = {"save_every": 2} if where == "_save_checkpoint" else {"save_every": 4}
    stop = 4 if where == "_save_checkpoint" else 2
    with monkeypatch.context() as patch:
        patch.setattr(MageTrainer, where, interrupted)
        expected = rf"stopped by {number.name} after step {stop} of 5; .*checkpoint-{stop}$"
        with pytest.raises(TrainingStopped, match=expected) as stopped:
            train(recipe("parts", **settings))
    assert stopped.value.signum == number
    assert [signal.getsignal(other) for other in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = Path(recipe("parts").output)
    assert names(folder / "checkpoints") == {f"checkpoint-{stop}"}
    assert not (folder / ADAPTER_FILE).exists()
    train(recipe("parts", **settings))
    assert f"going on from {folder}/checkpoints/checkpoint-{stop}\n" in capsys.readouterr().err
    assert (folder / ADAPTER_FILE).read_bytes() == uninterrupted(**settings)


def test_a_second_signal_stops_at_once(recipe, monkeypatch):
    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MageTrainer, "compute_loss", twice)
    monkeypatch.setattr(stability_module, "PASSED_ON_S", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_a_launcher_passes_on_is_the_same_signal(recipe, monkeypatch):
    """The whole process group got a SIGTERM; then the launcher's own end, or torchrun, sends another."""

    def twice(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    compute_loss = MageTrainer.compute_loss

    def at_once(*_):
        raise AssertionError("stopped at once")

    monkeypatch.setattr(MageTrainer, "compute_loss", twice)
    before = signal.signal(signal.SIGTERM, at_once)
    try:
        with pytest.raises(TrainingStopped, match=r"stopped by SIGTERM after step 1 of 5; .*checkpoint-1$"):
            train(recipe())
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent ended")
@pytest.mark.parametrize("group", [False, True])
def test_sigterm_to_the_launcher_stops_what_it_launched(tmp_path, group):
    """To its pid alone, of which the child would never hear, or to the whole group, so that the child hears twice."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "mage_tune/train.py"]
    launcher = start_long_run([*command, "recipes/debug.yaml"], out)
    try:
        (os.killpg if group else os.kill)(launcher.pid, signal.SIGTERM)
        launcher.wait(timeout=60)
        _, stderr = launcher.communicate(timeout=60)  # returns when the child, too, has closed it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert "stopping: finishing this step and saving a checkpoint" in stderr
    assert f"the same command goes on from {last_checkpoint(out / 'checkpoints')}" in stderr


def start_long_run(command: list[str], out: Path) -> subprocess.Popen[str]:
    """Start a run that would take hours, in a process group of its own, and wait for its first step."""
    overrides = ["train.steps=100000", "data.workers=2", f"output={out}", "data.length=64"]
    overrides += ["objective.sparse_distillation.budget=16"]
    command = [*command, *(part for override in overrides for part in ("--set", override))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return run


def test_sigterm_to_the_command_and_its_workers(tmp_path):
    """The whole process group gets it, as from a batch system; nothing but the message is said."""
    out = tmp_path / "run"
    run = start_long_run([sys.executable, "-m", "mage_tune.cli", "train", "recipes/debug.yaml"], out)
    try:
        os.killpg(run.pid, signal.SIGTERM)
        _, stderr = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 128 + signal.SIGTERM, stderr
    assert "Traceback" not in stderr
    assert f"the same command goes on from {last_checkpoint(out / 'checkpoints')}" in stderr


# --- numbers ---------------------------------------------------------------------------------------------------------


def poisoned_at(step: int, poison: float, gradient_only: bool = False):
    """cross_entropy_sum whose value, or only gradient, is spoilt at its `step`-th call."""
    calls = iter(range(1, 100))

    def spoilt(*args) -> Tensor:
        value = cross_entropy_sum(*args)
        if next(calls) != step:
            return value
        return value + (value - value.detach()) * poison if gradient_only else value * poison

    return spoilt


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient_only", [False, True])
def test_what_is_no_number_stops_with_step_rows_and_sources(recipe, monkeypatch, poison, gradient_only):
    if gradient_only:
        monkeypatch.setattr(stream_loss_module, "cross_entropy_sum", lambda *args: _nan_gradient(args, poison))
    else:
        monkeypatch.setattr(stream_loss_module, "cross_entropy_sum", poisoned_at(5, poison))
    with pytest.raises(NonFiniteError) as caught:
        train(recipe(rows=2, accumulation=2))
    line, code = describe_error(caught.value)
    assert code == 2
    folder = Path(recipe().output)
    if gradient_only:
        assert line.startswith("step 1: the gradient norm is ")
        assert [f"{row} (text " in line for row in range(5)] == [True] * 4 + [False]
        assert "nothing of this step was saved, there is no checkpoint yet; lower train.learning_rate, or " in line
    else:
        assert line.startswith(f"step 3: diffusion is {poison} on rows 8 (text ")
        assert re.search(r"one.npy, tokens \d+ to \d+\), 9 \(text", line)
        assert "two.npy, tokens " in line
        assert f"of this step was saved, the last checkpoint is {folder}/checkpoints/checkpoint-2; lower" in line
        assert_first_row_is_shown(line)
        assert names(folder / "checkpoints") == {"checkpoint-2"}
    assert not (folder / ADAPTER_FILE).exists()


def assert_first_row_is_shown(line: str) -> None:
    """Where the message places row 8, its file has the tokens that the message shows (there is no tokenizer)."""
    path, start = re.search(r"rows 8 \(text (\S+), tokens (\d+) to ", line).groups()
    shown = re.search(r"\(row 8 begins '([\d ]+)'\)$", line)[1]
    assert shown == " ".join(map(str, np.load(path)[int(start) :][:24]))


def _nan_gradient(args: tuple, poison: float) -> Tensor:
    value = cross_entropy_sum(*args)
    value.register_hook(lambda gradient: gradient * poison)
    return value


def test_an_adapter_that_is_not_finite_is_in_no_checkpoint(recipe, monkeypatch):
    step = MageTrainer._get_grad_norm

    def overflow_after(self, model, **kwargs):
        norm = step(self, model, **kwargs)
        if self.state.global_step == 1:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))
        return norm

    monkeypatch.setattr(MageTrainer, "_get_grad_norm", overflow_after)
    with pytest.raises(NonFiniteError, match=r"lora_.*not finite; the adapter is not saved"):
        train(recipe())
    assert names(Path(recipe().output) / "checkpoints") == {"checkpoint-1"}


def test_spikes_are_told_from_noise_and_slow_change():
    rng = np.random.default_rng(0)
    guard = SpikeGuard("loss", factor=2.0)
    calm = [10 * 0.97**i + rng.normal(scale=0.3) for i in range(60)]
    assert [guard.check(value) for value in calm] == [None] * 60
    usual = float(np.median(calm[-30:]))
    assert guard.check(3 * usual) == f"loss {3 * usual:.3g}, 3.0 times the median of the last steps ({usual:.3g})"
    assert guard.check(1.2 * usual) is None
    wild = SpikeGuard("gradient norm", factor=2.0)
    assert not any(wild.check(value) for value in rng.uniform(1, 4, size=200)), "a series that varies so much"


def test_a_spike_in_a_run_is_warned_about_once(recipe, monkeypatch, capsys):
    monkeypatch.setattr(stream_loss_module, "cross_entropy_sum", poisoned_at(13, 40.0))
    train(recipe(steps=14, save_every=14, learning_rate=1e-6))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: step 13: loss ") == said.count("warning: step 13: gradient norm ") == 1
    assert said.count("warning: step") == 2
    assert "times the median of the last steps" in said
    assert "on rows 12 (text" in said
    assert "lower train.learning_rate" in said
