"""`make demo`: fine-tune a real block-diffusion LM on two CPU cores and see what changed, in under 15 minutes.

    python scripts/demo.py

1. get SmolLM2-135M-Instruct (93 MB) and turn it into a block-diffusion LM with the conversion adapter shipped here;
2. fine-tune a LoRA adapter with the mask-guided alignment loss (recipes/smollm2-135m-cpu.yaml);
3. evaluate base against adapter; print the table; write runs/demo/eval/report.html.

Every step is skipped when its result is there already.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from mage_tune.evals.report import print_tables

ROOT = Path(__file__).resolve().parent.parent
BASE, MODEL, RUN = Path("models/smollm2-135m"), Path("models/smollm2-135m-diffusion"), Path("runs/demo")
ADAPTER = Path("adapters/smollm2-135m-diffusion")
RECIPE = Path("recipes/smollm2-135m-cpu.yaml")

STEPS: list[tuple[str, Path, list[str]]] = [
    ("Get the base weights", BASE / "config.json", ["scripts/get_smollm2.py", "--out", str(BASE)]),
    (
        "Turn them into a block-diffusion LM",
        MODEL / "config.json",
        ["-m", "mage_tune.cli", "merge", str(ADAPTER), "--base", str(BASE), "--out", str(MODEL)],
    ),
    ("Fine-tune", RUN / "adapter_model.safetensors", ["-m", "mage_tune.cli", "train", str(RECIPE)]),
    ("Evaluate base against adapter", RUN / "eval" / "results.json", ["-m", "mage_tune.cli", "eval", str(RUN)]),
]


def main() -> int:
    """Run every step whose result is missing; stop at the first that fails."""
    console = Console(stderr=True)
    started = time.perf_counter()
    for number, (title, result, command) in enumerate(STEPS, start=1):
        console.rule(f"{number}/{len(STEPS)} {title}", align="left")
        if (ROOT / result).exists():
            console.print(f"already there: {result}")
            continue
        code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
        if code:
            console.print(f"[red]{title} failed (exit code {code}); run make demo again to go on from here")
            return code
    if time.perf_counter() - started < 5:  # nothing was run: show the table of the finished demo again
        print_tables(json.loads((ROOT / RUN / "eval" / "results.json").read_text()))
    console.rule("Done", align="left")
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Adapter: {RUN}  Report: {RUN}/eval/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
