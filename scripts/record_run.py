"""Write what a finished run measured into results/: the file that README's and the docs' numbers come from.

    python scripts/record_run.py runs/demo results/demo_cpu.json

Takes the run folder's versions, training metrics (medians after the first tenth of the steps) and, where
`mage-tune eval` has been run, its estimates with intervals; the raw records stay in the run folder. `--eval DIR` adds
an evaluation that lies elsewhere (a merged model's).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mage_tune.recipe import load_recipe


def training_summary(folder: Path) -> dict[str, Any]:
    """Steps, minutes, median throughput and the last value of every logged term."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steady = lines[len(lines) // 10 :]
    per_line = [lines[0]["step"]] + [b["step"] - a["step"] for a, b in itertools.pairwise(lines)]
    seconds = sum(line["step_s"] * steps for line, steps in zip(lines, per_line, strict=True))
    return {
        "steps": lines[-1]["step"],
        "minutes": round(seconds / 60, 2),
        "median_step_s": statistics.median(line["step_s"] for line in steady),
        "median_tokens_per_s": statistics.median(line["tokens_per_s"] for line in steady),
        "peak_gib": max((line["peak_gib"] for line in lines if "peak_gib" in line), default=None),
        "first": lines[0],
        "last": lines[-1],
    }


def evaluation_summary(folder: Path) -> dict[str, Any]:
    """Settings, environment, estimates and paired differences, without the raw records."""
    found = json.loads((folder / "results.json").read_text())
    return {key: found[key] for key in ("settings", "environment", "arms", "paired")}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument("out", type=Path, help="JSON file to write, in results/")
    parser.add_argument("--eval", type=Path, help="folder with results.json; RUN/eval by default")
    parser.add_argument("--evaluated", help="what was evaluated, for the record; RUN by default")
    parser.add_argument("--command", nargs="+", help="commands that made the run, where they are not the usual two")
    parser.add_argument("--commit", help="the toolkit's commit, where the run was made on a copy without its history")
    arguments = parser.parse_args()
    evaluated = arguments.evaluated or arguments.run
    evaluation = arguments.eval or arguments.run / "eval"
    for needed in (arguments.run / "metrics.jsonl", evaluation / "results.json"):
        if not needed.is_file():
            print(f"error: {needed}: not found; train and evaluate first", file=sys.stderr)
            return 2
    recipe = load_recipe(arguments.run / "recipe.yaml")
    environment = json.loads((arguments.run / "versions.json").read_text())
    record = {
        "commands": arguments.command or [f"mage-tune train recipes/{recipe.name}.yaml", f"mage-tune eval {evaluated}"],
        "environment": environment | ({"commit": arguments.commit} if arguments.commit else {}),
        "objective": recipe.objective.model_dump(mode="json"),
        "adapter": recipe.adapter.model_dump(mode="json"),
        "length": recipe.data.length,
        "train": recipe.train.model_dump(mode="json"),
        "training": training_summary(arguments.run),
        "evaluation": evaluation_summary(evaluation),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
