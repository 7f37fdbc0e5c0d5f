"""Time the same training on one and on several GPUs through the real command; write results/engines_h100.json.

    python scripts/bench_engines.py                          # every case on the GPUs of this machine, one by one
    python scripts/bench_engines.py --list                   # the cases, most important first
    CUDA_VISIBLE_DEVICES=2,3 python scripts/bench_engines.py --only ddp-2 fsdp2-2 --out b.json    # beside others
    python scripts/bench_engines.py --join a.json b.json     # parts of one measurement -> --out
    python scripts/bench_engines.py --tiny --only ddp-1 ddp-2 --out /tmp/e.json    # toy shapes, on a CPU

A case is `accelerate launch --config_file $(mage-tune engine NAME) --num_processes N mage_tune/train.py RECIPE`, where
the recipe is recipes/7b.yaml on random weights of its exact shape and random bytes, with 16 micro-steps of a row of
4096 tokens an optimizer step: shared out among the processes, so that all cases see the same rows and noise and ought
to log the same losses. One GPU is launched without an engine. Times are medians of the run folder's metrics.jsonl after
the warm-up; memory is the fullest GPU's.

Speed-up is against one GPU with the same layers; a loss differs from that of one GPU, with fused layers where that was
run. Both are made from all rows at hand whenever a file is written, so cases may be run in any order, in several
commands at once on GPUs of their own, and joined. Finished cases of the same commit in --out are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # accelerate's
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from bench_training import FUSED, Case, case_recipe, finished, random_bytes, speed, what_is_trained  # noqa: E402

from mage_tune.engines import config_file  # noqa: E402
from mage_tune.environment import environment  # noqa: E402
from mage_tune.plan import ENGINES, plan  # noqa: E402
from mage_tune.plan.estimate import Estimate  # noqa: E402
from mage_tune.plan.shape import read_model  # noqa: E402
from mage_tune.recipe import Recipe, resolved_yaml  # noqa: E402

PLAIN = {"train.kernels": "plain", "train.checkpointing": "non_reentrant"}
MICRO_STEPS = 16
"""Of an optimizer step, on all GPUs together: 64K tokens of data in rows of 4096."""
SAME = ("model", "tokens_per_step", "length", "device")
"""What files that are joined have in common."""


@dataclass(frozen=True)
class Launch:
    """A case: an engine on so many GPUs, and the layers that it runs."""

    name: str
    engine: str
    gpus: int
    layers: dict[str, Any]


LAUNCHES = {
    launch.name: launch
    for launch in (
        Launch("ddp-1", "one process", 1, FUSED),
        Launch("ddp-2", "ddp", 2, FUSED),
        Launch("ddp-4", "ddp", 4, FUSED),
        Launch("fsdp2-2", "fsdp2", 2, FUSED),
        Launch("fsdp2-4", "fsdp2", 4, FUSED),
        Launch("ddp-1-plain", "one process", 1, PLAIN),  # what ZeRO-3, which refuses fused layers, is held against
        Launch("zero3-2", "zero3", 2, PLAIN),
        Launch("zero3-4", "zero3", 4, PLAIN),
        Launch("zero2-4", "zero2", 4, FUSED),
    )
}
"""Most important first."""


# --- one launch -------------------------------------------------------------------------------------------------------


def launch_recipe(launch: Launch, steps: int, warmup: int, tiny: bool, data: Path) -> Recipe:
    """The recipe of a case, its run folder beside its data. Nothing is saved before the last step is logged."""
    changes = {
        "train.accumulation": MICRO_STEPS,
        "train.log_every": 1,
        "train.save_every": warmup + steps,
        **launch.layers,
    }
    case = Case(launch.name, "7b", changes, steps=steps, warmup=warmup)
    return case_recipe(case, None, tiny, data)


def launch_command(launch: Launch, recipe: Path) -> list[str]:
    """The documented command, by this interpreter."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(launch.gpus)]
    if launch.gpus == 1:
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    else:
        command += ["--config_file", str(config_file(launch.engine)), "--main_process_port", str(free_port())]
    return [*command, str(ROOT / "mage_tune" / "train.py"), str(recipe), "--debug"]


def free_port() -> int:
    """A port of this host that nobody listens on: launches at the same time must not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def visible_gpus() -> list[str]:
    """The GPUs that this command may use, by the names that CUDA_VISIBLE_DEVICES knows."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(gpu) for gpu in range(torch.cuda.device_count())] if named is None else named.split(",")


def launch_environment(launch: Launch, tiny: bool) -> dict[str, str]:
    """This process's environment, with the checkout's packages and no more GPUs than the case is meant for.

    Raises:
        ValueError: there are fewer.
    """
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if tiny:
        return given | {"OMP_NUM_THREADS": "1"}
    gpus = visible_gpus()
    if len(gpus) < launch.gpus:
        raise ValueError(f"needs {launch.gpus} GPUs, and {len(gpus)} can be seen")
    return given | {"CUDA_VISIBLE_DEVICES": ",".join(gpus[: launch.gpus])}


def run_logged(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """Run a command, all that it says into `log`; what went wrong, or nothing.

    After `seconds`, and when this process is told to stop, all of its processes are killed.
    """
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"still running after {seconds:.0f} s"
        finally:
            kill_family(process)
    return f"exit code {code}" if code else ""


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that came from it: torchrun gives every worker a session, and so a group, of its own."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # first, so that it starts no others
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    until = time.perf_counter() + 30
    while not all(has_ended(member) for member in family) and time.perf_counter() < until:
        time.sleep(0.1)  # the next case wants their memory


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or is but an entry that nobody has asked for yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


ERROR = re.compile(r"^(?:\[\w+\]:\s*)*((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
OF_LAUNCHERS = ("ChildFailedError", "CalledProcessError")
"""Errors that only say that a process has failed."""


def last_words(log: Path) -> str:
    """The errors that a log names, or its last lines."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := ERROR.match(line))]
    causes = list(dict.fromkeys(error for error in errors if not any(name in error for name in OF_LAUNCHERS)))
    return "\n".join(causes[:3] or lines[-10:])[:2000]


def measure(
    launch: Launch, steps: int, warmup: int, tiny: bool, folder: Path, log: Path, seconds: float
) -> dict[str, Any]:
    """The row of a case, or what went wrong; `folder` is for what nobody keeps."""
    began = time.perf_counter()
    try:
        recipe = launch_recipe(launch, steps, warmup, tiny, random_bytes(folder))
        given = launch_environment(launch, tiny)
    except ValueError as error:
        return {"case": launch.name, "error": str(error)}
    file = folder / "recipe.yaml"
    file.write_text(resolved_yaml(recipe))
    failed = run_logged(launch_command(launch, file), given, log, seconds)
    metrics = folder / "run" / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    log.with_suffix(".jsonl").write_text(text)
    lines = [json.loads(line) for line in text.splitlines()]
    if len(lines) < warmup + steps:
        reached = f"{len(lines)} of {warmup + steps} steps logged"
        return {"case": launch.name, "error": f"{failed or 'ended early'}, {reached}: {last_words(log)}"}
    row = describe(launch, recipe, lines, warmup) | {"wall_s": time.perf_counter() - began}
    # The steps were timed all the same; what failed came after them, and the row says so.
    return row | {"failed_later": f"{failed}: {last_words(log)}"} if failed else row


def describe(launch: Launch, recipe: Recipe, lines: Sequence[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """What is written down of a case, from what its run logged."""
    estimate, seconds = Estimate(recipe, *read_model(recipe)), [line["step_s"] for line in lines[warmup:]]
    trained = what_is_trained(recipe, estimate)
    row = {
        "case": launch.name,
        "model": "7b",
        **trained,
        "engine": launch.engine,
        "gpus": launch.gpus,
        **speed(seconds, trained["tokens_per_step"], estimate.model_flop() / 1e12, launch.gpus),
        "peak_gib": max((line["peak_gib"] for line in lines if "peak_gib" in line), default=None),
        "predicted_gib": predicted_gib(launch, recipe),
        "baseline": None,
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line.get("grad_norm") for line in lines],
        "steps_s": [line["step_s"] for line in lines],
    }
    return row | {"deepspeed": version("deepspeed")} if launch.engine.startswith("zero") else row


def predicted_gib(launch: Launch, recipe: Recipe) -> float | None:
    """Memory of a GPU by the plan, or None for an engine that is not predicted."""
    if launch.gpus > 1 and launch.engine not in ENGINES:
        return None
    return plan(recipe, engine=launch.engine if launch.gpus > 1 else "ddp", gpus=launch.gpus).peak_gib


# --- all of them ------------------------------------------------------------------------------------------------------


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in the order of LAUNCHES, held against those of one GPU as far as they are there."""
    order = list(LAUNCHES)
    rows = sorted(rows, key=lambda row: order.index(row["case"]))
    alone = [row for row in rows if "error" not in row and row["gpus"] == 1]
    for row in rows:
        if "error" in row:
            continue
        same_layers = next((one for one in alone if one["kernels"] == row["kernels"]), None)
        row["speedup"] = same_layers["step_s"] / row["step_s"] if same_layers else None
        row["largest_loss_difference"] = largest_difference(row, alone[0]) if alone and row is not alone[0] else None
    return rows


def largest_difference(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """Of the losses of the steps that both made, relative."""
    pairs = zip(row["losses"], reference["losses"], strict=False)
    return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """One record of several; of a case in several files, the last row that has no error.

    Raises:
        ValueError: they are not of one measurement.
    """
    records = [json.loads(file.read_text()) for file in files]
    for file, record in zip(files, records, strict=True):
        for key in SAME:
            if record[key] != records[0][key]:
                raise ValueError(f"{file}: {key} is {record[key]}, and {records[0][key]} in {files[0]}")
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for record in records for row in record["rows"]):
        if "error" not in row or row["case"] not in rows:
            rows[row["case"]] = row
    commands = " ; ".join(dict.fromkeys(record["command"] for record in records))
    return records[0] | {"command": commands, "rows": compare(list(rows.values()))}


def report(row: dict[str, Any]) -> str:
    """A case in one line."""
    if "error" in row:
        return f"{row['case']}: {row['error']}"
    parts = [f"{row['step_s']:.3f} s a step of {row['tokens_per_step']:,} tokens, {row['tokens_per_s']:,.0f} tokens/s"]
    if row["speedup"]:
        parts.append(f"{row['speedup']:.2f}x one GPU")
    if row["peak_gib"] is not None:
        parts.append(f"{row['peak_gib']:.1f} GiB")
    if row["largest_loss_difference"] is not None:
        parts.append(f"loss differs by {row['largest_loss_difference']:.1g} at most")
    parts.append(f"{row['wall_s']:.0f} s in all")
    return f"{row['case']}: " + ", ".join(parts) + (f"; then {row['failed_later']}" if "failed_later" in row else "")


def write(out: Path, record: dict[str, Any]) -> None:
    """Put the record there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


def new_record(commit: str | None, command: str, tiny: bool) -> dict[str, Any]:
    """What stands above the rows."""
    versions = environment()
    shape = launch_recipe(LAUNCHES["ddp-1"], 1, 1, tiny, Path("ids.npy"))
    return {
        "device": versions.pop("device"),
        "commit": commit or versions["commit"] or "unknown",
        "command": command,
        "versions": {name: found for name, found in versions.items() if name != "commit"},
        "model": "A toy model" if tiny else "Fast-dLLM v2 7B",
        "weights": "random, of the exact shape: nothing is learnt",
        "tokens_per_step": shape.train.rows * shape.train.accumulation * shape.data.length,
        "length": shape.data.length,
        "rows": [],
    }


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/engines_h100.json"))
    parser.add_argument("--only", nargs="+", help="names of cases, in this order")
    parser.add_argument("--steps", type=int, default=10, help="steps timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of a case, after which it is killed")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of all cases; the one at work is killed then")
    parser.add_argument("--logs", type=Path, default=Path("runs/engines"), help="where each case's log is kept")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="join records in place of running cases")
    parser.add_argument("--commit", help="the toolkit's commit, where its history is not at hand")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, for a CPU, which has ddp alone")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases that are not done, or join what is."""
    arguments = arguments_of(argv)
    if arguments.list:
        print("\n".join(f"{name}: {one.engine}, {one.gpus} GPUs, {one.layers}" for name, one in LAUNCHES.items()))
        return 0
    try:
        if arguments.join:
            record = joined(arguments.join)
            write(arguments.out, record)
            print("\n".join(report(row) for row in record["rows"]))
            return 0
        unknown = [name for name in arguments.only or () if name not in LAUNCHES]
        if unknown:
            raise ValueError(f"no case {unknown[0]!r}; --list names them")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = " ".join(["python", *(sys.argv if argv is None else ["scripts/bench_engines.py", *argv])])
    return run_cases(arguments, command)


def run_cases(arguments: argparse.Namespace, command: str) -> int:
    """Launch one case after another and write the record after each."""
    began = time.perf_counter()
    record = new_record(arguments.commit, command, arguments.tiny)
    record["rows"] = finished(arguments.out, record["commit"])
    print("RANDOM WEIGHTS of the exact shapes, random data: only time and memory mean anything", flush=True)
    arguments.logs.mkdir(parents=True, exist_ok=True)
    for name in arguments.only or LAUNCHES:
        if name in {row["case"] for row in record["rows"]}:
            continue
        left = arguments.seconds - (time.perf_counter() - began)
        if left <= 0:
            print(f"{name}: no time left", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(
                LAUNCHES[name],
                arguments.steps,
                arguments.warmup,
                arguments.tiny,
                Path(folder),
                arguments.logs / f"{name}.log",
                min(arguments.timeout, left),
            )
        row["commit"] = record["commit"]
        record["rows"] = compare([*record["rows"], row])
        write(arguments.out, record)
        print(report(row), flush=True)
    return 1 if any("error" in row for row in record["rows"]) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that launches are killed with this process
    sys.exit(main())
