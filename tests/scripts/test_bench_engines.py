"""The benchmark of several GPUs: two processes of a CPU through the real command, failures, and what is compared."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "model", "length", "rows", "streams", "tokens_per_step", "terms", "adapter", "quantised", "engine", "gpus",
    "step_s", "tokens_per_s", "mfu", "peak_gib", "predicted_gib", "baseline",
}  # fmt: skip


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return loaded("bench_engines")


def run(bench, folder: Path, *names: str, steps: int = 2, more: tuple[str, ...] = ()) -> dict:
    """Cases of their own command; its record."""
    out = folder / f"{'-'.join(names)}.json"
    command = ["--tiny", "--out", str(out), "--logs", str(folder / "logs"), "--commit", "abc", "--only", *names]
    code = bench.main([*command, "--steps", str(steps), "--warmup", "1", *more])
    record = json.loads(out.read_text())
    assert code == any("error" in row for row in record["rows"])
    return record


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="toy shapes are for a CPU")
def test_two_processes_are_measured_beside_one_and_joined(bench, tmp_path):
    with ThreadPoolExecutor() as both:  # at the same time: their ports are not the same one
        parts = list(both.map(lambda name: run(bench, tmp_path, name), ("ddp-1", "ddp-2")))
    for part, name in zip(parts, ("ddp-1", "ddp-2"), strict=True):
        assert "error" not in part["rows"][0], (tmp_path / "logs" / f"{name}.log").read_text()[-3000:]
    assert parts[1]["rows"][0]["speedup"] is None  # nothing to hold it against yet

    out = tmp_path / "engines.json"
    assert bench.main(["--out", str(out), "--join", str(tmp_path / "ddp-2.json"), str(tmp_path / "ddp-1.json")]) == 0
    record = json.loads(out.read_text())
    assert record.keys() >= {"model", "tokens_per_step", "length", "device", "versions", "commit", "command"}
    assert record["commit"] == "abc" and record["tokens_per_step"] == 2 * 256
    one, two = record["rows"]
    assert [(row["case"], row["engine"], row["gpus"]) for row in (one, two)] == [
        ("ddp-1", "one process", 1),
        ("ddp-2", "ddp", 2),
    ]
    assert one.keys() >= COLUMNS and two["streams"] == one["streams"] > 3 and len(two["terms"]) == 4
    assert len(two["losses"]) == len(two["grad_norms"]) == 3 and two["steps_timed"] == 2
    assert two["largest_loss_difference"] < 1e-5 and one["largest_loss_difference"] is None
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
    assert two["speedup"] == pytest.approx(one["step_s"] / two["step_s"])
    assert two["tokens_per_s"] == pytest.approx(512 / two["step_s"])

    table = loaded("fill_tables").engines_table(str(out)).splitlines()
    assert table[2].startswith("| one process | 1 | fused | ") and table[2].endswith("| 1.00x |  |  |")
    assert table[3].startswith("| ddp | 2 | fused | ") and "2 steps" in table[-1] and "commit abc." in table[-1]


def test_a_case_that_fails_or_hangs_is_written_down_and_leaves_no_process(bench, tmp_path, monkeypatch):
    started = tmp_path / "started"
    worker = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    programs = {
        "ddp-1": "print('step 1/3'); raise MemoryError('out of it')",
        "ddp-2": "import subprocess, sys; print('loading', flush=True); "  # a worker in a session of its own
        f"subprocess.run([sys.executable, '-c', {worker!r}], start_new_session=True)",
    }
    monkeypatch.setattr(bench, "launch_command", lambda launch, file: [sys.executable, "-c", programs[launch.name]])
    failed, hung = run(bench, tmp_path, "ddp-1", "ddp-2", more=("--timeout", "2"))["rows"]
    assert failed["error"] == "exit code 1, 0 of 3 steps logged: MemoryError: out of it"
    assert hung["error"] == "still running after 2 s, 0 of 3 steps logged: loading"
    with suppress(psutil.NoSuchProcess):
        assert bench.has_ended(psutil.Process(int(started.read_text())))
    assert "step 1/3" in (tmp_path / "logs" / "ddp-1.log").read_text()


def test_what_fails_after_the_last_step_costs_no_measurement(bench, tmp_path, monkeypatch):
    """A checkpoint that cannot be written, say."""
    monkeypatch.setattr(
        bench,
        "launch_command",
        lambda launch, file: [sys.executable, "-c", PROGRAM, str(file.parent / "run")],
    )
    (row,) = run(bench, tmp_path, "ddp-1", steps=3)["rows"]
    assert row["step_s"] == 2.0 and row["peak_gib"] == 5.0
    assert row["failed_later"] == "exit code 1: OSError: full"


PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
lines = [dict(step=i, step_s=s, loss=1.0, grad_norm=1.0, peak_gib=p) for i, s, p in [(1, 9, 4), (2, 1, 5), (3, 2, 5), (4, 3, 5)]]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
raise OSError("full")
"""  # noqa: E501


def test_rows_are_held_against_one_gpu_whatever_order_they_came_in(bench):
    def row(case, gpus, kernels, step_s, losses):
        return {"case": case, "gpus": gpus, "kernels": kernels, "step_s": step_s, "losses": losses}

    fused, plain = row("ddp-1", 1, "fused", 8.0, [2.0, 4.0, 1.0]), row("ddp-1-plain", 1, "plain", 16.0, [2.0, 4.0])
    zero3, failed = row("zero3-2", 2, "plain", 10.0, [2.0, 4.4]), {"case": "ddp-4", "error": "out of memory"}
    found = bench.compare([zero3, plain, failed, fused])
    assert [one["case"] for one in found] == ["ddp-1", "ddp-4", "ddp-1-plain", "zero3-2"]
    assert zero3["speedup"] == 1.6 and zero3["largest_loss_difference"] == pytest.approx(0.1)
    assert plain["speedup"] == 1.0 and plain["largest_loss_difference"] == 0.0
    alone = row("fsdp2-2", 2, "fused", 4.0, [2.0])
    assert bench.compare([alone])[0]["speedup"] is None


def test_parts_of_other_measurements_are_not_joined(bench, tmp_path, capsys):
    about = {"model": "m", "tokens_per_step": 1, "length": 1, "device": "H100", "command": "c", "commit": "a"}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, device in zip(files, ("H100", "H200"), strict=True):
        file.write_text(json.dumps(about | {"device": device, "rows": []}))
    assert bench.main(["--out", str(tmp_path / "c.json"), "--join", *map(str, files)]) == 2
    assert capsys.readouterr().err == f"error: {files[1]}: device is H200, and H100 in {files[0]}\n"
    assert bench.main(["--only", "ddp-3"]) == 2


def test_every_case_is_the_same_training(bench, tmp_path, monkeypatch):
    for launch in bench.LAUNCHES.values():
        recipe = bench.launch_recipe(launch, 10, 2, False, tmp_path / "ids.npy")
        assert recipe.train.rows * recipe.train.accumulation * recipe.data.length == 65536
        assert recipe.train.steps == recipe.train.save_every == 12 and recipe.train.accumulation % launch.gpus == 0
        assert (recipe.train.kernels == "plain") >= (launch.engine == "zero3")
        assert recipe.model.random_weights is not None and recipe.model.random_weights.hidden_size == 3584
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,5")
    assert bench.launch_environment(bench.LAUNCHES["ddp-2"], False)["CUDA_VISIBLE_DEVICES"] == "4,7"
    with pytest.raises(ValueError, match="needs 4 GPUs, and 3 can be seen"):
        bench.launch_environment(bench.LAUNCHES["ddp-4"], False)
