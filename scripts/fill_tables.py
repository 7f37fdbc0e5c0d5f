"""Fill the tables of README and cards from results/*.json, so that no number in them is typed by hand.

    python scripts/fill_tables.py            # rewrite them
    python scripts/fill_tables.py --check    # exit code 1 when one is out of date (a test runs this)

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; the names are the keys of TABLES.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # tables that another script makes are imported from it where they are needed
FILES = (
    "README.md",
    "docs/objectives.md",
    "docs/selection.md",
    "docs/evaluation.md",
    "docs/training.md",
    "docs/scaling.md",
    "docs/performance.md",
    "adapters/smollm2-135m-diffusion/README.md",
)


def interval(estimate: dict[str, Any], signed: bool = False) -> str:
    """`0.808 (0.799 to 0.817)`."""
    mean, low, high = (f"{estimate[key]:{'+' if signed else ''}.3f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def conditions(record: dict[str, Any], units: str) -> str:
    """Device, precision, versions and sizes of a measurement, in one sentence."""
    settings, made_with = record["evaluation"]["settings"], record["evaluation"]["environment"]
    return (
        f"{settings['documents']} held-out windows of {settings['context']} tokens, {settings['blocks']} blocks each, "
        f"{units}first {settings['dense_layers']} layers dense, {settings['dtype'].removeprefix('torch.')}, "
        f"{made_with['device']}, torch {made_with['torch']}, transformers {made_with['transformers']}, "
        f"commit {made_with['commit'][:7]}."
    )


def alignment_table(file: str = "objectives.json") -> str:
    """The recipe of the study, before and after; the gap is always to the untuned model's exact attention."""
    content = json.loads((ROOT / "results" / file).read_text())
    base, tuned = content["base"], next(arm for arm in content["arms"] if arm["name"] == "recipe")
    lines = ["| | base | + adapter |", "|---|---|---|"]
    for context in ("2048", "8192"):
        for k in ("32", "128", "512"):
            gaps = (interval(model["gap"][context][k]) for model in (base, tuned))
            shown = f"CE gap of sparse to exact attention, k = {k}, {int(context) // 1024}K tokens ↓"
            lines.append(f"| {shown} | {' | '.join(gaps)} |")
    best = content["best_with_levers"]
    assert best["levers"] == ["measured layer budgets"]
    spread = (interval(gap) for gap in (base["levers"][best["levers"][0]]["gap"], best["gap"]["2048"]["128"]))
    shown = "CE gap, k = 128 on average, keys per layer as `mage-tune budgets` measures, 2K tokens ↓"
    lines.append(f"| {shown} | {' | '.join(spread)} |")
    for k in ("128", "512"):
        recalls = (f"{model['recall_text'][k]:.3f}" for model in (base, tuned))
        lines.append(f"| recall@{k} of the later steps' keys ↑ | {' | '.join(recalls)} |")
    changes = {
        "CE, keys chosen at all-[MASK], k = 128 ↓": (base["ce_mask"]["128"], "2048 ce mage 128"),
        "CE, exact attention (nats) ↓": (base["ce_exact"], "2048 ce exact"),
        "CE of answers to short prompts, exact ↓": (base["answers"], "answers"),
    }
    for label, (before, name) in changes.items():
        lines.append(f"| {label} | {before:.3f} | {interval(tuned['against_base'][name], signed=True)} |")
    made_with, windows = content["environment"], content["settings"]["contexts"]
    shown = ", ".join(f"{n} of {int(context) // 1024}K" for context, n in windows.items())
    lines += [
        "",
        f"{tuned['minutes']:.1f} minutes of training. Held-out windows: {shown} tokens, 6 blocks each; 95 % intervals, "
        f"with a sign: of the paired change. First {content['settings']['dense_layers']} layers dense, "
        f"{made_with['device']}, torch {made_with['torch']}, transformers {made_with['transformers']}, "
        f"commit {tuned['commit']} (base: {base['commit']}).",
    ]
    return "\n".join(lines)


def study_tables(file: str = "objectives.json") -> str:
    """Every arm of the study, and every lever."""
    from study_objectives import markdown  # needs torch

    return markdown(json.loads((ROOT / "results" / file).read_text())).rstrip("\n")


def rules_table(file: str = "selection_rules.json") -> str:
    """Every selection rule in one table, and what it was measured on."""
    from compare_rules import short_markdown

    result = json.loads((ROOT / "results" / file).read_text())
    settings, made_with = result["settings"], result["environment"]
    lines = [
        short_markdown(result),
        "",
        f"The same {settings['windows']['done']} windows of {settings['context']} tokens, {settings['blocks']} blocks "
        f"each, {settings['questions']['done']} questions and {settings['continuations']['done']} continuations for "
        "every rule; "
        f"first {settings['dense_layers']} layers dense, {settings['dtype'].removeprefix('torch.')}, "
        f"{made_with['device']}, torch {made_with['torch']}, transformers {made_with['transformers']}, commit "
        f"{made_with['commit']}.",
    ]
    return "\n".join(lines)


def all_rules_table(file: str = "selection_rules.json") -> str:
    """Every selection rule with intervals, a table per budget."""
    from compare_rules import markdown

    return markdown(json.loads((ROOT / "results" / file).read_text()))


def ruler_table(file: str = "ruler_h100.json") -> str:
    """RULER before and after tuning."""
    from run_ruler import markdown

    found = json.loads((ROOT / "results" / file).read_text())
    settings, made_with = found["settings"], found["environment"]
    return (
        f"{markdown(found)}\n\n{settings['limit']} samples of each task, the same for all; "
        f"{settings['dtype'].removeprefix('torch.')}, {made_with['device']}, {found['minutes']:.1f} minutes, "
        f"commit {made_with['commit']}."
    )


def training_table(file: str = "training_h100.json") -> str:
    """Steps of the real trainer on random weights of the exact shapes; cases that failed are left out."""
    record = json.loads((ROOT / "results" / file).read_text())
    rows = [row for row in record["rows"] if not row.keys() & {"error", "disturbed"} and not row["baseline"]]
    columns = "layers | recomputed | streams | tokens a step | step | tokens/s | MFU | peak | predicted"
    lines = [f"| case | rows x length | {columns} |", "|---|---:|---|---|---|" + "---:|" * 6]
    for row in rows:
        recomputed = "nothing" if row["checkpointing"] == "off" else row["checkpointing"]
        lines.append(
            f"| {row['case']} | {row['rows']} x {row['accumulation']} x {row['length']} | {row['kernels']} "
            f"| {recomputed}{', offload' if row['offload'] else ''} | {row['stream_names']} "
            f"| {row['tokens_per_step']:,} | {row['step_s']:.2f} s | {row['tokens_per_s']:,.0f} | {row['mfu']:.1%} "
            f"| {row['peak_gib']:.1f} GiB | {row['predicted_gib']:.1f} GiB |"
        )
    lines += ["", f"Medians of the steps after warm-up; rows x micro-steps x length. {made_with(record)}"]
    return "\n".join(lines)


def made_with(record: dict[str, Any]) -> str:
    """Device, versions and commits of steps that were timed; rows merged from another run name their own commit."""
    versions = record["versions"]
    commits = dict.fromkeys(row.get("commit", record["commit"]) for row in record["rows"] if "error" not in row)
    return (
        f"{record['device']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}, commit {', '.join(commits)}."
    )


COMMON_WAYS = {
    "dense_sdpa": "SDPA under a dense mask",
    "block_mask_per_step": "BlockMask built anew, uncompiled",
}
"""Baselines of scripts/bench_training.py; all of them with logits of all positions and plain layers, recomputed."""


def baselines_table(file: str = "training_h100.json") -> str:
    """The same step written the common way, at the longest row that fits it, and ours at that length."""
    record = json.loads((ROOT / "results" / file).read_text())
    found = [row for row in record["rows"] if "error" not in row and row["baseline"]]
    if not found:
        return "Not measured yet."
    lines = ["| model | the common way | longest row | tokens/s | peak | ours: tokens/s | peak | times |"]
    lines += ["|---|---|" + "---:|" * 6]
    for row in found:
        ours = row["ours"]
        lines.append(
            f"| {row['model']} | {COMMON_WAYS[row['baseline']]} | {row['length']} | {row['tokens_per_s']:,.0f} "
            f"| {row['peak_gib']:.1f} GiB | {ours['tokens_per_s']:,.0f} | {ours['peak_gib']:.1f} GiB "
            f"| {row['times_faster']:.2f}x |"
        )
    timed = f"Medians of {found[0]['steps_timed']} steps after warm-up. {made_with(record | {'rows': found})}"
    return "\n".join([*lines, "", f"Without a student; ours recomputes as little as fits at that length. {timed}"])


def engines_table(file: str = "engines_h100.json") -> str:
    """The same training on one and on several GPUs, every engine that was run."""
    if not (ROOT / "results" / file).exists():
        return "Not measured yet."
    record = json.loads((ROOT / "results" / file).read_text())
    lines = ["| engine | GPUs | layers | step | tokens/s | against one GPU | peak of a GPU | loss differs by at most |"]
    lines += ["|---|---:|---|" + "---:|" * 5]
    rows = [row for row in record["rows"] if "error" not in row]
    failed = [row["case"] for row in record["rows"] if "error" in row]
    for row in rows:
        speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
        differs = f"{row['largest_loss_difference']:.1g}" if row["largest_loss_difference"] is not None else ""
        peak = f"{row['peak_gib']:.1f} GiB" if row["peak_gib"] is not None else ""
        layers = row["kernels"] + (", recomputed" if row["checkpointing"] != "off" else "")
        lines.append(
            f"| {row['engine']} | {row['gpus']} | {layers} | {row['step_s']:.2f} s "
            f"| {row['tokens_per_s']:,.0f} | {speedup} | {peak} | {differs} |"
        )
    timed = dict.fromkeys(str(row["steps_timed"]) for row in rows)
    about = (
        f"{record['model']} with random weights of its exact shape, {record['tokens_per_step']:,} tokens of data a "
        f"step in rows of {record['length']}, the same for all; medians of {' or '.join(timed)} steps. Speed against "
        "one GPU with the same layers, losses against one GPU with fused ones."
        + (f" Failed, and the file says how: {', '.join(failed)}." if failed else "")
    )
    return "\n".join([*lines, "", f"{about} {made_with(record)}"])


def conversion_table(file: str = "conversion_h100.json") -> str:
    """What the converted model can do, and what choosing keys at the all-[MASK] step costs it."""
    record = json.loads((ROOT / "results" / file).read_text())
    arm, settings = record["evaluation"]["arms"]["base"], record["evaluation"]["settings"]
    n, needles = settings["questions"], settings["needles"]
    rows = [
        (f"one of {needles} needles, exact attention, {n} questions", "single_exact"),
        (f"three of {needles} needles at once, exact", "multi_exact"),
        (f"one needle, mage k = {settings['needle_budget']}", "single_mage"),
        (f"three needles, mage k = {settings['needle_budget']}", "multi_mage"),
        ("denoising forwards per block, one needle, exact", "single_exact_forwards"),
        ("CE of masked tokens, exact attention (nats)", "ce_exact"),
        ("CE, keys chosen at all-[MASK], k = 128", "ce_mask@128"),
        ("CE, keys chosen at the same step, k = 128", "ce_oracle@128"),
        ("recall@128", "recall@128"),
    ]
    lines = ["| | value (95 % interval) |", "|---|---|"]
    lines += [f"| {label} | {interval(arm[name])} |" for label, name in rows]
    training = record["training"]
    lines += [
        "",
        f"Trained on one {record['environment']['device']}: {training['steps']} steps, "
        f"{training['minutes']:.1f} minutes, median {training['median_tokens_per_s'] / 1000:.0f}k data tokens/s, "
        f"{training['peak_gib']:.0f} GiB. Measured on " + conditions(record, ""),
    ]
    return "\n".join(lines)


def demo_table(file: str = "demo_cpu.json") -> str:
    """Before and after the CPU demo."""
    record = json.loads((ROOT / "results" / file).read_text())
    evaluation = record["evaluation"]
    names = [name for name in evaluation["paired"] if name.startswith(("recall", "query_cosine", "ce_exact", "ce_gap"))]
    lines = ["| | base | + adapter | change, paired 95 % interval |", "|---|---|---|---|"]
    for name in names:
        before, after = (evaluation["arms"][arm][name]["mean"] for arm in ("base", "adapter"))
        lines.append(f"| {name} | {before:.3f} | {after:.3f} | {interval(evaluation['paired'][name], signed=True)} |")
    training = record["training"]
    lines += ["", f"{training['steps']} steps in {training['minutes']:.1f} minutes. " + conditions(record, "")]
    return "\n".join(lines)


def speed_table() -> str:
    """Time per output block at the longest context: exact attention by every kernel, other rules, mage."""
    from performance_tables import LONG, STEPS, Blocks

    blocks = Blocks()
    commits: dict[str, list[int]] = defaultdict(list)

    def block(model: str, batch: int, rule: str, kernel: str = "ours", dense: int = 0) -> float | None:
        row = blocks.find(model, batch, rule, kernel, dense)
        if row is None:
            return None
        commits[row["commit"]].append(batch)
        return float(row["block_ms"])

    columns = {
        "exact, FlashInfer auto": ("exact", "flashinfer-auto"),
        "exact, flash SDPA": ("exact", "sdpa"),
        "exact, ours": ("exact", "ours"),
        "Quest, 2 dense layers": ("quest", "ours", 2),
        "SparseD, 20 % / 30 %": ("sparsed", "ours"),
        "mage, 2 dense layers": ("mage", "ours", 2),
        "mage": ("mage", "ours"),
    }
    lines = [
        f"| | {' | '.join(columns)} | mage against the fastest exact |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for model, batch in (("1.5B", 1), ("1.5B", 8), ("7B", 1), ("7B", 8), ("SDAR-8B", 1)):
        times = {label: block(model, batch, *arm) for label, arm in columns.items()}
        exact = min(time for label, time in times.items() if label.startswith("exact") and time is not None)
        cells = [f"{time:.0f}" if time is not None else "" for time in times.values()]
        assert times["mage"] is not None
        lines.append(f"| {model}, batch {batch} | {' | '.join(cells)} | {exact / times['mage']:.2f}x |")
    record, versions = blocks.record, blocks.record["versions"]
    measured_at = "; ".join(
        commit + (f" (batch {', '.join(map(str, sorted(set(batches))))})" if len(commits) > 1 else "")
        for commit, batches in commits.items()
    )
    lines += [
        "",
        f"Milliseconds per block of 32 tokens at {LONG // 1024}K tokens of context, {STEPS} steps and the commit, "
        f"k = 512, bfloat16, CUDA graphs; random weights of the exact shapes and random keys. {record['device']}, "
        f"torch {versions['torch']}, triton {versions['triton']}, FlashInfer {versions['flashinfer']}, "
        f"commit {measured_at}.",
    ]
    return "\n".join(lines)


def performance_table(name: str) -> Callable[[], str]:
    """A table of docs/performance.md."""

    def table() -> str:
        from performance_tables import TABLES as tables  # of what goes further: needs torch

        return tables[name]()

    return table


TABLES: dict[str, Callable[[], str]] = {
    "alignment": alignment_table,
    "study": study_tables,
    "rules": rules_table,
    "all rules": all_rules_table,
    "ruler": ruler_table,
    "training": training_table,
    "baselines": baselines_table,
    "engines": engines_table,
    "conversion": conversion_table,
    "demo": demo_table,
    "speed": speed_table,
    **{
        name: performance_table(name)
        for name in ("attention", "predictions", "blocks", "steps", "variants", "profile", "bars", "further")
    },
}


def filled(text: str) -> str:
    """`text` with every table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(text):
            table = make()
            text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which files are out of date")
    check = parser.parse_args().check
    stale = [name for name in FILES if filled((ROOT / name).read_text()) != (ROOT / name).read_text()]
    for name in stale:
        if not check:
            (ROOT / name).write_text(filled((ROOT / name).read_text()))
        print(f"{'out of date' if check else 'rewritten'}: {name}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
