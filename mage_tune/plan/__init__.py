"""Will it fit, and how long will it take: a run's memory and time from its recipe and a config.json, without a GPU.

    mage-tune plan recipes/7b.yaml --gpu a100

`shape` reads the config, `estimate` holds the model of memory and time with its residuals, `trial` tries them on a
device; here they come together.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from mage_tune.blocks import TILE
from mage_tune.families import Family
from mage_tune.plan.estimate import CARDS, Card, Estimate, Item
from mage_tune.plan.shape import Shape, read_model
from mage_tune.plan.trial import Probed, probe
from mage_tune.recipe import Recipe

__all__ = ["USABLE", "Plan", "Probed", "as_json", "longest_length", "plan", "probe", "show"]

USABLE = 0.93
"""Share of a card's memory a plan may fill; the rest is for CUDA's context and fragmentation."""


@dataclass(frozen=True)
class Plan:
    """What a recipe will need. Memory in GiB, time in seconds, FLOP in TFLOP; per device."""

    recipe: str
    is_random: bool
    card: str
    card_gib: float
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
    model_tflop_per_step: float
    utilisation: float
    tokens: int
    hours: float
    advice: str


def plan(recipe: Recipe, card_name: str = "h100", memory_gib: float | None = None) -> Plan:
    """Predict a recipe's memory and time on one card.

    Args:
        recipe: the recipe; of its model only config.json is read.
        card_name: a key of `CARDS`.
        memory_gib: memory of the card, where it has another.

    Raises:
        ValueError: unknown card, or the config does not tell a supported shape or family.
        OSError: no config at the model's path.
    """
    if card_name not in CARDS:
        raise ValueError(f"--gpu {card_name}: unknown; known are {', '.join(CARDS)} (--memory-gib for another size)")
    card = CARDS[card_name] if memory_gib is None else replace(CARDS[card_name], gib=memory_gib)
    shape, family = read_model(recipe)
    estimate = Estimate(recipe, shape, family)
    memory, time = list(estimate.memory()), list(estimate.time(card))
    peak, step_s = (sum(item.amount for item in items) for items in (memory, time))
    settings, adapter = recipe.train, estimate.adapter_parameters
    tokens = settings.rows * settings.accumulation * recipe.data.length
    model_tflop = estimate.model_flop() / 1e12
    return Plan(
        recipe=recipe.name,
        is_random=recipe.model.random_weights is not None,
        card=card_name,
        card_gib=card.gib,
        parameters=shape.parameters,
        adapter_parameters=adapter,
        adapter_mib=4 * adapter / 2**20,
        streams=estimate.stream_names,
        tokens_per_step=tokens,
        stream_tokens_per_step=estimate.tokens * settings.accumulation,
        memory=memory,
        peak_gib=peak,
        fits=peak <= USABLE * card.gib,
        longest_length=longest_length(recipe, shape, family, card),
        longest_recomputed=longest_length(_recomputed(recipe), shape, family, card),
        time=time,
        step_s=step_s,
        model_tflop_per_step=model_tflop,
        utilisation=model_tflop / step_s / card.tflops,
        tokens=tokens * settings.steps,
        hours=step_s * settings.steps / 3600,
        advice=_advice(recipe, shape, family, card, peak),
    )


def longest_length(recipe: Recipe, shape: Shape, family: Family, card: Card) -> int:
    """Tokens of the longest row that fits the card with everything else as the recipe says; 0 if none does."""
    fitting, too_long = 0, 2**22 // TILE
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        data = recipe.data.model_copy(update={"length": middle * TILE})
        candidate = Estimate(recipe.model_copy(update={"data": data}), shape, family)
        is_fitting = sum(item.amount for item in candidate.memory()) <= USABLE * card.gib
        fitting, too_long = (middle, too_long) if is_fitting else (fitting, middle)
    return fitting * TILE


def _advice(recipe: Recipe, shape: Shape, family: Family, card: Card, peak: float) -> str:
    if peak <= USABLE * card.gib:
        return ""
    if recipe.train.checkpointing == "off":
        leaner = Estimate(_recomputed(recipe), shape, family)
        needed = sum(item.amount for item in leaner.memory())
        return f"with train.checkpointing=non_reentrant it needs {needed:.1f} GiB"
    return "lower train.rows (raise train.accumulation as much) or data.length"


def _recomputed(recipe: Recipe) -> Recipe:
    """The recipe with every layer made again in the backward pass."""
    settings = recipe.train.model_copy(update={"checkpointing": "non_reentrant"})
    return recipe.model_copy(update={"train": settings})


def as_json(found: Plan, probed: Probed | None = None) -> str:
    """The plan for machines, and what was tried under "probe"."""
    return json.dumps(asdict(found) | ({} if probed is None else {"probe": asdict(probed)}), indent=2)


def show(found: Plan, console: Console, probed: Probed | None = None) -> None:
    """The plan for people: what it needs, what every number is made of, and what was tried."""
    if found.is_random:
        console.print("[bold yellow]RANDOM WEIGHTS[/] of this shape: a run of this recipe learns nothing worth keeping")
    console.print(
        f"[bold]{found.recipe}[/] on one {found.card}: {found.parameters / 1e9:.2f} G parameters, adapter "
        f"{found.adapter_parameters / 1e6:.1f} M ({found.adapter_mib:.0f} MiB), streams {found.streams}",
        highlight=False,
    )
    console.print(_table("memory", "GiB", found.memory, found.peak_gib))
    console.print(_table("time of a step", "s", found.time, found.step_s))
    verdict = "[green]fits[/]" if found.fits else "[red]does not fit[/]"
    longer = ""
    if found.longest_recomputed > found.longest_length:
        longer = f" ({found.longest_recomputed:,} with train.checkpointing=non_reentrant)"
    lines = [
        f"{verdict}: {found.peak_gib:.1f} of {USABLE * found.card_gib:.1f} GiB usable; longest row that fits: "
        f"{found.longest_length:,} tokens{longer}",
        f"{found.tokens_per_step:,} tokens of data a step ({found.stream_tokens_per_step:,} through the model), "
        f"{found.tokens_per_step / found.step_s:,.0f} tokens/s, model FLOP utilisation {found.utilisation:.0%}",
        f"the whole run: {found.tokens:,} tokens of data in {_duration(3600 * found.hours)}",
    ]
    if probed is not None:
        lines.append(_tried(found, probed))
    for line in (*lines, *([found.advice] if found.advice else [])):
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
