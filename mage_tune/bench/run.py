"""`mage-tune bench`: check, then time, most important rows first, until they are done or the time is up."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mage_tune.bench.cases import RULES, Case, all_cases
from mage_tune.bench.checks import check_engine, check_kernel
from mage_tune.bench.floor import BYTES, Ceilings, measure_ceilings
from mage_tune.bench.measure import GIB, make_engine, measure
from mage_tune.bench.profiling import profile_steps
from mage_tune.bench.report import describe, draw_plots, print_table, write_json
from mage_tune.decode.engine.cache import Cache
from mage_tune.decode.engine.choice import masses_bytes
from mage_tune.decode.engine.weights import SHAPES, Weights, random_weights, weights_of
from mage_tune.environment import environment
from mage_tune.families import FAMILIES, Family
from mage_tune.lm import load

WIDTH = 200
"""Columns of the table in a log."""

MOST_CPU_WEIGHTS = 10**9
"""Published shapes beyond this are not drawn where there is no GPU."""

SPARE_GIB = 4.0
"""Memory that weights, cache and tiles' log masses leave to activations, scores, graphs and the allocator."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to time, and where to put it."""

    models: list[str]
    """Names of published shapes, or checkpoints."""
    contexts: list[int]
    batches: list[int]
    steps: list[int]
    rules: list[str]
    budget: int = 512
    seconds: float = 240.0
    """Of timing; checks and the loading of weights come on top."""
    out: Path | None = None
    plots: Path | None = None
    profile: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown:
            raise ValueError(f"unknown rule {unknown[0]!r} to time (known: {', '.join(RULES)})")
        if min([*self.contexts, *self.batches, *self.steps, self.budget]) < 1:
            raise ValueError("contexts, batches, steps and budget must be positive")


@dataclass
class Model:
    """A model that is timed; its weights come and go with its cases."""

    name: str
    family: Family
    make: Callable[[], Weights]


def bench(options: Options, console: Console | None = None) -> dict[str, Any]:
    """Time blocks end to end on this machine.

    Returns:
        What the JSON file holds: device, versions, commit, command, ceilings, checks, rows, and what was left out.

    Raises:
        ValueError: an option that cannot be, or an engine that fails its checks; then nothing is timed.
    """
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {model.name: model for model in (_model(name, device, dtype) for name in options.models)}
    checks = check_engine(device, dtype)
    for check in checks:
        console.print(
            f"{'ok ' if check.is_fine else 'BAD'} {check.what}: {check.found:.2g} (at most {check.allowed:.2g})"
        )
    failed = [check.what for check in checks if not check.is_fine]
    if failed:
        raise ValueError(f"no speed without correctness: {'; '.join(failed)}")
    ceilings = measure_ceilings(device, dtype)
    result: dict[str, Any] = header(options.command) | {
        "ceilings": asdict(ceilings),
        "cache": "random keys and values in place of a prompt's",
        "checks": [asdict(check) for check in checks],
        "rows": [],
        "left_out": [],
    }
    console.print(
        f"floors: copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    Timer(options, models, (device, dtype), ceilings, result, console).run()
    print_table(result["rows"], console)
    if options.plots is not None:
        draw_plots(result["rows"], options.plots)
    return result


def header(command: str) -> dict[str, Any]:
    """What stands on top of every file of results."""
    versions = environment()
    return {
        "device": versions.pop("device"),
        "commit": versions.pop("commit"),
        "command": command,
        "versions": versions,
    }


class Timer:
    """Walks the cases; consecutive ones of a group share weights and cache."""

    def __init__(
        self,
        options: Options,
        models: dict[str, Model],
        machine: tuple[torch.device, torch.dtype],
        ceilings: Ceilings,
        result: dict[str, Any],
        console: Console,
    ) -> None:
        self.options, self.models, self.machine, self.ceilings = options, models, machine, ceilings
        self.result, self.console = result, console
        self.weights: tuple[str, Weights] | None = None
        self.cache: tuple[tuple[str, int, int], Cache] | None = None
        self.verdicts: dict[str, str | None] = {"ours": None}  # it has passed by now
        """What is wrong with each exact kernel here, None for nothing; found before a kernel's first case."""

    def run(self) -> None:
        """Time cases until the time is up; the file is written after each, so that a killed run leaves its rows."""
        options, started = self.options, time.monotonic()
        names = list(self.models)
        cases = all_cases(names, options.contexts, options.batches, options.steps, options.rules, options.budget)
        # A seed is what a commit predicts: there the next block's first step cannot be part of it.
        cases = [case for case in cases if not (case.fuses and self.models[case.model].family.seed_token)]
        for done, case in enumerate(cases):
            if time.monotonic() - started > options.seconds:
                self.result["left_out"] += [asdict(left) | {"why": "time is up"} for left in cases[done:]]
                self.console.print(
                    f"{options.seconds:.0f} s are up: {len(cases) - done} of {len(cases)} cases left out"
                )
                break
            self._time(case)
            write_json(self.result, options.out)
        if options.profile is not None:
            self._profile()
        write_json(self.result, options.out)

    def _time(self, case: Case) -> None:
        try:
            self._trust(case.exact_kernel)
            weights, cache = self._memory(case)
            _free()
            row = measure(case, make_engine(case, weights, self.models[case.model].family, cache), self.ceilings)
        except (ValueError, torch.OutOfMemoryError) as error:  # a peer that is not installed, a cache that does not fit
            why = " ".join(str(error).split())[:200]
            self.result["left_out"].append(asdict(case) | {"why": why})
            self.console.print(f"left out: {case.model} {case.context} b{case.batch} {case.label}: {why}")
        else:
            self.result["rows"].append(row)
            self.console.print(describe(row))

    def _trust(self, kernel: str) -> None:
        """Check an exact kernel before its first case.

        Raises:
            ValueError: it cannot run here, or is wrong.
        """
        if kernel not in self.verdicts:
            self.verdicts[kernel] = self._verdict(kernel)
        if self.verdicts[kernel] is not None:
            raise ValueError(self.verdicts[kernel])

    def _verdict(self, kernel: str) -> str | None:
        try:
            check = check_kernel(kernel, *self.machine)
        except ValueError as error:
            return str(error)
        self.result["checks"].append(asdict(check))
        return None if check.is_fine else f"{check.what}: {check.found:.2g} is more than {check.allowed:.2g}"

    def _profile(self) -> None:
        """One exact and one sparse step of the first model, batch 1, longest context."""
        assert self.options.profile is not None
        options = self.options
        case = Case(
            next(iter(self.models)), max(options.contexts), 1, max(options.steps), "mage", budget=options.budget
        )
        weights, cache = self._memory(case)
        engine = make_engine(case, weights, self.models[case.model].family, cache)
        profile = header(options.command) | {"case": asdict(case)} | profile_steps(engine)
        write_json(profile, options.profile)

    def _memory(self, case: Case) -> tuple[Weights, Cache]:
        """Weights and cache of a case, made unless the case before had the same.

        Raises:
            ValueError: they do not fit.
        """
        model = self.models[case.model]
        size = model.family.block_size
        if case.context % size:
            raise ValueError(f"a context of {case.context} is not a whole number of blocks of {size}")
        if self.cache is None or self.cache[0] != case.group:
            self.cache = None
            if self.weights is None or self.weights[0] != case.model:
                self.weights = None
                _free()
                self.weights = case.model, model.make()
            _free()
            weights = self.weights[1]
            _check_memory(weights, case.batch, case.context + size, size)
            cache = Cache(weights, case.batch, case.context + size)
            cache.fill_random()
            self.cache = case.group, cache
        assert self.weights is not None
        return self.weights[1], self.cache[1]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_memory(weights: Weights, batch: int, capacity: int, block_size: int) -> None:
    if weights.device.type != "cuda":
        return
    cached = weights.shape.kv_per_token * batch * capacity * BYTES / GIB
    masses = masses_bytes(weights, batch, capacity, block_size) / GIB  # of MAGE, which every case is compared with
    free = torch.cuda.mem_get_info(weights.device)[0] / GIB
    if cached + masses + SPARE_GIB > free:
        raise ValueError(f"a cache of {cached:.1f} GiB does not fit into {free:.1f} GiB of free memory")


def _model(name: str, device: torch.device, dtype: torch.dtype) -> Model:
    """A published shape by name, or a checkpoint."""
    if name in SHAPES:
        shape = SHAPES[name]
        if device.type == "cpu" and shape.stored_weights > MOST_CPU_WEIGHTS:
            raise ValueError(f"{name}: this machine has no GPU; time a small checkpoint with --model FOLDER")
        family = FAMILIES["sdar" if shape.has_qk_norm else "fast_dllm_v2"].with_overrides(block_size=32)
        return Model(name, family, lambda: random_weights(shape, dtype, device))
    if not Path(name).exists():
        raise ValueError(f"{name}: neither a folder nor a shape to time (known: {', '.join(SHAPES)})")
    lm = load(name, dtype=str(dtype).removeprefix("torch."), device=str(device))
    weights = weights_of(lm.model)
    return Model(Path(name).name, lm.family, lambda: weights)
