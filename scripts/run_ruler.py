"""RULER on one model: base and tuned, exact and sparse, on the same prompts, resumable; writes results/ruler_*.json.

    python scripts/run_ruler.py models/smollm2-135m-diffusion --adapter runs/smollm2-135m --out results/ruler_h100.json
    python scripts/run_ruler.py --table results/ruler_h100.json

The six tasks that need nothing from the web at 2K and 4K, exact attention and MAGE with 128 keys: 48 arms, each kept in
--folder when it is finished. --check answers some of the exact arm's prompts once more by a plain loop, one prompt at a
time, without lm-eval, and puts both scores side by side; --only-check does nothing else;
--only-samples makes the samples' cache and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mage_tune.environment import environment
from mage_tune.evals.harness.options import OFFLINE, RulerOptions
from mage_tune.evals.harness.ruler import RulerTask, ruler_samples
from mage_tune.evals.run import measure, shown
from mage_tune.evals.store import Store, write_whole
from mage_tune.evals.suites import Plan
from mage_tune.evals.tasks import Arm, Defaults
from mage_tune.lm import BlockDiffusionLM, load

SEED = 1234
THRESHOLD = 0.9


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="checkpoint folder or Hub id")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the Markdown table of a result")
    parser.add_argument("--adapter", help="adapter to compare with the base")
    parser.add_argument("--tasks", nargs="+", default=list(OFFLINE))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--limit", type=int, default=32, help="samples of each task at each length")
    parser.add_argument("--budget", type=int, default=128, help="keys per KV head of the sparse arm")
    parser.add_argument("--batch", type=int, default=32, help="most prompts that decode together")
    parser.add_argument("--cache", type=Path, help="folder of the samples; the user's cache by default")
    parser.add_argument("--folder", type=Path, default=Path("runs/ruler"), help="where finished arms are kept")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="samples a task to answer by a plain loop")
    parser.add_argument("--only-check", action="store_true", help="measure nothing; add the check to what --out holds")
    parser.add_argument("--commit", help="the toolkit's commit, where this is a copy without its history")
    parser.add_argument("--only-samples", action="store_true", help="make the samples, measure nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(markdown(json.loads(arguments.table.read_text())))
        return 0
    if arguments.model is None:
        parser.error("a model is needed, unless --table is given")
    if arguments.only_check and not (arguments.out and arguments.out.is_file()):
        parser.error("--only-check adds to a result: name it with --out")
    started = time.perf_counter()
    lm = load(arguments.model, adapter=arguments.adapter)
    options = RulerOptions(
        tasks=arguments.tasks,
        lengths=arguments.lengths,
        limit=arguments.limit,
        batch_size=arguments.batch,
        cache=None if arguments.cache is None else str(arguments.cache),
    )
    defaults = Defaults(SEED, THRESHOLD)
    tasks = [RulerTask(name, length, options, defaults) for name in options.tasks for length in options.lengths]
    if arguments.only_samples:
        for task in tasks:
            ruler_samples(task.spec, task.length, task.limit, SEED, lm.tokenizer, task.cache)
        print(f"{len(tasks)} x {arguments.limit} samples in {tasks[0].cache}")
        return 0
    if arguments.only_check:
        for task in tasks:
            task.prepare(lm)
        add_check(json.loads(arguments.out.read_text()), lm, tasks, arguments)
        return 0
    plan = Plan("ruler", options.model_dump(), list(tasks), [Arm(), Arm("base", "mage", arguments.budget)])
    found = measure(lm, plan, Store(arguments.folder), has_adapter=arguments.adapter is not None)
    found.pop("records")
    found["settings"] |= {"model": shown(arguments.model), "adapter": shown(arguments.adapter), "dtype": str(lm.dtype)}
    found["settings"]["cache"] = None  # a place on one machine
    found["environment"] = environment() | ({"commit": arguments.commit} if arguments.commit else {})
    found["command"] = " ".join(["python", "scripts/run_ruler.py", *map(shown_word, sys.argv[1:])])
    found["minutes"] = round((time.perf_counter() - started) / 60, 2)
    print_scores(found)
    write(found, arguments.out)
    if arguments.check:
        add_check(found, lm, tasks, arguments)
    return 0


def add_check(
    found: dict[str, Any], lm: BlockDiffusionLM, tasks: list[RulerTask], arguments: argparse.Namespace
) -> None:
    """Check every task, add what came out to the results and say it."""
    for task in tasks:
        both = check(lm, [task], arguments.check)[task.name]
        print(f"{task.name}: plain loop {both['loop']}, harness {both['harness']}, {both['same_text']} texts the same")
        found.setdefault("check", {})[task.name] = both
        found["check_settings"] = {
            "samples": arguments.check,
            "adapter": shown(arguments.adapter),
            "dtype": str(lm.dtype),
            "device": environment()["device"],
        }
        write(found, arguments.out)


def write(found: dict[str, Any], out: Path | None) -> None:
    """Keep what was found, where it is wanted."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(found, indent=1) + "\n")
        print(f"written to {out}; measured in {found['minutes']} minutes", flush=True)


def shown_word(word: str) -> str:
    """A word of the command line, as strangers may read it."""
    return str(shown(word)) if os.path.isabs(word) else word


def check(lm: BlockDiffusionLM, tasks: list[RulerTask], count: int) -> dict[str, Any]:
    """The exact arm (of the adapter, where there is one) against a plain generate-and-score loop.

    Both are asked the first `count` samples; the harness in one batch, the loop one prompt at a time.
    """
    found = {}
    for task in tasks:
        asked = next(iter(task.loaded["tasks"].values())).instances[:count]
        texts = []
        for instance in asked:
            ids = lm.tokenizer(instance.args[0], add_special_tokens=False)["input_ids"]  # type: ignore[misc]
            out = lm.generate(ids, max_new_tokens=instance.args[1]["max_gen_toks"], threshold=THRESHOLD)
            texts.append(out.text)
        harness = task.harness(lm)
        batched = harness.generate_until(asked)
        found[task.name] = {
            "loop": [share(text, i.doc["outputs"]) for text, i in zip(texts, asked, strict=True)],
            "harness": [share(text, i.doc["outputs"]) for text, i in zip(batched, asked, strict=True)],
            "same_text": sum(a == b for a, b in zip(texts, batched, strict=True)),
        }
    return found


def share(text: str, expected: list[str]) -> float:
    """Share of the expected strings that a text holds, whatever the case."""
    return sum(string.lower() in text.lower() for string in expected) / len(expected)


def markdown(found: dict[str, Any]) -> str:
    """Mean score of every side and arm, what the adapter changed, paired, and the check against a plain loop."""
    readings = list(dict.fromkeys(info["reading"] for info in found["metrics"].values()))
    sides = list(found["arms"])
    names = {"base": "base", "adapter": "tuned"}
    columns = [f"{names[side]}, {reading}" for side in sides for reading in readings]
    changes = [f"tuned - base, {reading}" for reading in readings] if "adapter" in sides else []
    lines = [f"| task | {' | '.join(columns + changes)} |", "|---|" + "---:|" * len(columns + changes)]
    for task in found["tasks"]:
        keys = {i["reading"]: k for k, i in found["metrics"].items() if i["task"] == task and i["metric"] == "recall"}
        cells = [f"{found['arms'][side][keys[r]]['mean']:.3f}" for side in sides for r in readings]
        for reading in readings if changes else []:
            change = found["paired"][keys[reading]]
            cells.append(f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    if "check" in found:
        pairs = [pair for both in found["check"].values() for pair in zip(both["loop"], both["harness"], strict=True)]
        same, texts = sum(a == b for a, b in pairs), sum(both["same_text"] for both in found["check"].values())
        how = found["check_settings"]
        lines += [
            "",
            f"The exact arm against a plain loop of generating and scoring, prompt by prompt ({how['dtype']}, "
            f"{how['device'].split(',')[0]}): {same} of {len(pairs)} scores and {texts} of {len(pairs)} texts are the "
            "same.",
        ]
    return "\n".join(lines)


def print_scores(found: dict[str, Any]) -> None:
    """A line for every task: mean score of every side and arm."""
    readings = list(dict.fromkeys(info["reading"] for info in found["metrics"].values()))
    columns = [(side, reading) for side in found["arms"] for reading in readings]
    print(f"{'score':24}" + "".join(f"{side + ' ' + reading:>20}" for side, reading in columns))
    for task in found["tasks"]:
        keys = {i["reading"]: k for k, i in found["metrics"].items() if i["task"] == task and i["metric"] == "recall"}
        print(f"{task:24}" + "".join(f"{found['arms'][s][keys[r]]['mean']:20.3f}" for s, r in columns))
    for name, reason in found["skipped"].items():
        print(f"{name}: skipped: {reason}")


if __name__ == "__main__":
    sys.exit(main())
