"""The three ways to start a run do the same: by path from any folder, as a module, and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mage_tune.cli import main

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "debug.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
QUICK = ["--set", "train.steps=2", "--set", "data.length=64", "--set", "objective.sparse_distillation.budget=16"]


def start(command: list[str], cwd: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a newcomer would: no accelerate config, nothing but the documented arguments."""
    environment = os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s", "peak_gib")} for line in lines]


def adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's record of the adapter; it keeps module names in a set, whose order is another in every process."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config | {"target_modules": sorted(config["target_modules"])}


@pytest.mark.slow
def test_every_form_gives_the_same_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    forms = {
        "path": ([*LAUNCH, str(ROOT / "mage_tune" / "train.py")], tmp_path),
        "module": ([*LAUNCH, "-m", "mage_tune.train"], ROOT),
    }
    for name, (command, cwd) in forms.items():
        folder = tmp_path / name
        done = start([*command, str(RECIPE), *QUICK, "--set", f"output={folder}"], cwd, tmp_path / "home")
        assert done.returncode == 0, f"{name}:\n{done.stderr[-3000:]}"
        assert f"adapter of RANDOM WEIGHTS written to {folder}" in done.stdout
        assert "gemm_4bit" not in done.stdout + done.stderr  # bitsandbytes, on CPUs with bfloat16
    # The command needs no launcher, so not a process of its own either.
    with pytest.raises(SystemExit) as ended:
        main(["train", str(RECIPE), *QUICK, "--set", f"output={tmp_path / 'command'}"])
    assert not ended.value.code
    assert f"adapter of RANDOM WEIGHTS written to {tmp_path / 'command'}" in capfd.readouterr().out

    one = tmp_path / "path"
    assert len(metrics(one)) == 2
    assert {"diffusion", "query_alignment", "attention_alignment", "sparse_distillation"} <= metrics(one)[0].keys()
    for name in ("module", "command"):
        other = tmp_path / name
        weights = [folder / "adapter_model.safetensors" for folder in (one, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert adapter_config(one) == adapter_config(other)
        assert metrics(one) == metrics(other)


@pytest.mark.slow
def test_a_launched_error_is_one_line(tmp_path: Path) -> None:
    command = [*LAUNCH, str(ROOT / "mage_tune" / "train.py"), str(RECIPE), "--set", "train.lr=1"]
    done = start(command, tmp_path, tmp_path)
    assert done.returncode != 0
    assert "error: --set train.lr=1: key 'train.lr': unknown key; did you mean 'train.learning_rate'?" in done.stderr
    assert "mage_tune/recipe.py" not in done.stderr  # (accelerate adds a traceback of its own)


def test_path_guard_keeps_the_inside_of_the_package_off_sys_path(tmp_path: Path) -> None:
    """Otherwise a module of ours would win over a library of that name."""
    code = (
        "import runpy, sys\n"
        f"inside = {str(ROOT / 'mage_tune')!r}\n"
        "sys.path.insert(0, inside)\n"
        "sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'mage_tune' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as done: assert not done.code\n"
        "assert inside not in sys.path and sys.path[0] == str(__import__('pathlib').Path(inside).parent)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: mage-tune train" in done.stdout
