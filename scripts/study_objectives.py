"""What strengthens mask-guided attention? Every training objective at equal tokens, then the inference-side levers.

    python scripts/study_objectives.py --list                      # the arms and why each is there
    python scripts/study_objectives.py --only query attention      # some arms
    python scripts/study_objectives.py                             # all of them
    python scripts/study_objectives.py --levers                    # inference-side levers, on base and recipe
    python scripts/study_objectives.py --best-lever                # the best of the recipe's on everything
    mage-tune budgets ... --out results/layer_budgets/base.json    # first, for the arm and levers of measured budgets
    python scripts/study_objectives.py --shard 0/2                 # every second arm, for one of two GPUs
    python scripts/study_objectives.py --join a.json b.json        # files of several machines into one
    python scripts/study_objectives.py --table                     # the Markdown tables of docs/objectives.md
    python scripts/study_objectives.py --plot docs/images/objectives.png

An arm is recipes/smollm2-135m.yaml with some keys changed (ARMS below), so one arm is also
`mage-tune train recipes/smollm2-135m.yaml --set KEY=VALUE ...` as `--list` prints it. All arms see the same rows, seeds
and number of steps. Finished (arm, seed) pairs in the results file are not run again.

Measured on every arm, on the same held-out windows and prompts: masked-token cross-entropy exact, with the keys chosen
at the all-[MASK] step and with those of the very step, and recall, at every budget (2K, 4K, 8K tokens); questions for
three needles and a passage to copy, both in eight steps a block so that most steps are sparse; forwards per block of
plain text at threshold 0.9; cross-entropy of answers to short prompts, a guard. The gap is always taken to the exact
cross-entropy of the *untuned* model, so that a tuned model cannot shrink it by getting worse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_rules import Arm as Decoding
from compare_rules import Task, answer_all, in_both_styles, probe_window, tasks_of, window_order
from rich.console import Console

from mage_tune import load
from mage_tune.data.chat import ChatRows
from mage_tune.data.collate import Collator
from mage_tune.data.example import Example
from mage_tune.data.text import load_ids
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.layer_budgets import read_layer_budgets
from mage_tune.decode.steps import Levers
from mage_tune.environment import environment
from mage_tune.evals.run import cut_windows
from mage_tune.evals.stats import estimate, paired_difference
from mage_tune.evals.store import write_whole
from mage_tune.lm import BlockDiffusionLM
from mage_tune.recipe import Eval, load_recipe
from mage_tune.recipe_schema import Objective
from mage_tune.stream_loss import StreamLoss

RECIPE = Path("recipes/smollm2-135m.yaml")
RESULTS = Path("results/objectives.json")
LAYER_BUDGETS = Path("results/layer_budgets")
"""A file of `mage-tune budgets` for each model, by the name of its arm."""
CHAT = Path("recipes/data/smollm2-chat/heldout.jsonl")
STEPS = 40
"""Optimizer steps of every arm that is not full: 1.3M tokens of data, at 16 rows of 2048."""
LEARNING_RATE = 1e-3
"""Of the same arms: at so few steps 5e-4, which the recipe then took, shows less of the same."""
BUDGETS = (32, 64, 128, 256, 512)
MAIN = 2048
"""Tokens of context of everything but the longer probes."""
CONTEXTS = {MAIN: 24, 4096: 8, 8192: 4}
"""Context -> windows probed."""
NEEDLES, PROMPTS = 13, 32
"""Needles in a haystack; questions, copies and continuations decoded."""
KEYS = 128
"""The budget that arms are judged at."""
TASK_BUDGETS = (8, 128)
"""Budgets of the tasks that are decoded."""
MOST_HARM = 0.01
"""Exact cross-entropy, nats, that an objective may cost and still win."""
MEASURED, BUDGETED = "measured layer budgets", "everything, layer budgets"
"""The lever, and the arm that is trained with those of the untuned model."""
FINAL = "recipe"
"""The arm that is the recipe as it stands."""

Q, A, S = "objective.query_alignment", "objective.attention_alignment", "objective.sparse_distillation"


def measured_budgets(name: str) -> dict[int, int]:
    """Keys of every layer that `mage-tune budgets` chose for a model of that name; empty before it did."""
    path = LAYER_BUDGETS / f"{plain(name)}.json"
    return read_layer_budgets(path).budgets if path.is_file() else {}


def plain(name: str) -> str:
    """An arm's name as a file's."""
    return name.replace(" ", "-").replace(",", "")


OFF = {
    f"{Q}.weight": 0.0,
    f"{Q}.symmetric": False,
    f"{A}.weight": 0.0,
    f"{A}.power": 1.0,
    f"{A}.symmetric": False,
    f"{S}.weight": 0.0,
    f"{S}.kl_weight": 1.0,
    f"{S}.teacher": "adapters_off",
    f"{S}.share": 1.0,
    f"{S}.layer_budgets": {},
    "train.rows": 8,
    "train.accumulation": 2,
    "train.warmup_steps": 10,
}
"""Diffusion alone; arms name what differs from here, so that they stay what they are when the recipe changes."""
QUERY = OFF | {f"{Q}.weight": 5.0}
ATTENTION = OFF | {f"{A}.weight": 1.0}
SPARSE = OFF | {f"{S}.weight": 1.0, f"{S}.budget": 128}
BOTH = OFF | {f"{Q}.weight": 5.0, f"{A}.weight": 1.0}
ALL = SPARSE | {f"{Q}.weight": 5.0, f"{A}.weight": 2.0, f"{A}.power": 0.5, f"{S}.kl_weight": 0.0}


@dataclass(frozen=True)
class Trained:
    """One objective under study."""

    name: str
    changes: dict[str, Any]
    why: str
    seeds: tuple[int, ...] = (0,)
    full: bool = False
    """As long as the recipe, at its learning rate: not at equal tokens, so it does not compete with the others."""

    def overrides(self, seed: int) -> list[str]:
        """For `mage-tune train --set`; the objective of the recipe is replaced, everything else stays."""
        length = {"train.steps": STEPS, "train.save_every": STEPS, "train.learning_rate": LEARNING_RATE}
        changes = {"seed": seed} | ({} if self.full else length) | self.changes
        return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


ARMS = (
    Trained("diffusion", OFF, "more of the family's own loss: what training alone gives", (0, 1)),
    Trained("query", QUERY, "block-average queries, cosine, per group, after rotary positions, one-sided", (0, 1)),
    Trained("query, squared", QUERY | {f"{Q}.distance": "squared"}, "relative squared error: lengths count too"),
    Trained("query, per head", QUERY | {f"{Q}.average": "head"}, "every query head keeps its own direction"),
    Trained("query, before rotary", QUERY | {f"{Q}.rotary": "before"}, "content without position"),
    Trained("query, symmetric", QUERY | {f"{Q}.symmetric": True}, "the later steps may move as well", (0, 1)),
    Trained("attention", ATTENTION, "KL of mean attention, 8 sampled blocks a row", (0, 1)),
    Trained("attention, all blocks", ATTENTION | {f"{A}.blocks": 64, "train.rows": 2, "train.accumulation": 8}, "all"),
    Trained("attention, reversed", ATTENTION | {f"{A}.direction": "mask_to_later"}, "mode-seeking KL"),
    Trained("attention, top 128", ATTENTION | {f"{A}.top_k": 128}, "only the keys the later step would choose"),
    Trained("attention, power 0.5", ATTENTION | {f"{A}.power": 0.5}, "keys of little mass count for more"),
    Trained(
        "attention, symmetric",
        ATTENTION | {f"{A}.power": 0.5, f"{A}.symmetric": True},
        "the later steps may move as well",
    ),
    Trained(
        "query + attention, symmetric",
        BOTH | {f"{A}.power": 0.5, f"{A}.symmetric": True, f"{Q}.symmetric": True},
        "both alignments, and the later steps may move",
    ),
    Trained("query + attention", BOTH, "both alignments", (0, 1)),
    Trained("sparse CE", SPARSE | {f"{S}.kl_weight": 0.0}, "training under sparsity with plain cross-entropy", (0, 1)),
    Trained(
        "sparse CE alone",
        SPARSE | {f"{S}.kl_weight": 0.0, "objective.diffusion.weight": 0.0},
        "without the exact noisy stream: three streams instead of four",
    ),
    Trained("sparse, KL to base", SPARSE, "distilled from the exact untuned model, KL(teacher || student)"),
    Trained(
        "sparse, reverse KL to base",
        SPARSE | {f"{S}.direction": "student_to_teacher"},
        "the direction MAGE v1 is reported to use",
    ),
    Trained("sparse, KL to itself", SPARSE | {f"{S}.teacher": "adapters_on"}, "teacher: the model's own exact step"),
    Trained(
        "everything",
        SPARSE | {f"{Q}.weight": 5.0, f"{A}.weight": 1.0, f"{S}.kl_weight": 0.0},
        "alignment moves the choice, sparse CE adapts to it",
        (0, 1),
    ),
    Trained("everything, power 0.5", ALL, "the same, keys of little mass counting for more", (0, 1)),
    Trained("everything, no queries", ALL | {f"{Q}.weight": 0.0}, "whether queries add anything to attention"),
    Trained("everything, weight 8", ALL | {f"{A}.weight": 8.0}, "four times the attention alignment"),
    Trained("everything, weight 25", ALL | {f"{A}.weight": 25.0}, "twelve times: how much recall there is to buy"),
    Trained("everything, weight 60", ALL | {f"{A}.weight": 60.0}, "thirty times"),
    Trained(
        "everything, symmetric, KL to itself",
        ALL | {f"{Q}.symmetric": True, f"{S}.kl_weight": 1.0, f"{S}.teacher": "adapters_on"},
        "the student also follows the model's own exact step",
    ),
    Trained("everything, and KL", ALL | {f"{S}.kl_weight": 1.0}, "the student also follows the exact untuned model"),
    Trained(
        BUDGETED,
        ALL | {f"{S}.layer_budgets": measured_budgets("base")},
        "the student keeps as many keys, more of them in the layers where that counts",
    ),
    Trained("everything, a quarter", ALL | {f"{S}.share": 0.25}, "a student on a quarter of the blocks, as for 7B"),
    Trained("both, rank 8", BOTH | {"adapter.rank": 8, "adapter.alpha": 16.0}, "a smaller adapter"),
    Trained("both, rank 128", BOTH | {"adapter.rank": 128, "adapter.alpha": 256.0}, "a larger adapter"),
    Trained("both, q and k only", BOTH | {"adapter.targets": ["q_proj", "k_proj"]}, "only what selection reads"),
    Trained("sparse CE at 32", SPARSE | {f"{S}.kl_weight": 0.0, f"{S}.budget": 32}, "smaller budget in training"),
    Trained("sparse CE at 512", SPARSE | {f"{S}.kl_weight": 0.0, f"{S}.budget": 512}, "larger budget in training"),
    Trained(FINAL, {}, "the recipe as it stands, at its own length", full=True),
    Trained(
        "recipe, both alignments symmetric",
        {f"{Q}.weight": 30.0, f"{A}.weight": 4.0, f"{A}.symmetric": True},
        "more weight, and attention alignment both ways too: how much recall there is to have",
        full=True,
    ),
)

LEVERS = (
    Decoding("mage", "mage"),
    Decoding("draft refresh", "mage", Levers(refresh="draft")),
    Decoding("union refresh", "mage", Levers(refresh="union")),
    Decoding("re-selected at 8", "mage", Levers(reselect_at=(8,))),
    Decoding("re-selected at 8 and 16", "mage", Levers(reselect_at=(8, 16))),
    Decoding("draft refresh, re-selected at 8", "mage", Levers(refresh="draft", reselect_at=(8,))),
    Decoding("residual", "mage", Levers(residual=True)),
    Decoding("recent 32", "mage", options=(("recent", 32),)),
    Decoding("sinks 4, recent 32", "mage", options=(("sinks", 4), ("recent", 32))),
    Decoding("sinks 4, recent 64", "mage", options=(("sinks", 4), ("recent", 64))),
    Decoding("follow 4", "mage", options=(("follow", 4),)),
    Decoding("follow 4, sinks 4, recent 32", "mage", options=(("follow", 4), ("sinks", 4), ("recent", 32))),
    Decoding("follow 4, re-selected at 8", "mage", Levers(reselect_at=(8,)), (("follow", 4),)),
    Decoding("layer budgets", "mage-v1"),
    Decoding("oracle", "oracle"),
)
"""Tried at inference on base and winner; steps count one revealed token each, so step 8 is a quarter of a block."""


def levers_of(name: str) -> tuple[Decoding, ...]:
    """LEVERS, and the numbers of keys measured for a model of that name, alone and with what may go with them."""
    budgets = measured_budgets(name)
    if not budgets:
        return LEVERS
    given = ("layer_budgets", tuple(budgets.items()))
    return (
        *LEVERS,
        Decoding(MEASURED, "mage", options=(given,)),
        Decoding(f"{MEASURED}, follow 4", "mage", options=(given, ("follow", 4))),
        Decoding(f"{MEASURED}, re-selected at 8", "mage", Levers(reselect_at=(8,)), (given,)),
    )


def adds_no_exact_step(lever: Decoding) -> bool:
    """Whether a block still has one exact step: no second choice, no refresh, no oracle."""
    return lever.rule != "oracle" and lever.levers in (Levers(), Levers(residual=True))


# Measuring


def settings(context: int, windows: int, budgets: Sequence[int], dense_layers: int = 2) -> Eval:
    """The same for every arm."""
    recipe = load_recipe(RECIPE)
    return Eval(
        text=recipe.eval.text,
        context=context,
        documents=windows,
        blocks=6,
        budgets=list(budgets),
        dense_layers=dense_layers,
        needles=NEEDLES,
        questions=PROMPTS,
    )


def probe(lm: BlockDiffusionLM, tokens: np.ndarray, given: Eval, arms: Sequence[Decoding]) -> dict[str, np.ndarray]:
    """Metric name -> value of every window: "ce exact", "ce LABEL BUDGET" and "recall LABEL BUDGET"."""
    windows = cut_windows(tokens, given.context, given.documents)
    values: dict[str, list[float]] = {}
    for number in window_order(len(windows)):
        for (label, budget), found in probe_window(lm, windows[number], number, given, arms).items():
            name = label if budget is None else f"{label} {budget}"
            values.setdefault(f"ce {name}", []).append(found.ce)
            if found.recall is not None:
                values.setdefault(f"recall {name}", []).append(found.recall)
    return {name: np.array(value) for name, value in values.items()}


def decode(
    lm: BlockDiffusionLM, tokens: np.ndarray, given: Eval, mage: Decoding, batch: int = 32
) -> dict[str, np.ndarray]:
    """Metric name -> value of every prompt: questions and copies in eight steps, forwards of plain text."""
    values: dict[str, list[float]] = {}
    tasks = tasks_of(lm, tokens, given, continuations=given.documents)
    for part in ([tasks[1]], [tasks[2]], [tasks[3]]):
        for units in batches(part[0], batch):
            cache = PrefixCache.for_model(lm.model, len(units), 0)
            for name, found in answer_all(lm, part, units, given, cache, [mage]).items():
                for (label, budget), answers in found.items():
                    arm = label if budget is None else f"{label} {budget}"
                    measured = "forwards_per_block" if name == "text_" else "found"
                    values.setdefault(f"{name}{measured} {arm}", []).extend(getattr(a, measured) for a in answers)
    return {name: np.array(value) for name, value in values.items()}


def batches(task: Task, size: int) -> Iterator[range]:
    """The prompts of a task, `size` at a time."""
    for start in range(0, len(task.prompts), size):
        yield range(start, min(start + size, len(task.prompts)))


@torch.no_grad()
def answer_loss(lm: BlockDiffusionLM, rows: int = 128) -> np.ndarray:
    """(rows,) diffusion loss of answers to short prompts with exact attention, nats; the noise is that of the row."""
    chats = ChatRows(str(CHAT), lm.tokenizer, lm.family, length=512)
    loss = StreamLoss(Objective())
    collate = Collator(lm.family, 0, length_multiple=128, **loss.collator_needs())
    values = []
    for i in range(min(rows, len(chats))):
        ids, weight = chats[i]
        made = collate([Example(row=i, input_ids=ids, loss_weight=weight)])
        example = {key: x.to(lm.device) if isinstance(x, torch.Tensor) else x for key, x in made.items()}
        with torch.autocast(lm.device.type, dtype=torch.bfloat16, enabled=lm.device.type == "cuda"):
            total = loss.sums(lm.model, example)["diffusion"]
        values.append(float(total / example["loss_items"].clamp_min(1e-6)))
    return np.array(values)


def measure(lm: BlockDiffusionLM, lever: Decoding = LEVERS[0]) -> dict[str, np.ndarray]:
    """Everything measured on one model, by metric and unit; what a lever gives stands under "mage" too."""
    tokens = load_ids(str(settings(MAIN, 1, BUDGETS).text), lm.tokenizer, lm.family)
    mage = replace(lever, label="mage")
    arms = [mage, Decoding("oracle", "oracle")]
    values: dict[str, np.ndarray] = {}
    for context, windows in CONTEXTS.items():
        found = probe(lm, tokens, settings(context, windows, BUDGETS), arms)
        values |= {f"{context} {name}": value for name, value in found.items()}
    values |= decode(lm, tokens, settings(MAIN, PROMPTS, TASK_BUDGETS), mage)
    return values | {"answers": answer_loss(lm)}


# Results


def row(name: str, seed: int, values: dict[str, np.ndarray], base: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """One arm of the results file; `gap` and everything under "against_base" is paired with the untuned model."""
    reference = values if base is None else base

    def mean(metric: str) -> float:
        return round(float(values[metric].mean()), 4)

    def by_budget(metric: str) -> dict[str, float]:
        return {str(k): mean(f"{MAIN} {metric} {k}") for k in BUDGETS}

    def tasks(metric: str) -> dict[str, Any]:
        arms = ["exact", *(f"mage {k}" for k in TASK_BUDGETS)]
        return {arm: asdict(estimate(values[f"{metric} {arm}"])) for arm in arms}

    measured = {
        "name": name,
        "seed": seed,
        "ce_exact": mean(f"{MAIN} ce exact"),
        "ce_mask": by_budget("ce mage"),
        "ce_oracle": by_budget("ce oracle"),
        "recall_text": by_budget("recall mage"),
        "gap": {
            str(context): {
                str(k): asdict(paired_difference(values[f"{context} ce mage {k}"], reference[f"{context} ce exact"]))
                for k in BUDGETS
            }
            for context in CONTEXTS
        },
        "needles": tasks("stepped_found"),
        "copied": tasks("copy_found"),
        "forwards_per_block": tasks("text_forwards_per_block"),
        "answers": mean("answers"),
    }
    if base is not None:
        guarded = (f"{MAIN} ce exact", f"{MAIN} recall mage {KEYS}", f"{MAIN} ce mage {KEYS}", "answers")
        measured["against_base"] = {m: asdict(paired_difference(values[m], base[m])) for m in guarded}
    return measured | {"units": {name: [round(float(x), 5) for x in value] for name, value in values.items()}}


def units(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """The measured values of a row of the results file."""
    return {name: np.array(values) for name, values in found["units"].items()}


def levers_row(
    lm: BlockDiffusionLM, base_exact: np.ndarray, levers: Sequence[Decoding], dense_layers: int = 2
) -> dict[str, Any]:
    """Gap at k = 128 of every lever to the untuned model's exact loss."""
    tokens = load_ids(str(settings(MAIN, 1, [KEYS]).text), lm.tokenizer, lm.family)
    oracle = LEVERS[-1]
    arms = [*levers, *([] if oracle in levers else [oracle])]
    values = probe(lm, tokens, settings(MAIN, CONTEXTS[MAIN], [KEYS], dense_layers), arms)
    return {
        arm.label + ("" if dense_layers == 2 else f", {dense_layers} dense layers"): {
            "gap": asdict(paired_difference(values[f"ce {arm.label} {KEYS}"], base_exact)),
            "recall": asdict(estimate(values[f"recall {arm.label} {KEYS}"])),
        }
        for arm in arms
    }


class Results:
    """The results file: what is in it is not run again, and it is written after every arm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    @property
    def arms(self) -> list[dict[str, Any]]:
        """The arms done."""
        found: list[dict[str, Any]] = self.content.setdefault("arms", [])
        return found

    def has(self, name: str, seed: int) -> bool:
        """Whether an arm is done."""
        return any(arm["name"] == name and arm["seed"] == seed for arm in self.arms)

    def save(self) -> None:
        """Write the file, in the order of ARMS, with the winner at equal tokens by its gap at k = 128."""
        order = {arm.name: i for i, arm in enumerate(ARMS)}
        self.arms.sort(key=lambda arm: (order.get(arm["name"], len(order)), arm["seed"]))
        equal = [arm.name for arm in ARMS if not arm.full]
        gaps = {name: gap_of([arm for arm in self.arms if arm["name"] == name]) for name in equal}
        unharmed = {name: gap for name, gap in gaps.items() if gap is not None}
        self.content["best"] = min(unharmed, key=lambda name: unharmed[name]) if unharmed else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.content, indent=1) + "\n")


def gap_of(seeds: Sequence[dict[str, Any]]) -> float | None:
    """Mean gap over the seeds of an arm at 2K and k = 128; None when it was not run or harms exact attention."""
    gaps = [gap_at(arm)["mean"] for arm in seeds]
    harm = [arm["against_base"][f"{MAIN} ce exact"]["mean"] for arm in seeds]
    return float(np.mean(gaps)) if gaps and np.mean(harm) <= MOST_HARM else None


# Running


def folder_of(name: str, seed: int) -> Path:
    """Where an arm is trained."""
    return Path("runs/study") / f"{plain(name)}-{seed}"


def train(arm: Trained, seed: int) -> tuple[Path, float]:
    """The run folder of an arm and the minutes it took; a finished run is kept."""
    folder = folder_of(arm.name, seed)
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mage_tune.cli", "train", str(RECIPE)]
    for override in [f"output={json.dumps(str(folder))}", *arm.overrides(seed)]:
        command += ["--set", override]
    if not (folder / "adapter_model.safetensors").is_file():
        with log.open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise RuntimeError(f"{arm.name}, seed {seed}: training ended with code {code}; see {log}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in lines)
    return folder, float(np.median([line["step_s"] for line in lines if "step_s" in line])) * last / 60


def run(arms: Sequence[Trained], results: Results, console: Console, commit: str | None) -> None:
    """Every (arm, seed) that the results file has not got.

    Raises:
        ValueError: the arm of measured budgets is asked for before they were.
    """
    if any(arm.name == BUDGETED for arm in arms) and not measured_budgets("base"):
        raise ValueError(
            f"{BUDGETED!r} needs the untuned model's: mage-tune budgets ... --out {LAYER_BUDGETS}/base.json"
        )
    model = str(load_recipe(RECIPE).model.path)
    given = {
        "recipe": str(RECIPE),
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "budgets": BUDGETS,
        "contexts": CONTEXTS,
        "task_budgets": TASK_BUDGETS,
        "dense_layers": 2,
    }
    made_with = environment() | ({"commit": commit} if commit else {})
    of_row = {"commit": made_with["commit"]}  # rows of several runs may stand in one file
    results.content |= {"settings": given, "environment": made_with}
    if "base" not in results.content:
        results.content["base"] = row("base", 0, measure(load(model)), None) | of_row
        results.save()
    base = units(results.content["base"])
    for arm in arms:
        for seed in arm.seeds:
            if results.has(arm.name, seed):
                continue
            started = time.perf_counter()
            folder, minutes = train(arm, seed)
            lm = load(model, adapter=str(folder))
            found = row(arm.name, seed, measure(lm), base)
            found |= {"changes": arm.changes, "why": arm.why, "minutes": round(minutes, 2)} | of_row
            results.arms.append(found)
            results.save()
            took = time.perf_counter() - started
            console.print(f"{arm.name}, seed {seed}: {summary(found)}; {took:.0f} s", highlight=False)


def run_levers(results: Results, names: Sequence[str], only: Sequence[str] | None = None) -> None:
    """Every lever, or some, on the untuned model and on tuned ones; arms but the recipe get the measured budgets alone.

    Raises:
        ValueError: a model was not measured before.
    """
    found = {"base": results.content.get("base")} | {arm["name"]: arm for arm in results.arms if arm["seed"] == 0}
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise ValueError(f"{results.path}: levers need the arm {missing[-1]!r}; run it first: --only '{missing[-1]}'")
    path = str(load_recipe(RECIPE).model.path)
    exact = units(results.content["base"])[f"{MAIN} ce exact"]
    for name in names:
        lm = load(path, adapter=None if name == "base" else str(folder_of(name, 0)))
        done, is_arm = found[name].setdefault("levers", {}), name not in ("base", FINAL)
        labels = only or ([LEVERS[0].label, MEASURED] if is_arm else [lever.label for lever in levers_of(name)])
        wanted = [lever for lever in levers_of(name) if lever.label in labels and lever.label not in done]
        if wanted:
            done |= levers_row(lm, exact, wanted)
            results.save()
        for dense_layers in () if is_arm or only else (1, 0):
            if f"{LEVERS[0].label}, {dense_layers} dense layers" not in done:
                done |= levers_row(lm, exact, [LEVERS[0]], dense_layers)
                results.save()


def best_lever(results: Results, console: Console) -> None:
    """Everything measured under the recipe's best lever without another exact step.

    Raises:
        ValueError: the recipe's levers were not measured before.
    """
    final = next((arm for arm in results.arms if arm["name"] == FINAL and "levers" in arm), None)
    if final is None:
        raise ValueError(f"{results.path}: no levers of {FINAL!r} in it; run --levers first")
    lm = load(str(load_recipe(RECIPE).model.path), adapter=str(folder_of(FINAL, 0)))
    allowed = [lever for lever in levers_of(FINAL) if adds_no_exact_step(lever) and lever.label in final["levers"]]
    best = min(allowed, key=lambda lever: final["levers"][lever.label]["gap"]["mean"])
    values = measure(lm, best)
    measured = row(FINAL, 0, values, units(results.content["base"])) | {"levers": [best.label]}
    results.content["best_with_levers"] = measured
    results.save()
    console.print(f"best lever: {best.label}: {summary(measured)}", highlight=False)


def summary(found: dict[str, Any]) -> str:
    """An arm in a line."""
    gap, harm = gap_at(found), found["against_base"][f"{MAIN} ce exact"]
    return (
        f"gap@{KEYS} {gap['mean']:.3f} [{gap['low']:.3f}, {gap['high']:.3f}], "
        f"recall@{KEYS} {found['recall_text'][str(KEYS)]:.3f}, "
        f"exact CE {harm['mean']:+.3f} [{harm['low']:+.3f}, {harm['high']:+.3f}]"
    )


def join(paths: Sequence[Path], results: Results) -> None:
    """Add the arms of other files, measured against the same base.

    Raises:
        ValueError: two files disagree about settings or the untuned model.
    """
    for path in paths:
        other = json.loads(path.read_text())
        if not results.content.get("base"):
            results.content |= {key: value for key, value in other.items() if key != "arms"}
        for key in ("settings", "base"):
            aside = {"levers", "commit"}  # what was added later, and which code found the same
            mine, theirs = ({k: v for k, v in c[key].items() if k not in aside} for c in (results.content, other))
            if mine != theirs:
                raise ValueError(f"{path}: another {key} than in {results.path}")
        results.content |= {k: v for k, v in other.items() if k == "best_with_levers"}
        results.arms.extend(a for a in other.get("arms", []) if not results.has(a["name"], a["seed"]))
        mine = {(arm["name"], arm["seed"]): arm for arm in [results.content["base"], *results.arms]}
        for arm in [other["base"], *other.get("arms", [])]:
            if "levers" in arm:
                mine[arm["name"], arm["seed"]].setdefault("levers", {}).update(arm["levers"])
    results.save()


def markdown(content: dict[str, Any]) -> str:
    """The tables of docs/objectives.md."""
    base = content["base"]
    decoded = [arm for arm in base["needles"] if arm != "exact"]
    few, many = decoded[0], decoded[-1]
    lines = [
        f"| arm | seeds | gap@{KEYS} | gap@{BUDGETS[0]} | gap@{BUDGETS[-1]} | gap@{KEYS}, {max(CONTEXTS)} tokens "
        f"| recall@{KEYS} | exact CE | answers CE | {few.replace('mage ', 'found@')} "
        f"| {few.replace('mage ', 'copied@')} | {many.replace('mage ', 'forwards@')} | minutes |",
        "|---|" + "---:|" * 12,
    ]
    names = list(dict.fromkeys(arm["name"] for arm in content["arms"]))
    for name in ("base", *names):
        seeds = [base] if name == "base" else [arm for arm in content["arms"] if arm["name"] == name]
        lines.append("| " + " | ".join([name, *cells(seeds, few, many)]) + " |")
    return "\n".join(lines) + "\n\n" + levers_table(content)


def cells(seeds: Sequence[dict[str, Any]], few: str, many: str) -> list[str]:
    """Means over the seeds of an arm; what is decoded with few and with many keys by the names it has in the file."""

    def mean(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
        return f"{np.mean(values):{'+' if sign else ''}.{digits}f}"

    def gap(context: int, budget: int) -> str:
        return mean([arm["gap"][str(context)][str(budget)]["mean"] for arm in seeds])

    harm = [arm["against_base"][f"{MAIN} ce exact"]["mean"] for arm in seeds if "against_base" in arm]
    answers = [arm["against_base"]["answers"]["mean"] for arm in seeds if "against_base" in arm]
    return [
        str(len(seeds)),
        *(gap(MAIN, budget) for budget in (KEYS, BUDGETS[0], BUDGETS[-1])),
        gap(max(CONTEXTS), KEYS),
        mean([arm["recall_text"][str(KEYS)] for arm in seeds]),
        mean(harm, sign=True) if harm else "",
        mean(answers, sign=True) if answers else "",
        *(
            mean([arm[task][decoded]["mean"] for arm in seeds], digits) if decoded in seeds[0][task] else ""
            for task, decoded, digits in (("needles", few, 2), ("copied", few, 2), ("forwards_per_block", many, 1))
        ),
        mean([arm["minutes"] for arm in seeds], 1) if "minutes" in seeds[0] else "",
    ]


def levers_table(content: dict[str, Any]) -> str:
    """Gap at k = 128 of every lever, on the untuned model and on the recipe's."""
    models = {"base": content["base"]} | {arm["name"]: arm for arm in content["arms"] if "levers" in arm}
    models = {name: found for name, found in models.items() if "levers" in found}
    if not models:
        return ""
    lines = [f"| lever, k = {KEYS} | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    for lever in dict.fromkeys(lever for found in models.values() for lever in found["levers"]):
        gaps = [found["levers"].get(lever, {}).get("gap") for found in models.values()]
        shown = [f"{gap['mean']:.3f} [{gap['low']:.3f}, {gap['high']:.3f}]" if gap else "" for gap in gaps]
        lines.append(f"| {lever} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plot(content: dict[str, Any], path: Path) -> None:
    """`draw_gap` to a path and `draw_arms` to NAME-arms beside it, light and dark."""
    in_both_styles(lambda target: draw_gap(content, target), path)
    in_both_styles(lambda target: draw_arms(content, target), path.with_name(f"{path.stem}-arms{path.suffix}"))


def draw_gap(content: dict[str, Any], path: Path) -> None:
    """Gap against k before and after, a panel per context, and what measured layer budgets make of it."""
    import matplotlib.pyplot as plt

    after = next((arm for arm in content["arms"] if arm["name"] == FINAL), None)
    models = [("untuned", "#7a7a7a", content["base"])] + ([("tuned", "#1f6feb", after)] if after else [])
    contexts = list(content["base"]["gap"])
    figure, panels = plt.subplots(1, len(contexts), figsize=(10, 3.6), sharey=True, layout="constrained")
    for panel, context in zip(np.atleast_1d(panels), contexts, strict=True):
        for label, color, model in models:
            gaps = model["gap"][context]
            low, high = ([gap[end] for gap in gaps.values()] for end in ("low", "high"))
            panel.fill_between([int(k) for k in gaps], low, high, color=color, alpha=0.15, linewidth=0)
            panel.plot([int(k) for k in gaps], [gap["mean"] for gap in gaps.values()], "o-", color=color, label=label)
            if (gap := budgeted_gap(content, model, context)) is not None:
                panel.plot(KEYS, gap, "*", color=color, markersize=13, label=f"{label}, keys per layer measured")
        panel.set_xscale("log", base=2)
        panel.set_xticks(BUDGETS, [str(k) for k in BUDGETS])
        panel.axhline(0, color=plt.rcParams["text.color"], linewidth=0.8)
        panel.set(title=f"{context} tokens of context", xlabel="keys kept per layer, k")
    panel = np.atleast_1d(panels)[0]
    panel.set_ylabel("CE gap to exact and untuned, nats")
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def budgeted_gap(content: dict[str, Any], model: dict[str, Any], context: str) -> float | None:
    """The gap of a model under its own measured layer budgets, where that was measured."""
    best = content.get("best_with_levers", {})
    if model["name"] == FINAL and best.get("levers") == [MEASURED]:
        return float(best["gap"][context][str(KEYS)]["mean"])
    found = model.get("levers", {}).get(MEASURED) if int(context) == MAIN else None
    return None if found is None else float(found["gap"]["mean"])


def draw_arms(content: dict[str, Any], path: Path) -> None:
    """What arms of equal tokens change: the loss behind the kept keys, recall, and exact attention's loss."""
    import matplotlib.pyplot as plt

    shown = {
        f"{MAIN} ce mage {KEYS}": f"CE, keys chosen at\nall-[MASK], k = {KEYS}, nats",
        f"{MAIN} recall mage {KEYS}": f"recall@{KEYS}",
        f"{MAIN} ce exact": "CE with exact\nattention, nats",
    }
    full = {arm.name for arm in ARMS if arm.full}
    done = [arm for arm in content["arms"] if arm["seed"] == 0 and arm["name"] not in full]
    done = [arm for arm in done if "train.steps" not in arm["changes"]]  # those of earlier recipes
    equal = sorted(done, key=lambda arm: arm["against_base"][next(iter(shown))]["mean"])
    size = (10, 1.2 + 0.24 * max(len(equal), 9))
    figure, panels = plt.subplots(1, len(shown), figsize=size, sharey=True, layout="constrained")
    for panel, (metric, label) in zip(panels, shown.items(), strict=True):
        changes = [arm["against_base"][metric] for arm in equal]
        mean, low, high = (np.array([change[key] for change in changes]) for key in ("mean", "low", "high"))
        error = np.stack([mean - low, high - mean])
        panel.errorbar(mean, range(len(equal)), xerr=error, fmt="o", color="#1f6feb", markersize=4, capsize=2)
        panel.axvline(0, color=plt.rcParams["text.color"], linewidth=0.8)
        panel.set(xlabel=f"change of {label}")
        panel.locator_params(axis="x", nbins=5)
        panel.grid(axis="y", alpha=0.2)
    panels[0].set_yticks(range(len(equal)), [arm["name"] for arm in equal])
    panels[0].invert_yaxis()
    figure.suptitle(f"Objectives after {STEPS} steps, 95 % intervals over windows")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gap_at(arm: dict[str, Any]) -> dict[str, float]:
    """The gap that arms are judged by."""
    found: dict[str, float] = arm["gap"][str(MAIN)][str(KEYS)]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to run, by name; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of those that an arm has; all by default")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th arm from the I-th on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="print the arms and their commands")
    parser.add_argument(
        "--levers", nargs="*", metavar="MODEL", help="measure the inference-side levers; on base and recipe by default"
    )
    parser.add_argument("--lever", nargs="+", metavar="LABEL", help="some levers alone")
    parser.add_argument("--best-lever", action="store_true", help="measure everything under the recipe's best lever")
    parser.add_argument("--table", action="store_true", help="print the Markdown tables of the results file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the results file")
    parser.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="add the arms of other results files")
    parser.add_argument("--commit", help="the toolkit's commit, where the run is made on a copy without its history")
    arguments = parser.parse_args(argv)
    results, console = Results(arguments.out), Console(stderr=True, width=160)
    known = {arm.name: arm for arm in ARMS}
    unknown = [name for name in arguments.only or [] if name not in known]
    if unknown:
        print(f"error: no arm {unknown[0]!r}; arms: {', '.join(known)}", file=sys.stderr)
        return 2
    part, of = (int(number) for number in arguments.shard.split("/"))
    chosen = [known[name] for name in arguments.only or known][part::of]
    chosen = [replace(arm, seeds=tuple(seed for seed in arm.seeds if seed in arguments.seeds)) for arm in chosen]
    try:
        if arguments.list:
            for arm in chosen:
                print(f"{arm.name}: {arm.why}\n    mage-tune train {RECIPE} --set {' --set '.join(arm.overrides(0))}")
        elif arguments.table:
            print(markdown(results.content))
        elif arguments.plot:
            plot(results.content, arguments.plot)
        elif arguments.join:
            join(arguments.join, results)
        elif arguments.levers is not None:
            run_levers(results, arguments.levers or ["base", FINAL], arguments.lever)
        elif arguments.best_lever:
            best_lever(results, console)
        else:
            run(chosen, results, console, arguments.commit)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
