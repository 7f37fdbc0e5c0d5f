"""The training benchmark on toy shapes: its cases through the real trainer, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "model", "length", "rows", "streams", "tokens_per_step", "terms", "adapter", "quantised", "engine", "gpus",
    "step_s", "tokens_per_s", "mfu", "peak_gib", "predicted_gib", "baseline",
}  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="toy shapes are for a CPU")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "scripts" / "bench_training.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(bench, out: Path, *names: str, steps: int = 1) -> dict:
    command = ["--tiny", "--out", str(out), "--steps", str(steps), "--commit", "abc", "--only", *names]
    assert bench.main(command) == 0
    return json.loads(out.read_text())


def test_a_case_goes_through_the_trainer_and_is_not_run_again(bench, tmp_path, capsys):
    out = tmp_path / "training.json"
    result = run(bench, out, "7b-fused", steps=2)
    assert {"device", "versions", "commit", "command"} <= result.keys() and result["commit"] == "abc"
    (row,) = result["rows"]
    assert row.keys() >= COLUMNS
    assert (row["model"], row["length"], row["rows"]) == ("7b", 256, 1)
    assert row["terms"] == ["diffusion", "query_alignment", "attention_alignment", "sparse_distillation"]
    assert row["tokens_per_step"] == 2 * 256 and row["steps_timed"] == 2
    assert row["tokens_per_s"] == pytest.approx(row["tokens_per_step"] / row["step_s"])
    assert row["loss"] > 1  # it did train
    assert sum(row["profile"]["ms"].values()) > 0
    assert "RANDOM WEIGHTS" in capsys.readouterr().out
    before = row["step_s"]
    (row,) = run(bench, out, "7b-fused", steps=2)["rows"]
    assert row["step_s"] == before


def test_baselines_are_the_same_step(bench, tmp_path, monkeypatch):
    """Loss of dense masks and full logits, to rounding; and ours beside it at the same length."""
    short = [
        bench.Case(
            f"b-{kind}",
            "7b",
            {"train.accumulation": 1} | bench.NO_STUDENT,
            baseline=kind,
            lengths=(2048,),
            steps=1,
            warmup=1,
        )
        for kind in bench.BASELINES
    ]
    monkeypatch.setattr(bench, "all_cases", lambda: short)
    rows = run(bench, tmp_path / "training.json", *(case.name for case in short))["rows"]
    for row in rows:
        assert row["baseline"] in bench.BASELINES and row["ours"]["baseline"] is None
        assert row["loss"] == pytest.approx(row["ours"]["loss"], rel=1e-4)
        assert row["times_faster"] == pytest.approx(row["step_s"] / row["ours"]["step_s"])


def test_a_failing_case_is_written_down_and_costs_no_other(bench, tmp_path, monkeypatch):
    cases = [
        bench.Case("bad", "7b", {"adapter.rank": -1}),
        bench.Case("good", "7b", {"train.accumulation": 1}, warmup=1),
    ]
    monkeypatch.setattr(bench, "all_cases", lambda: cases)
    out = tmp_path / "training.json"
    assert bench.main(["--tiny", "--out", str(out), "--steps", "1"]) == 1
    bad, good = json.loads(out.read_text())["rows"]
    assert "adapter.rank" in bad["error"] and good["step_s"] > 0


def test_out_of_memory_moves_on_to_a_shorter_length_and_then_to_recomputing(bench, tmp_path, monkeypatch):
    time_case = bench.time_case

    def limited(case, length, tiny, folder):
        if length > 1024 or case.changes.get("train.checkpointing") == "off":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return time_case(case, length, tiny, folder)

    monkeypatch.setattr(bench, "time_case", limited)
    changes = {"train.accumulation": 1} | bench.NO_STUDENT
    case = bench.Case("long", "7b", changes, steps=1, warmup=1, baseline="dense_sdpa", lengths=(4096, 1024))
    row = bench.measure(case, True, tmp_path)
    ours = row["ours"]
    assert row["length"] == ours["length"] == 1024 // 16 and ours["checkpointing"] == "mlp"
    assert "length 4096" in row["did_not_fit"][0] and "checkpointing off" in ours["did_not_fit"][0]


def test_what_cannot_fit_by_count_is_not_tried(bench, tmp_path):
    cases = {case.name: case for case in bench.all_cases()}

    def why(name, length, card=79.1, **changes):
        case = replace(cases[name], changes=cases[name].changes | changes)
        return bench.why_hopeless(case, length, False, tmp_path, card)

    for name in ("7b-dense_sdpa", "1.5b-dense_sdpa"):  # 3 streams x 16K tokens x 152K logits x 12 bytes
        assert "every logit needs 83" in why(name, 16384) and why(name, 8192) is None
    assert "the plan" in why("7b-fused", 16384) and why("7b-fused", 4096) is None
    assert why("7b-fused", 4096, card=40.0) is not None
    assert why("7b-fused", 4096, **{"adapter.rank": -1}) is None, "the try says what is wrong"


def test_a_try_in_a_process_of_its_own_gives_the_same_row_or_says_what_went_wrong(bench, tmp_path, monkeypatch):
    case = bench.Case("one", "7b", {"train.accumulation": 1}, steps=1, warmup=1)
    alone, here = (run(case, 1024, True, tmp_path) for run in (bench.attempt_alone, bench.attempt))
    assert alone.keys() == here.keys() and alone["loss"] == pytest.approx(here["loss"])
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "none.py"))
    assert "ended with code 2" in bench.attempt_alone(case, 1024, True, tmp_path)["error"]


def test_every_case_is_a_recipe(bench, tmp_path):
    for case in bench.all_cases():
        recipe = bench.case_recipe(case, None, False, tmp_path / "ids.npy")
        assert recipe.model.random_weights is not None
        assert recipe.train.steps == case.warmup + case.steps


def test_cases_differ_in_their_students(bench, tmp_path):
    cases = {case.name: case for case in bench.all_cases()}
    found = {
        name: bench.Estimate(recipe, *bench.read_model(recipe)).stream_names
        for name in ("7b-fused", "7b-no-student", "7b-whole-student")
        for recipe in [bench.case_recipe(cases[name], None, False, tmp_path / "ids.npy")]
    }
    assert found == {
        "7b-fused": "sparse (25%) + all-mask + noisy + clean",
        "7b-no-student": "all-mask + noisy + clean",
        "7b-whole-student": "sparse + all-mask + noisy + clean",
    }


class FakeProfile:
    """Of a GPU: a compiled kernel launched by an operator, and the span that torch.compile marks around it."""

    def events(self):
        gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
        kernel = SimpleNamespace(name="triton_poi_fused_0", duration=2000.0)
        return [
            SimpleNamespace(name="launch", device_type=cpu, input_shapes=[[8, 8]], kernels=[kernel]),
            SimpleNamespace(name="triton_poi_fused_0", device_type=gpu, device_time=2000.0),
            SimpleNamespace(name="## Call CompiledFxGraph f6u ##", device_type=gpu, device_time=2000.0),
        ]


def test_spans_of_compiled_graphs_are_not_counted_beside_their_kernels(bench):
    parts, kernels = bench.split(FakeProfile(), 32, 152064, True)
    assert parts == {"glue": 2.0} and kernels == {"triton_poi_fused_0": 2.0}


@pytest.mark.parametrize(
    ("kernel", "shapes", "part"),
    [
        ("nvjet_tst_128x256", [[12288, 3584], [3584, 18944]], "linear layers"),
        ("nvjet_tst_64x8", [[12288, 3584], [3584, 32]], "LoRA"),
        ("nvjet_tst_128x256", [[4096, 3584], [3584, 152064]], "loss"),
        ("triton_tem_fused_flex_attention_0", None, "attention forward"),
        ("triton_tem_fused_flex_attention_backward_1", None, "attention backward"),
        ("void at::native::vectorized_elementwise_kernel", [[12288, 3584]], "glue"),
        ("Memcpy DtoH (Device -> Pinned)", None, "copies between host and device"),
    ],
)
def test_kernels_are_told_apart(bench, kernel, shapes, part):
    assert bench.part_of(kernel, shapes, 32, 152064) == part
