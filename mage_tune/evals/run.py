"""`mage-tune eval`: base against adapter, exact against sparse, on the same prompts with the same settings.

    plan -> for every task and side: for every arm: run, store -> results.json, plots, report.html

A finished (arm, task) is stored by itself and never run again; an interrupted evaluation goes on where it was. Under
`accelerate launch` the arms are shared out over the processes, and the first one gathers what all of them stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mage_tune.backbone import causal_lm
from mage_tune.environment import environment
from mage_tune.evals.needles import TASKS, RecipeNeedles, haystack_text
from mage_tune.evals.reading import held_out_ids
from mage_tune.evals.report import print_tables, write_report
from mage_tune.evals.results import summarise
from mage_tune.evals.store import Store, StoredArm, fingerprint, weights_digest, write_whole
from mage_tune.evals.suites import Plan, read_suite
from mage_tune.evals.tasks import Arm, Defaults, Side, Skipped, Task
from mage_tune.evals.text_tasks import TextTask, cut_windows
from mage_tune.lm import BlockDiffusionLM, load
from mage_tune.progress import clock
from mage_tune.recipe import Eval, Recipe, RecipeError, load_recipe, override_section

__all__ = ["SEED", "check_settings", "cut_windows", "evaluate", "progress", "shown"]

SEED = 1234
"""Seed of reveals and needle prompts: the same for every model, so that results can be compared."""
ATTENTIONS = ("exact", "mage")
"""How the needle questions of a recipe's evaluation are answered."""
PLAIN_EVERY_S = 30.0
"""Seconds after which a log gets a line, whatever was done."""
ARMS = "arms"
"""Folder of the finished arms, beside results.json."""


@dataclass(frozen=True)
class Target:
    """What is evaluated, and where the results go."""

    base: str
    adapter: str | None
    dtype: str
    recipe: Eval
    """The run's own settings, or the defaults."""
    out: Path
    log: Path | None
    """metrics.jsonl of the run."""


def evaluate(
    target: str, *, adapter: str | None = None, overrides: list[str] | None = None, suite: str | None = None
) -> dict[str, Any]:
    """Evaluate a run folder (base against its adapter) or a model, and write results, plots and report.

    Args:
        target: run folder, checkpoint folder or Hub id.
        adapter: adapter to compare with the base, when `target` is a model.
        overrides: "key=value" of the recipe's `eval` section, or of the suite.
        suite: name or file of a suite; None does what the recipe's `eval` section says.

    Returns:
        What `eval/results.json` (of a suite: `eval/SUITE/results.json`) holds; see `evals.results`.

    Raises:
        RecipeError: an override is wrong, or the settings ask for what the model cannot do.
        KeyboardInterrupt: interrupted; finished arms are kept.
    """
    place = find_target(target, adapter)
    plan = None if suite is None else read_suite(suite, overrides or [], place.recipe.text)
    settings = place.recipe if plan else override_section(place.recipe, overrides or [])
    team = Team.join()
    lm = load(place.base, adapter=place.adapter, dtype=place.dtype, device=team.device)
    if plan is None:
        check_settings(settings, lm)
        plan = recipe_plan(settings, lm)
    out = place.out if plan.suite is None else place.out / plan.suite
    found = measure(lm, plan, Store(out / ARMS), has_adapter=place.adapter is not None, team=team)
    found["settings"] |= facts(place, plan, lm)
    if team.is_first:
        write_whole(out / "results.json", json.dumps(found, indent=1) + "\n")
        write_report(found, out, place.log)
        print_tables(found)
    return found


def find_target(target: str, adapter: str | None) -> Target:
    """A run folder with its recipe, or a model by itself."""
    folder = Path(target)
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        base = model_path(recipe, folder)
        return Target(base, str(folder), recipe.model.dtype, recipe.eval, folder / "eval", folder / "metrics.jsonl")
    return Target(target, adapter, "auto", Eval(), Path("runs") / f"eval-{folder.name}" / "eval", None)


def facts(place: Target, plan: Plan, lm: BlockDiffusionLM) -> dict[str, Any]:
    """Settings that only the loaded model tells, and paths as strangers may read them."""
    paths = {"text": plan.settings.get("text"), "model": place.base, "adapter": place.adapter}
    told: dict[str, Any] = {name: shown(path) for name, path in paths.items()}
    text = plan.settings.get("text")
    if text is not None:
        told["text_sha256"] = hashlib.sha256(held_out_ids(lm, text).tobytes()).hexdigest()
    return told | {"dtype": str(lm.dtype), "seed": plan.settings.get("seed", SEED)}


def shown(path: str | None) -> str | None:
    """A path as strangers may read it: from the current directory, or its last part alone; Hub ids as they are."""
    if path is None or not Path(path).is_absolute():
        return path
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else Path(path).name


def model_path(recipe: Recipe, folder: Path) -> str:
    """The base checkpoint of a run.

    Raises:
        RecipeError: the run trained random weights, whose quality means nothing.
    """
    if recipe.model.path is None:
        raise RecipeError(f"{folder}: this run trained random weights; there is no base model to evaluate against")
    return recipe.model.path


def check_settings(settings: Eval, lm: BlockDiffusionLM) -> None:
    """Refuse what would be measured wrongly, before anything is measured.

    Raises:
        RecipeError: a setting does not fit the model, or would leave nothing sparse.
    """
    config, size = causal_lm(lm.model).config, lm.family.block_size
    if settings.text is None:
        raise RecipeError("eval.text: held-out text is needed; give a file (eval.text=PATH)")
    if settings.context % size or settings.context < 2 * size:
        raise RecipeError(f"eval.context {settings.context} is not two or more whole blocks of {size} tokens")
    if settings.context > config.max_position_embeddings:
        raise RecipeError(
            f"eval.context {settings.context} is longer than the model's {config.max_position_embeddings} positions"
        )
    if settings.dense_layers >= config.num_hidden_layers:
        raise RecipeError(
            f"eval.dense_layers {settings.dense_layers}: the model has {config.num_hidden_layers} layers; "
            "nothing would be sparse"
        )
    shortest = settings.context // size // 2 * size  # the first probed block is the first of the second half
    if max(settings.budgets) >= shortest:
        raise RecipeError(
            f"eval.budgets: {max(settings.budgets)} keys are at least the shortest probed prefix ({shortest}); "
            "nothing would be sparse"
        )
    if 0 < settings.needles < 2 * max(TASKS.values()):
        raise RecipeError(f"eval.needles: give 0 or at least {2 * max(TASKS.values())}; some keys have two numbers")
    if settings.needles and lm.tokenizer is None:
        raise RecipeError("eval.needles: this model has no tokenizer to ask with; skip them with eval.needles=0")


def recipe_plan(settings: Eval, lm: BlockDiffusionLM) -> Plan:
    """What a recipe's `eval` section asks for: text probes, and needles with exact and with MAGE's attention."""
    assert settings.text is not None
    defaults = Defaults(SEED, settings.threshold, settings.text)
    tasks: list[Task] = [
        TextTask(
            defaults,
            name="text",
            context=settings.context,
            documents=settings.documents,
            blocks=settings.blocks,
            budgets=settings.budgets,
            dense_layers=settings.dense_layers,
        )
    ]
    readings = [Arm()]
    if settings.needles:
        filler = haystack_text(lm, settings.text)
        tasks += [
            RecipeNeedles(
                defaults,
                name,
                context=settings.context,
                needles=settings.needles,
                questions=settings.questions,
                filler=filler,
            )
            for name in TASKS
        ]
        sparse = [rule for rule in ATTENTIONS if rule != "exact"]
        readings += [Arm("base", rule, settings.needle_budget, dense_layers=settings.dense_layers) for rule in sparse]
    return Plan(None, settings.model_dump(), tasks, readings)


# --- running ---


@dataclass(frozen=True)
class Unit:
    """One arm of one task that is not there yet."""

    task: Task
    arm: Arm
    fingerprint: str


def measure(
    lm: BlockDiffusionLM, plan: Plan, store: Store, *, has_adapter: bool, team: Team | None = None
) -> dict[str, Any]:
    """Run every arm that is not stored yet, and gather what all of them found.

    Raises:
        RecipeError: a task cannot be prepared, or none can run here.
        KeyboardInterrupt: interrupted; finished arms are stored.
    """
    team = team or Team()
    tasks, prompts, skipped = prepare(lm, plan.tasks)
    sides: list[Side] = ["base", "adapter"] if has_adapter else ["base"]
    weights = {side: weights_digest(lm.model, with_adapter=side == "adapter") for side in sides}
    units = [
        Unit(task, arm, fingerprint(task, arm, prompts[task.name], weights[side], lm))
        for task in tasks
        for side in sides
        for arm in (replace(reading, model=side) for reading in plan.readings)
        if task.takes(arm)
    ]
    pending = [unit for unit in units if store.read(unit.task, unit.arm, unit.fingerprint) is None]
    team.gather()  # everyone has looked before anyone writes
    run_units(lm, pending, len(units), store, team)
    team.gather()
    stored = {(u.arm.model, u.task.name, u.arm.reading): kept(store, u) for u in units}
    return summarise(
        stored,
        tasks,
        plan.readings,
        sides=sides,
        suite=plan.suite,
        settings=dict(plan.settings),
        environment=environment(),
        skipped=skipped,
        prompts=prompts,
        devices=team.size,
    )


def prepare(lm: BlockDiffusionLM, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, str], dict[str, str]]:
    """Tasks that can run, digests of their prompts, and why others cannot.

    Raises:
        RecipeError: settings that the person has to change, or nothing is left to run.
    """
    ready: list[Task] = []
    prompts, skipped = {}, {}
    for task in tasks:
        try:
            prompts[task.name] = task.prepare(lm)
        except Skipped as reason:
            skipped[task.name] = str(reason)
        else:
            ready.append(task)
    if not ready:
        raise RecipeError("nothing to evaluate: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    return ready, prompts, skipped


def run_units(lm: BlockDiffusionLM, pending: Sequence[Unit], total: int, store: Store, team: Team) -> None:
    """Run this process's share of the pending arms, and store each as soon as it is finished.

    Raises:
        KeyboardInterrupt: interrupted; says how to go on.
    """
    mine = pending[team.rank :: team.size]
    if team.is_first and len(pending) < total:
        print(f"{total - len(pending)} of {total} arms are there already: {store.folder}", file=sys.stderr)
    finished = 0
    before: Unit | None = None
    with progress(sum(unit.task.samples for unit in mine), is_shown=team.is_first) as bar:
        try:
            for unit in mine:
                if before is not None and (before.task is not unit.task or before.arm.model != unit.arm.model):
                    before.task.release()
                before = unit
                bar.say(f"{unit.task.name}, {unit.arm.name}")
                with on_side(lm, unit.arm.model):
                    result = unit.task.run(lm, unit.arm, bar)
                store.write(unit.task, unit.arm, unit.fingerprint, result)
                finished += 1
        except KeyboardInterrupt:
            done = total - len(pending) + finished
            bar.stop()
            note = "" if team.size == 1 else " by this process and before"
            print(
                f"stopped: {done} of {total} arms are finished{note} and kept in {store.folder}; the same command "
                "goes on from there",
                file=sys.stderr,
            )
            raise
    if before is not None:
        before.task.release()


def kept(store: Store, unit: Unit) -> StoredArm:
    """A finished arm, read back: fresh or found, the numbers are the same."""
    found = store.read(unit.task, unit.arm, unit.fingerprint)
    if found is None:
        raise OSError(
            f"{store.folder}: {unit.task.name}, {unit.arm.name} was stored and is gone; run the command again"
        )
    return found


@contextmanager
def on_side(lm: BlockDiffusionLM, side: Side) -> Iterator[None]:
    """The same weights with the adapter on, or switched off for the base."""
    if side == "base" and isinstance(lm.model, PeftModel):
        with lm.model.disable_adapter():
            yield
        return
    with nullcontext():
        yield


class Bar:
    """Progress over samples: a bar with ETA on a terminal; in a log a line for every tenth, or every half minute."""

    def __init__(self, total: int, console: Console, bar: Progress | None) -> None:
        self.total, self.console, self.bar, self.done, self.words = total, console, bar, 0, ""
        self.start = self.last_line = time.perf_counter()
        self.task = bar.add_task("evaluating", total=total, words="") if bar else None

    def say(self, words: str) -> None:
        """What is being run."""
        self.words = words
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, words=words)

    def __call__(self) -> None:
        """One sample more."""
        self.done += 1
        if self.bar is not None and self.task is not None:
            self.bar.advance(self.task)
        elif self.is_due():
            self.last_line = time.perf_counter()
            left = (time.perf_counter() - self.start) / self.done * (self.total - self.done)
            words = f" · {self.words}" if self.words else ""
            self.console.print(f"evaluating: {self.done}/{self.total}{words} · {clock(left)} left")

    def is_due(self) -> bool:
        """Whether a log should hear of this sample."""
        is_tenth = self.done * 10 // self.total > (self.done - 1) * 10 // self.total
        return is_tenth or time.perf_counter() - self.last_line > PLAIN_EVERY_S

    def stop(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()


class Silent(Bar):
    """Progress of a process that does not talk."""

    def __call__(self) -> None:
        """One sample more."""


@contextmanager
def progress(total: int, *, is_shown: bool = True) -> Iterator[Bar]:
    """Progress over `total` samples, on the error output. Yields what to call after each."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not is_shown:
        yield Silent(total, console, None)
        return
    if not console.is_terminal:
        yield Bar(total, console, None)
        return
    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Bar(total, console, bar)


# --- several processes ---


@dataclass(frozen=True)
class Team:
    """The processes of an evaluation, one by itself unless `accelerate launch` started several."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Team:
        """Meet the other processes.

        They only wait for one another and write files, so the meeting is on the CPU, whatever they compute on, and
        patient: arms take hours, and processes are done at different times.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        return cls(torch.distributed.get_rank(), size, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_first(self) -> bool:
        """Whether this process gathers and reports."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """A GPU for each process."""
        return f"cuda:{self.local_rank}" if self.size > 1 and torch.cuda.is_available() else "auto"

    def gather(self) -> None:
        """Wait for all."""
        if self.size > 1:
            torch.distributed.barrier()
