"""Kills training runs at the file events of their saves and resumes each: python crash_driver.py RECIPE OUT POINTS.

A fresh process without threads, so that every run can be a fork of it (importing torch once, not once per run). Prints
one JSON object per crash point: {"event", "signal", "left", "equal"}: what was about to happen, what ended the run,
which checkpoints it left, and whether the resumed run ended with the adapter of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mage_tune.recipe import load_recipe
from mage_tune.run import train
from mage_tune.run_folder import ADAPTER_FILE, checkpoints

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def forked(work: Callable[[], Any]) -> int:
    """Run `work` in a fork; its wait status."""
    child = os.fork()
    if child == 0:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 2)
        torch.set_num_threads(1)  # makes the fork's thread pool, which must not be left to several threads
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def watched(recipe_file: str, out: Path, act: Callable[[int, str], None]) -> None:
    """Train, calling act(number, event) before every file event inside the run folder."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or (event == "open" and not int(args[2]) & WRITING):
            return
        if isinstance(args[0], str | Path) and str(out) in str(args[0]):
            seen += 1
            act(seen, f"{event} {Path(args[0]).relative_to(out)}")

    save = torch.save

    def save_in_two_goes(state: Any, path: str, **options: Any) -> None:  # written by C++, so no event tells
        nonlocal seen
        seen += 1
        act(seen, f"write {Path(path).relative_to(out)}")
        save(state, path, **options)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        seen += 1
        act(seen, f"half {Path(path).relative_to(out)}")
        Path(path).write_bytes(whole)

    torch.save = save_in_two_goes
    sys.addaudithook(hook)
    train(load_recipe(recipe_file, [f"output={out}"]))


def main(recipe_file: str, folder: str, points: str) -> None:
    """See the module's docstring."""
    out, listing = Path(folder) / "whole", Path(folder) / "events"
    with listing.open("w") as file:
        assert forked(lambda: watched(recipe_file, out, lambda n, event: print(event, file=file, flush=True))) == 0
    expected = (out / ADAPTER_FILE).read_bytes()
    events = listing.read_text().splitlines()
    step = max(len(events) / int(points), 1)
    for number in sorted({round(1 + i * step) for i in range(int(points))} & set(range(1, len(events) + 1))):
        out = Path(folder) / f"killed-{number}"

        def kill(at: int, event: str, number: int = number) -> None:
            if at == number:
                os.kill(os.getpid(), signal.SIGKILL)

        status = forked(lambda out=out, kill=kill: watched(recipe_file, out, kill))
        left = [checkpoint.name for checkpoint in checkpoints(out / "checkpoints")]
        is_finished = (out / ADAPTER_FILE).exists()
        resumed = 0 if is_finished else forked(lambda out=out: train(load_recipe(recipe_file, [f"output={out}"])))
        row = {
            "event": events[number - 1],
            "signal": os.WTERMSIG(status),
            "left": left,
            "equal": resumed == 0 and (out / ADAPTER_FILE).read_bytes() == expected,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
