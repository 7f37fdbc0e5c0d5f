"""Will it fit, and how long will it take: a run's memory and time from its recipe and a config.json, without a GPU.

    mage-tune plan recipes/7b.yaml --gpu a100
    mage-tune plan recipes/7b.yaml --gpus 4 --engine fsdp2

`shape` reads the config, `estimate` holds the model of memory and time with its residuals, `trial` tries them on a
device; here they come together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from mage_tune.blocks import TILE
from mage_tune.families import Family
from mage_tune.plan.estimate import CARDS, Card, Estimate, Item, Launch
from mage_tune.plan.shape import Shape, read_model, shipped_sizes
from mage_tune.plan.trial import Probed, probe
from mage_tune.recipe import Recipe

__all__ = ["USABLE", "Plan", "Probed", "as_json", "longest_length", "plan", "probe", "show"]

USABLE = 0.93
"""Share of a card's memory a plan may fill; the rest is for CUDA's context and fragmentation."""
ENGINES = ("ddp", "fsdp2", "zero3")
"""Whose memory was measured."""
KNOWN = {
    "ddp": "how close: measured with 7B on 2 and 4 H100s, memory was met within 1 % and time within 6 %",
    "fsdp2": "how close: measured with 7B on 2 H100s, memory was met within 1 %; what gathering weights takes is "
    "fitted to that one run, on NVLink",
    "zero3": "how close: measured with 7B on 2 H100s, memory was met within 3 %; what gathering weights takes is not "
    "predicted (there, half as long again)",
}
"""What a plan for several GPUs is worth; docs/scaling.md has the measurements."""


@dataclass(frozen=True)
class Plan:
    """What a recipe will need. Memory in GiB, time in seconds, FLOP in TFLOP: of one GPU; tokens are of all."""

    recipe: str
    is_random: bool
    sizes_shipped_for: str | None
    """Hub id of the model, where its sizes are those that come with the package."""
    card: str
    card_gib: float
    gpus: int
    engine: str
    parameters: int
    adapter_parameters: int
    adapter_mib: float
    streams: str
    tokens_per_step: int
    stream_tokens_per_step: int
    memory: list[Item]
    peak_gib: float
    fits: bool
    longest_length: int
    longest_recomputed: int
    time: list[Item]
    step_s: float
    is_step_a_bound: bool
    """What the engine adds to a step is not predicted: it takes longer."""
    model_tflop_per_step: float
    utilisation: float
    steps: int
    tokens: int
    hours: float
    advice: str


def plan(
    recipe: Recipe, card_name: str = "h100", memory_gib: float | None = None, *, engine: str = "ddp", gpus: int = 1
) -> Plan:
    """Predict a recipe's memory and time on one card, or on several under an engine.

    Memory of several is held against one measurement of each engine (within 3 %), time against DDP's (within 6 %);
    FSDP2's is fitted and ZeRO-3's not predicted: see `estimate`.

    Args:
        recipe: the recipe; of its model only config.json is read.
        card_name: a key of `CARDS`.
        memory_gib: memory of the card, where it has another.
        engine: one of `ENGINES`; of no account on one GPU.
        gpus: cards of one machine.

    Raises:
        ValueError: unknown card or engine, the config does not tell a supported shape or family, or the recipe cannot
            be run so.
        OSError: no config at the model's path.
    """
    if card_name not in CARDS:
        raise ValueError(f"--gpu {card_name}: unknown; known are {', '.join(CARDS)} (--memory-gib for another size)")
    card = CARDS[card_name] if memory_gib is None else replace(CARDS[card_name], gib=memory_gib)
    launch = _launch(recipe, engine, gpus)
    shape, family = read_model(recipe)
    estimate = Estimate(recipe, shape, family, launch)
    memory, time = list(estimate.memory()), list(estimate.time(card))
    peak, step_s = (sum(item.amount for item in items) for items in (memory, time))
    settings, adapter = recipe.train, estimate.adapter_parameters
    tokens = settings.rows * settings.accumulation * recipe.data.length
    model_tflop = estimate.model_flop() / 1e12
    return Plan(
        recipe=recipe.name,
        is_random=recipe.model.random_weights is not None,
        sizes_shipped_for=recipe.model.path if shipped_sizes(recipe.model) else None,
        card=card_name,
        card_gib=card.gib,
        gpus=gpus,
        engine=engine if gpus > 1 else "one process",
        parameters=shape.parameters,
        adapter_parameters=adapter,
        adapter_mib=4 * adapter / 2**20,
        streams=estimate.stream_names,
        tokens_per_step=tokens,
        stream_tokens_per_step=estimate.tokens * settings.accumulation,
        memory=memory,
        peak_gib=peak,
        fits=peak <= USABLE * card.gib,
        longest_length=longest_length(recipe, shape, family, card, launch),
        longest_recomputed=longest_length(_leaner(recipe), shape, family, card, launch),
        time=time,
        step_s=step_s,
        is_step_a_bound=launch.engine == "zero3" and gpus > 1,
        model_tflop_per_step=model_tflop,
        utilisation=model_tflop / step_s / card.tflops,
        steps=settings.steps,
        tokens=tokens * settings.steps,
        hours=step_s * settings.steps / 3600,
        advice=_advice(recipe, shape, family, card, launch, peak),
    )


def _launch(recipe: Recipe, engine: str, gpus: int) -> Launch:
    """What `--engine` and `--gpus` ask for.

    Raises:
        ValueError: unknown, or refused by the trainer, or never measured.
    """
    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: not predicted; predicted are {', '.join(ENGINES)}")
    if gpus > 1 and engine == "zero3" and recipe.train.kernels == "fused":
        raise ValueError(
            "--engine zero3: refuses fused layers; add --set train.kernels=plain --set "
            "train.checkpointing=non_reentrant, or take fsdp2"
        )
    if gpus > 1 and engine != "ddp" and recipe.model.quantise != "none":
        raise ValueError(f"--engine {engine}: not predicted for weights in 4 bits, which were never split; take ddp")
    return Launch(engine, gpus)


def longest_length(recipe: Recipe, shape: Shape, family: Family, card: Card, launch: Launch | None = None) -> int:
    """Tokens of the longest row that fits the card with everything else as the recipe says; 0 if none does."""
    fitting, too_long = 0, 2**22 // TILE
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        data = recipe.data.model_copy(update={"length": middle * TILE})
        candidate = Estimate(recipe.model_copy(update={"data": data}), shape, family, launch)
        is_fitting = sum(item.amount for item in candidate.memory()) <= USABLE * card.gib
        fitting, too_long = (middle, too_long) if is_fitting else (fitting, middle)
    return fitting * TILE


def _advice(recipe: Recipe, shape: Shape, family: Family, card: Card, launch: Launch, peak: float) -> str:
    """What would make a run fit that does not; empty where it does."""
    usable = USABLE * card.gib
    if peak <= usable:
        return ""
    tries = {"train.checkpointing=non_reentrant": _leaner(recipe)}
    if launch.weight_shares == 1:
        tries["train.checkpointing=non_reentrant and model.quantise=nf4"] = _leaner(recipe, quantise="nf4")
    for changes, leaner in tries.items():
        needed = sum(item.amount for item in Estimate(leaner, shape, family, launch).memory())
        if needed <= usable and leaner != recipe:
            return f"with {changes} it needs {needed:.1f} GiB, and fits"
    return "lower train.rows (raise train.accumulation as much) or data.length, or take a larger card"


def _leaner(recipe: Recipe, quantise: str | None = None) -> Recipe:
    """The recipe with every layer made again in the backward pass, and its weights held so."""
    train = recipe.train.model_copy(update={"checkpointing": "non_reentrant"})
    model = recipe.model.model_copy(update={"quantise": quantise or recipe.model.quantise})
    return recipe.model_copy(update={"train": train, "model": model})


def as_json(found: Plan, probed: Probed | None = None) -> str:
    """The plan for machines, and what was tried under "probe"."""
    return json.dumps(asdict(found) | ({} if probed is None else {"probe": asdict(probed)}), indent=2)


def show(found: Plan, console: Console, probed: Probed | None = None) -> None:
    """The plan for people: what it needs, what every number is made of, and what was tried."""
    where = f"one {found.card}" if found.gpus == 1 else f"{found.gpus} x {found.card} with {found.engine}"
    lines = [
        f"[bold]{found.recipe}[/] on {where}, predicted: {found.parameters / 1e9:.2f} G parameters, adapter of "
        f"{found.adapter_parameters / 1e6:.1f} M ({found.adapter_mib:.0f} MiB)",
        f"streams that a row goes through the model as: {found.streams}",
    ]
    if found.is_random:
        lines.insert(0, "[bold yellow]RANDOM WEIGHTS[/] of this shape: a run of it learns nothing worth keeping")
    if found.sizes_shipped_for:
        lines.append(f"sizes of {found.sizes_shipped_for} as shipped with mage_tune: its config.json is not here")
    _print(console, lines)
    one = "" if found.gpus == 1 else " (each GPU)"
    console.print(_table(f"memory at its peak{one}", "GiB", found.memory, found.peak_gib))
    console.print(_table(f"time of an optimizer step{one}", "s", found.time, found.step_s))
    _print(console, [*_verdict(found), *([] if probed is None else [_tried(found, probed)])])


def _verdict(found: Plan) -> Iterator[str]:
    """What the numbers of the tables come to."""
    verdict = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    card = f"{USABLE * found.card_gib:.1f} of the card's {found.card_gib:.1f} can be used"
    advice = f"; {found.advice}" if found.advice else ""
    yield f"{verdict}: it needs {found.peak_gib:.1f} GiB, and {card}{advice}"
    longer = ""
    if found.longest_recomputed > found.longest_length:
        longer = f"; {found.longest_recomputed:,} with train.checkpointing=non_reentrant"
    yield f"longest row (data.length) that would fit: {found.longest_length:,} tokens{longer}"
    speed = f"{found.tokens_per_step / found.step_s:,.0f} tokens/s, {found.utilisation:.0%} of the peak FLOP/s"
    bound = "[bold]at least[/] " if found.is_step_a_bound else ""
    yield (
        f"a step: {bound}{found.step_s:.1f} s for {found.tokens_per_step:,} tokens of data "
        f"({found.stream_tokens_per_step:,} through the model); {speed}"
    )
    hours = f"{bound}{_duration(3600 * found.hours)}"
    yield f"the whole run: {found.steps:,} steps, {found.tokens:,} tokens of data, {hours}"
    if found.gpus > 1:
        yield KNOWN[found.engine]


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _tried(found: Plan, probed: Probed) -> str:
    if probed.step_s is None:
        return f"[red]tried[/] on {probed.device}, random weights: the longest batch is out of memory"
    memory = "" if probed.peak_gib is None else f", {probed.peak_gib:.1f} GiB ({found.peak_gib:.1f} predicted)"
    speed = f"{probed.step_s:.2f} s a step ({found.step_s:.2f} predicted for {found.card})"
    return f"[green]tried[/] on {probed.device}, random weights: the longest batch takes {speed}{memory}"


def _table(title: str, unit: str, items: list[Item], total: float) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column(unit, justify="right")
    table.add_column("made of")
    for item in items:
        table.add_row(item.name, f"{item.amount:.2f}", item.made_of)
    table.add_row("[bold]in all[/]", f"[bold]{total:.2f}[/]", "")
    return table
