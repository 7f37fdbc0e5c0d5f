"""Kill a small run at every file event of its saves, resume it, and judge what came back, with PyPI's ckpt-chaos.

    pip install ckpt-chaos==0.1.8
    python scripts/kill_saves.py                            # minutes on one core; writes results/ckpt_chaos.json
    python scripts/kill_saves.py --modes before --steps 2   # less

ckpt-chaos runs a command once and notes every file that is made, renamed or removed in its output folder. Then it runs
the command anew for every one of these events and ends it there: `before` the event, with the file `torn` in half, or
with every write lost that was not yet synced (`unsynced`). Each time it runs the command again. A clean resume goes on
from the newest whole checkpoint and ends with the very bytes of the adapter of the run that nobody killed.

The command is `mage-tune train recipes/debug.yaml`. Since starting Python and importing torch would take nearly all of
the time, this script imports everything once and every run is a fork of it: ckpt-chaos starts a small process that
hands its environment to the fork and ends as the fork did.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "adapter_model.safetensors"
MODES = ("before", "torn", "unsynced")
SECONDS = 120
"""After which a fork is taken to hang."""
FINISHED = "nothing to resume: the run had finished after"
RESUMED = rf"(?:going on from|{FINISHED}) .*checkpoint-(\d+)"
RECIPE = ("train.save_every=1", "train.keep_checkpoints=2", "data.length=64", "objective.sparse_distillation.budget=16")


def train_command(out: str, steps: int) -> list[str]:
    """Arguments of `mage-tune` for the run that is killed."""
    changes = (*RECIPE, f"train.steps={steps}", f"output={out}")
    return ["train", str(ROOT / "recipes" / "debug.yaml"), *(part for change in changes for part in ("--set", change))]


# --- what ckpt-chaos starts ------------------------------------------------------------------------------------------


def ask(address: str, out: str, what: str) -> int:
    """Have a fork do it: with this process's environment and output; its exit code."""
    wanted = {name: value for name, value in os.environ.items() if name.startswith("CKPT_CHAOS_")}
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [json.dumps({"environment": wanted, "out": out, "what": what}).encode()], [1, 2])
        return int(line.recv(16))


# --- where the forks come from ---------------------------------------------------------------------------------------


def serve(server: socket.socket, steps: int) -> None:
    """Fork for everyone who asks, one at a time."""
    try:
        line, _ = server.accept()
    except TimeoutError:  # nobody asks
        return
    with line:
        line.setblocking(True)
        message, outputs, _, _ = socket.recv_fds(line, 65536, 2)
        child = os.fork()
        if child == 0:
            for number, handle in enumerate(outputs, start=1):
                os.dup2(handle, number)
            run_fork(steps, **json.loads(message))
        for handle in outputs:
            os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        line.sendall(str(code if code >= 0 else 128 - code).encode())


def run_fork(steps: int, environment: dict[str, str], out: str, what: str) -> None:
    """Train as the command would, armed as ckpt-chaos arms a command when it starts; never returns."""
    from ckpt_chaos.targets.common import arm_from_env

    from mage_tune.cli import main
    from mage_tune.run_folder import last_checkpoint

    signal.alarm(SECONDS)
    code: Any = 1
    try:
        os.environ.update(environment)
        if what == "resume" and (Path(out) / ADAPTER).exists():
            print(FINISHED, last_checkpoint(Path(out) / "checkpoints"))
            code = 0
        else:
            arm_from_env(0)
            sys.argv = ["mage-tune", *train_command(out, steps)]
            main()
            code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def import_everything() -> None:
    """What a training process imports, so that the forks need not."""
    import torch

    import mage_tune.run  # noqa: F401

    torch.set_num_threads(1)  # a fork has only one


# --- the report ------------------------------------------------------------------------------------------------------


def judged(work: Path) -> list[dict[str, Any]]:
    """Every point: where the run ended, what was whole then, from where it went on, and ckpt-chaos' verdict.

    A point that ended no run, or another event than the one of its number, is no proof and has the verdict NOT_REACHED.
    """
    from ckpt_chaos.runner import rejudge

    published = first_renames(work / "reference" / "events.log.rank0")
    rows = []
    for row in rejudge(work):
        is_control = row.label.startswith("no crash")
        number = 0 if is_control else int(row.label[1:].split()[0])
        whole = max((step for step, event in published.items() if event < number), default=0)
        verdict = row.verdict
        if verdict == "PASS" and not is_control and (not row.crashed or row.drift):
            verdict = "NOT_REACHED"
        elif verdict == "PASS" and (row.outcome.resumed_from_step or 0) < whole:
            verdict = "LOST_WORK"  # of a checkpoint that the whole run let go of later, which ckpt-chaos cannot know
        rows.append(
            {
                "point": row.label,
                "verdict": verdict,
                "newest_whole": whole,
                "resumed_from": row.outcome.resumed_from_step or 0,
                "same_adapter": row.outcome.weights_diff == 0.0,
            }
        )
    return rows


def first_renames(log: Path) -> dict[int, int]:
    """Step of a checkpoint -> number of the event that gave it its name, of the run that nobody killed."""
    found: dict[int, int] = {}
    for line in log.read_text().splitlines():
        number, kind, name, _ = line.split("\t")
        if kind == "os.rename" and name.startswith("checkpoint-"):
            found.setdefault(int(name.removeprefix("checkpoint-")), int(number))
    return found


def main() -> int:
    """See the module's docstring; exit code 1 where a resume was not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=3, help="of the run, with a checkpoint after each")
    parser.add_argument("--points", type=int, default=0, help="at most so many, evenly spread; 0: every event")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ckpt_chaos.json")
    parser.add_argument("--ask", nargs=3, metavar=("ADDRESS", "OUT", "WHAT"), help="what ckpt-chaos starts")
    options = parser.parse_args()
    if options.ask:
        return ask(*options.ask)
    try:
        chaos = version("ckpt-chaos")
    except PackageNotFoundError:
        print("error: ckpt-chaos is not installed; run: pip install ckpt-chaos==0.1.8", file=sys.stderr)
        return 2
    import_everything()
    from mage_tune.environment import environment
    from mage_tune.evals.store import write_whole

    measured = environment()  # of the code that was imported; the checkout may move on
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        work = Path(folder) / "work"
        server.bind(f"{folder}/forks")
        server.listen()
        server.settimeout(0.1)
        this = [sys.executable, str(Path(__file__).resolve()), "--ask", f"{folder}/forks", "{out}"]
        command = [
            *(sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--timeout", str(2 * SECONDS)),
            *("--modes", ",".join(options.modes), "--max-points", str(options.points or 10**6)),
            *("--checkpoint-glob", "{out}/checkpoints/checkpoint-*", "--ckpt-ignore-size", "--step-regex", RESUMED),
            *("--result-file", f"{{out}}/{ADAPTER}", "--resume-cmd", shlex.join([*this, "resume"])),
            *("--", *this, "train"),
        ]
        chaos_run = subprocess.Popen(command)
        while chaos_run.poll() is None:
            serve(server, options.steps)
        rows = judged(work)
    verdicts = Counter(row["verdict"] for row in rows)
    result = {
        "command": f"python scripts/kill_saves.py --modes {' '.join(options.modes)} --steps {options.steps}"
        + (f" --points {options.points}" if options.points else ""),
        "run": shlex.join(["mage-tune", *train_command("OUT", options.steps)]).replace(f"{ROOT}/", ""),
        "ckpt_chaos": chaos,
        "environment": measured,
        "verdicts": verdicts,
        "points": rows,
    }
    write_whole(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} points, {verdicts}; written to {options.out}")
    return 0 if rows and set(verdicts) == {"PASS"} else 1


if __name__ == "__main__":
    sys.exit(main())
