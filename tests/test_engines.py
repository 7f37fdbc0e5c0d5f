"""Many processes: the same run on one and on two, whatever engine splits it, and one adapter in the end."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from ruamel.yaml import YAML
from safetensors.torch import load_file

from mage_tune.cli import main
from mage_tune.engines import ENGINES, config_file
from mage_tune.launcher import micro_steps_per_process
from mage_tune.recipe import load_recipe
from mage_tune.run import check_engine, take_own_gpu, train, training_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "debug.yaml"
CHANGES = [
    "data.length=64",
    "objective.sparse_distillation.budget=16",
    "train.rows=1",
    "train.accumulation=2",
    "train.steps=4",
    "train.save_every=2",
]
TERMS = (
    "loss",
    "diffusion",
    "query_alignment",
    "attention_alignment",
    "sparse_distillation",
    "sparse_share",
    "grad_norm",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="processes of a CPU; .gpu runs them on GPUs"),
]


TRIED = [name for name in ENGINES if not name.startswith("zero") or find_spec("deepspeed")]
FUSED = {
    "fsdp2 fused": "train.kernels=fused",
    "fsdp2 fused, recomputed": "train.kernels=fused train.checkpointing=non_reentrant",
    "zero2 fused": "train.kernels=fused",
}
"""Launches with fused layers, which read weights themselves: engine and name, and what they change."""
LAUNCHES = dict.fromkeys(TRIED, "") | {name: sets for name, sets in FUSED.items() if name.split()[0] in TRIED}


def launch(runs: list[tuple[str, int, Path, str]]) -> None:
    """The documented launches, all of them in one driver: engine, processes, run folder and further changes of each."""
    launches = [
        [
            *("--config_file", str(config_file(engine)), "--num_processes", str(processes)),
            *(str(ROOT / "mage_tune" / "train.py"), "train", str(RECIPE)),
            *(part for change in (f"output={folder}", *CHANGES, *changes.split()) for part in ("--set", change)),
        ]
        for engine, processes, folder, changes in runs
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    driver = [sys.executable, str(ROOT / "tests" / "engine_driver.py")]
    given = {"input": json.dumps(launches), "env": environment, "timeout": 400}
    done = subprocess.run(driver, **given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"code"')]  # DeepSpeed talks too
    for run, found in zip(runs, ends, strict=True):
        assert found["code"] == 0, f"{run}: {found['out'][-3000:]}"
        assert found["out"].count("adapter of RANDOM WEIGHTS written to") == 1, run


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[str, Path]:
    """Launch -> the run folder of two processes with it."""
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) / "run" for name in LAUNCHES}
    launch([(name.split()[0], 2, folder, LAUNCHES[name]) for name, folder in folders.items()])
    return folders


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Every logged step and the adapter, up to the order of sums."""
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    for ours, theirs in zip(lines(folder), lines(reference), strict=True):
        for name in TERMS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (name, ours["step"])
    found, expected = (load_file(f / "adapter_model.safetensors") for f in (folder, reference))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return train(load_recipe(RECIPE, [*CHANGES, f"output={folder}"]))


@pytest.fixture
def together(launched) -> Path:
    """The run on two processes with DDP."""
    return launched["ddp"]


def test_two_processes_are_the_same_run_as_one(alone, together):
    assert_same_run(together, alone)
    assert lines(together)[0]["tokens_per_s"] > 0
    assert len(list((together / "checkpoints" / "checkpoint-2").glob("rng_state_*.pth"))) == 2


RESUMED = [("ddp", 2, 1), ("ddp", 1, 2), ("fsdp2", 2, 1), ("fsdp2", 1, 2)]
"""Engine, and the processes that a run is begun and finished with."""


@pytest.fixture(scope="module")
def resumed(alone, launched, tmp_path_factory) -> dict[tuple[str, int, int], Path]:
    """One of `RESUMED` -> the run folder."""
    one = tmp_path_factory.mktemp("one") / "run"  # FSDP2 with one process
    launch([("fsdp2", 1, one, "")])
    begun = {("ddp", 2): launched["ddp"], ("ddp", 1): alone, ("fsdp2", 2): launched["fsdp2"], ("fsdp2", 1): one}
    folders = {case: tmp_path_factory.mktemp("resumed") / "run" for case in RESUMED}
    for (engine, before, _), folder in folders.items():
        shutil.copytree(begun[engine, before], folder)
        shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
        for file in folder.glob("adapter*"):
            file.unlink()
    launch([(engine, after, folder, "") for (engine, _, after), folder in folders.items()])
    return folders


@pytest.mark.parametrize(("engine", "before", "after"), RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(resumed, alone, engine, before, after):
    folder = resumed[engine, before, after]
    assert_same_run(folder, alone)
    written = [(folder / "checkpoints" / f"checkpoint-{step}") for step in (2, 4)]
    assert [len(list(checkpoint.glob("rng_state*.pth"))) for checkpoint in written] == [before, after]
    assert [(checkpoint / "optimizer.bin").exists() for checkpoint in written] == [engine == "fsdp2"] * 2


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "ddp"])
def test_an_engine_that_splits_the_model_is_the_same_run(engine, alone, launched):
    if engine not in TRIED:
        pytest.skip("needs deepspeed")
    assert_same_run(launched[engine], alone)
    written = {file.name for file in (launched[engine] / "checkpoints" / "checkpoint-2").iterdir()}
    assert ("optimizer.bin" if engine == "fsdp2" else "latest") in written  # the engine was really at work
    assert "adapter_model.safetensors" in written


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_on_two_processes_are_the_same_run_as_plain_ones_on_one(name, alone, launched):
    if name not in LAUNCHES:
        pytest.skip("needs deepspeed")
    assert_same_run(launched[name], alone)


# --- which GPU --------------------------------------------------------------------------------------------------------


def test_every_process_loads_on_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    take_own_gpu()
    for rank in ("0", "1", "3"):  # as accelerate does: modulo the GPUs that are there
        monkeypatch.setenv("LOCAL_RANK", rank)
        take_own_gpu()
    assert chosen == [0, 0, 1, 1]


def test_one_process_trains_on_one_of_the_gpus_that_it_sees(monkeypatch):
    monkeypatch.setattr("mage_tune.run.TrainingArguments", lambda **given: SimpleNamespace(n_gpu=4, _n_gpu=4))
    assert training_arguments(load_recipe(RECIPE), Path())._n_gpu == 1


# --- what is refused -------------------------------------------------------------------------------------------------


def test_micro_steps_are_shared_out_or_the_run_refused(monkeypatch):
    settings = load_recipe(RECIPE, ["train.accumulation=6"]).train
    assert micro_steps_per_process(settings) == 6
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert micro_steps_per_process(settings) == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ValueError, match=r"train.accumulation: 6 .* evenly by 4 processes; use --set train.accumulation=8 "
    ):
        micro_steps_per_process(settings)


def test_an_engine_that_is_not_at_work_is_told(monkeypatch):
    check_engine(DistributedType.MULTI_CPU, 2, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(DistributedType.FSDP, 2, None)
    with pytest.raises(ValueError, match=r"asks for FSDP, which accelerate runs on GPUs only; use ddp"):
        check_engine(DistributedType.MULTI_CPU, 2, None)


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    (tmp_path / "optimizer.pt").touch()
    check_engine(DistributedType.NO, 1, str(tmp_path))
    check_engine(DistributedType.MULTI_GPU, 2, str(tmp_path))
    with pytest.raises(ValueError, match=r"written by a single process or DDP, and this run is launched with FSDP"):
        check_engine(DistributedType.FSDP, 2, str(tmp_path))
    (tmp_path / "latest").touch()
    for rank in range(4):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    check_engine(DistributedType.DEEPSPEED, 4, str(tmp_path))
    with pytest.raises(ValueError, match=r"by 4 processes, and DeepSpeed goes on with as many only, not 2"):
        check_engine(DistributedType.DEEPSPEED, 2, str(tmp_path))
    with pytest.raises(ValueError, match=r"written by DEEPSPEED, and this run is launched with MULTI_GPU"):
        check_engine(DistributedType.MULTI_GPU, 2, str(tmp_path))


# --- the configs -----------------------------------------------------------------------------------------------------


def test_engines_are_chosen_by_name(capsys):
    for name in ENGINES:
        with pytest.raises(SystemExit) as done:
            main(["engine", name])
        assert done.value.code == 0
        file = Path(capsys.readouterr().out.strip())
        config = YAML(typ="safe").load(file)
        assert config["compute_environment"] == "LOCAL_MACHINE"
        assert "num_processes" not in config  # the launch says
    with pytest.raises(SystemExit) as done:
        main(["engine", "zero4"])
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: zero4: no such engine; known are ddp, fsdp2, zero2, zero3\n"
