"""`mage-tune bench`: floors by hand, the order of cases, rows, table, plots and files; on a tiny shape on the CPU."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mage_tune.bench import run
from mage_tune.bench.cases import RULES, Case, all_cases, uneven_mage
from mage_tune.bench.checks import Check
from mage_tune.bench.floor import Ceilings, Load, Roofline
from mage_tune.bench.report import draw_plots, print_table, row_label, strongest_exact
from mage_tune.bench.run import Options, bench
from mage_tune.cli import main
from mage_tune.decode.engine.weights import QWEN_1_5B, QWEN_7B
from mage_tune.families.fast_dllm_v2 import FAST_DLLM_V2
from mage_tune.families.sdar import SDAR

TINY = replace(
    QWEN_1_5B, name="tiny", num_layers=3, hidden=32, intermediate=32, num_heads=4, num_kv_heads=2, head_dim=8, vocab=99
)
COLUMNS = {"model", "context", "batch", "steps", "rule", "exact_kernel", "dense_layers", "budget", "graph", "block_ms"}
COLUMNS |= {"exact_ms", "sparse_ms", "commit_ms", "select_ms", "floor_ms", "peak_gib"}
PASSED = (Check("it holds", 0.0, 1.0),)


# --- floors ---


@pytest.mark.parametrize(
    ("shape", "context", "batch", "linear", "exact", "sparse"),
    [
        (QWEN_7B, 131072, 1, 4.22, 6.46, 4.23),
        (QWEN_7B, 131072, 8, 4.52, 22.47, 4.60),
        (QWEN_1_5B, 8192, 1, 0.92, 0.99, 0.93),
    ],
)
def test_floors_are_those_of_the_design(shape, context, batch, linear, exact, sparse):
    """kernels.md 4.1: 3.35 TB/s, 800 TFLOP/s, k = 512."""
    roofline = Roofline(shape, Ceilings(3.35e12, 800e12), batch, context, 32)
    assert roofline.linear_ms() == pytest.approx(linear, abs=0.01)
    assert roofline.exact_ms() == pytest.approx(exact, abs=0.02)
    assert roofline.step_ms(Load(0, 512)) == pytest.approx(sparse, abs=0.01)


def test_dense_layers_and_page_bounds_cost_what_they_read():
    roofline = Roofline(QWEN_7B, Ceilings(1e12, 1e18), 2, 4096, 32)  # bytes alone
    per_key = 2 * 4 * 128 * 2 * 2 / 1e12 * 1e3  # K and V, KV heads, D, bytes, batch; ms
    assert roofline.attention_ms(Load(28)) == pytest.approx(28 * (4096 + 32) * per_key)
    assert roofline.attention_ms(Load(2, 512)) == pytest.approx((2 * 4096 + 26 * 512 + 28 * 32) * per_key)
    more = roofline.attention_ms(Load(2, 512, 4096 / 16)) - roofline.attention_ms(Load(2, 512))
    assert more == pytest.approx(26 * 256 * per_key)


# --- cases ---


def test_uneven_layers_keep_as_many_keys_in_all():
    rule = uneven_mage(512, 2)
    keys = rule.keys_by_layer(30, 4096)
    assert len(set(keys)) > 5
    assert sum(keys) == 28 * 512


def test_what_matters_comes_first():
    cases = all_cases(["7B", "1.5B"], [8192, 131072], [1, 4, 8], [8, 32], list(RULES), 512)
    assert len(cases) == len(set(cases))
    first = cases[: len(cases) // 4]
    assert {(case.context, case.steps) for case in first[:20]} == {(131072, 32)}
    assert {case.rule for case in cases[:16]} == set(RULES)
    assert {case.exact_kernel for case in cases[:4]} == {"ours", "flashinfer-auto", "flashinfer-fa2", "sdpa"}
    mage = [case for case in cases if case.rule == "mage" and case.group == ("7B", 8, 131072)]
    assert {(case.steps, case.dense_layers, case.is_graph, case.fuses) for case in mage} == {
        (32, 0, True, False),
        (32, 0, True, True),
        (32, 2, True, False),
        (32, 0, False, False),
        (8, 0, True, False),
        (8, 0, True, True),
        (None, 0, True, False),
        (None, 0, True, True),
    }
    assert {case.batch for case in cases} == {1, 4, 8}


def test_options_are_checked():
    common = dict(models=["7B"], contexts=[64], batches=[1], steps=[8])
    with pytest.raises(ValueError, match="unknown rule 'snap'"):
        Options(**common, rules=["snap"])
    with pytest.raises(ValueError, match="must be positive"):
        Options(**common | {"contexts": [0]}, rules=["exact"])


# --- the command ---


@pytest.fixture
def tiny_bench(monkeypatch, tmp_path):
    """tiny_bench(**options) -> (result, printed text); the checks, which have their own test, pass."""

    seeded = FAST_DLLM_V2.with_overrides(mask_id=98, stop_ids=(1,), pad_id=0)

    def go(checks=PASSED, family=seeded, **options):
        monkeypatch.setattr(run, "FAMILIES", dict.fromkeys(("fast_dllm_v2", "sdar"), family))
        monkeypatch.setitem(run.SHAPES, "tiny", TINY)
        monkeypatch.setattr(run, "check_engine", lambda device, dtype: list(checks))
        text = io.StringIO()
        given = dict(models=["tiny"], contexts=[128, 96], batches=[2], steps=[4], rules=["exact", "mage"], budget=64)
        given |= dict(seconds=600.0, out=tmp_path / "sub" / "decode.json", command="mage-tune bench")
        return bench(Options(**given | options), Console(file=text, width=220)), text.getvalue()

    return go


def test_rows_table_plots_and_profile(tiny_bench, tmp_path):
    files = dict(plots=tmp_path / "plots", profile=tmp_path / "profile.json")
    result, text = tiny_bench(**files, rules=["exact", "mage", "quest"])
    written = json.loads((tmp_path / "sub" / "decode.json").read_text())
    assert written == result
    assert list(written)[:4] == ["device", "commit", "command", "versions"] and written["command"] == "mage-tune bench"
    rows = written["rows"]
    assert all(set(row) >= COLUMNS for row in rows)
    assert {(row["context"], row["batch"]) for row in rows} == {(128, 2), (96, 2)}
    for row in rows:
        assert row["block_ms"] > row["floor_ms"] > 0
        assert (row["sparse_ms"] is None) == (row["rule"] == "exact")
        assert (row["select_ms"] is None) == (row["rule"] != "mage")
        assert row["steps"] == (4 if row["acceptance"] == "static" else row["steps"])
        assert row["exact_steps"] == {"exact": row["steps"], "mage": 1, "quest": 0}[row["rule"]]
    threshold = [row for row in rows if row["acceptance"] == "threshold"]
    assert {row["steps"] for row in threshold} == {31}, "random weights are never sure, and a seed is given"
    missing = {(left["exact_kernel"], left["why"]) for left in written["left_out"]}
    assert missing == {(name, f"exact kernel '{name}' needs a GPU") for name in ("flashinfer-auto", "flashinfer-fa2")}
    assert "random keys" in text and "against exact" in text
    assert len(list((tmp_path / "plots").glob("*.png"))) == 0, "plots show graphs, and there are none on a CPU"
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert set(profile["steps"]) == {"exact", "score", "select", "sparse", "commit"}
    for step in profile["steps"].values():
        assert step["kernels"] and step["busy_ms"] == pytest.approx(sum(kernel["ms"] for kernel in step["kernels"]))


def test_a_family_without_seeds_is_timed_with_fused_commits_too(tiny_bench):
    family = SDAR.with_overrides(block_size=32, mask_id=98, stop_ids=(1,), pad_id=0)
    result, text = tiny_bench(rules=["mage"], contexts=[96], batches=[1], family=family)
    fused = [row for row in result["rows"] if row["fused"]]
    assert [row["acceptance"] for row in fused] == ["static", "threshold"]
    for row in fused:
        apart = next(
            r for r in result["rows"] if not r["fused"] and not r["dense_layers"] and r["steps"] == row["steps"]
        )
        assert apart["fused_ms"] is None and row["fused_ms"] > 0
        assert row["floor_ms"] == pytest.approx(apart["floor_ms"] - apart["exact_floor_ms"])
        assert "fused commit" in row_label(row) and row_label(row) in text


def test_no_speed_without_correctness(tiny_bench, tmp_path):
    with pytest.raises(ValueError, match="no speed without correctness: it fails; neither this"):
        tiny_bench(checks=[Check("it fails", 2.0, 1.0), Check("neither this", float("nan"), 1.0)])
    assert not list(tmp_path.rglob("*.json"))


def test_a_kernel_that_is_wrong_is_left_out(tiny_bench, monkeypatch):
    wrong = []

    def check(name, device, dtype):
        wrong.append(name)
        return Check(f"{name}: logits", 2.0, 1.0)

    monkeypatch.setattr(run, "check_kernel", check)
    result, _ = tiny_bench(contexts=[128], rules=["exact"])
    assert {r["exact_kernel"] for r in result["rows"]} == {"ours"}
    assert len(wrong) == len(set(wrong)) == 3, "each is checked once"
    assert {left["why"] for left in result["left_out"]} == {f"{name}: logits: 2 is more than 1" for name in wrong}


def test_what_there_was_no_time_for_is_listed(tiny_bench):
    result, text = tiny_bench(seconds=-1.0)
    assert result["rows"] == [] and {left["why"] for left in result["left_out"]} == {"time is up"}
    assert "cases left out" in text


def test_a_checkpoint_can_be_timed(tiny_bench, tiny_backbone, converted_checkpoint):
    folder = converted_checkpoint(tiny_backbone("converted", block_size=8))
    result, _ = tiny_bench(models=[str(folder)], contexts=[64], batches=[1], steps=[4, 2], budget=16)
    assert {row["model"] for row in result["rows"]} == {folder.name}
    assert {row["steps"] for row in result["rows"] if row["acceptance"] == "static"} == {4, 2}
    with pytest.raises(ValueError, match="neither a folder nor a shape"):
        tiny_bench(models=["9B"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "8K"], "--contexts '8K': give whole numbers"),
        (["--rules", "exact,snap"], "unknown rule 'snap'"),
        (["--model", "9B"], "9B: neither a folder nor a shape"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_large_shapes_are_not_drawn_without_a_gpu():
    with pytest.raises(ValueError, match="7B: this machine has no GPU"):
        run._model("7B", torch.device("cpu"), torch.float32)


# --- the report ---


def row(rule="exact", kernel="ours", block=10.0, **more):
    base = dict(model="7B", context=131072, batch=1, steps=32, rule=rule, exact_kernel=kernel, dense_layers=0)
    base |= dict(budget=None, graph=True, block_ms=block, exact_ms=2.0, sparse_ms=1.0, commit_ms=2.0, select_ms=0.1)
    base |= dict(floor_ms=5.0, peak_gib=20.0, acceptance="static", exact_floor_ms=1.5, sparse_floor_ms=0.9)
    return base | more


def test_speed_ups_are_over_the_strongest_exact_kernel():
    rows = [row(), row(kernel="sdpa", block=8.0), row("mage", block=2.0), row("mage", block=4.0, context=8192)]
    assert [r["exact_kernel"] for r in strongest_exact(rows).values()] == ["sdpa"]
    text = io.StringIO()
    print_table(rows, Console(file=text, width=220))
    lines = {
        line.split("│")[5].strip(): line for line in text.getvalue().splitlines() if "│" in line and "128K" in line
    }
    assert "4.00x" in lines["mage"] and "1.00x" in lines["exact (sdpa)"] and "0.80x" in lines["exact (ours)"]
    assert "2.00 (5.00)" in lines["mage"]


def test_labels_name_what_differs():
    rows = [row(), row(kernel="sdpa"), row("mage"), row("mage", dense_layers=2), row("mage", graph=False)]
    assert len({row_label(r) for r in rows}) == len(rows)
    assert Case("7B", 64, 1, 8, "mage", dense_layers=2).label == row_label(row("mage", dense_layers=2))


def test_plots(tmp_path):
    rows = [row(context=c, kernel=k, block=b) for c in (8192, 131072) for k, b in (("ours", 9.0), ("sdpa", 10.0))]
    rows += [row("mage", context=c, block=3.0) for c in (8192, 131072)]
    files = draw_plots(rows, tmp_path)
    assert [file.name for file in files] == ["7B-b1-context.png", "7B-b1-speedup.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    alone = [row("mage", model="1.5B"), row("mage", graph=False), row("mage", acceptance="threshold")]
    assert draw_plots(alone, tmp_path) == [], "one context and no exact kernel: nothing to compare"
