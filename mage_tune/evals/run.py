"""`mage-tune eval`: base against adapter, exact against sparse, on the same prompts with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mage_tune.backbone import causal_lm
from mage_tune.data.text import load_ids
from mage_tune.decode.cache import PrefixCache
from mage_tune.environment import environment
from mage_tune.evals.needles import TASKS, NeedlePrompt, NeedleResult, ask, needle_prompts
from mage_tune.evals.probes import ProbedBlock, probe_text
from mage_tune.evals.report import print_tables, write_report
from mage_tune.evals.stats import estimate, paired_difference, unit_means
from mage_tune.lm import BlockDiffusionLM, load
from mage_tune.recipe import Eval, Recipe, RecipeError, load_recipe, override_section

SEED = 1234
"""Seed of reveals and needle prompts: the same for every model, so that results can be compared."""
ATTENTIONS = ("exact", "mage")
"""How the needle questions are answered."""


def evaluate(target: str, *, adapter: str | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a run folder (base against its adapter) or a model, and write results, plots and report.

    Args:
        target: run folder, checkpoint folder or Hub id.
        adapter: adapter to compare with the base, when `target` is a model.
        overrides: "key=value" of the recipe's `eval` section.

    Returns:
        What `eval/results.json` holds: settings, environment, per-arm estimates, paired differences, all records.

    Raises:
        RecipeError: an override is wrong, or the settings ask for what the model cannot do.
    """
    folder = Path(target)
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        settings, base, adapter, out = recipe.eval, model_path(recipe, folder), str(folder), folder / "eval"
        dtype = recipe.model.dtype
    else:
        settings, base, out = Eval(), target, Path("runs") / f"eval-{folder.name}" / "eval"
        dtype = "auto"
    settings = override_section(settings, overrides or [])
    lm = load(base, adapter=adapter, dtype=dtype)
    check_settings(settings, lm)
    result = measure(lm, settings, has_adapter=adapter is not None)
    paths = {"text": settings.text, "model": base, "adapter": adapter}
    result["settings"] |= {name: shown(path) for name, path in paths.items()}
    result["settings"] |= {"dtype": str(lm.dtype), "seed": SEED}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(result, out)
    print_tables(result)
    return result


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


def measure(lm: BlockDiffusionLM, settings: Eval, *, has_adapter: bool) -> dict[str, Any]:
    """Run every arm and gather estimates, paired differences and raw records."""
    assert settings.text is not None
    filler = load_ids(settings.text, lm.tokenizer, lm.family)
    windows = cut_windows(filler, settings.context, settings.documents)
    arms = ["base", "adapter"] if has_adapter else ["base"]
    prompts = {
        task: needle_prompts(
            lm,
            filler,
            context=settings.context,
            needles=settings.needles,
            asked=asked,
            questions=settings.questions,
            seed=SEED,
        )
        for task, asked in (TASKS.items() if settings.needles else ())
    }
    answers = len(ATTENTIONS) * settings.questions * len(prompts)
    records: dict[str, dict[str, Any]] = {}
    with progress(len(arms) * (len(windows) + answers)) as advance:
        for arm in arms:
            with without_adapter(lm) if arm == "base" and has_adapter else nullcontext():
                blocks = probe_text(
                    lm,
                    windows,
                    blocks=settings.blocks,
                    budgets=settings.budgets,
                    dense_layers=settings.dense_layers,
                    seed=SEED,
                    on_window=advance,
                )
                answered = {task: needle_arms(lm, asked, settings, advance) for task, asked in prompts.items()}
            records[arm] = {"text": blocks, "needles": answered}
    return summarise(records, settings, hashlib.sha256(filler.tobytes()).hexdigest())


def needle_arms(
    lm: BlockDiffusionLM, prompts: list[NeedlePrompt], settings: Eval, advance: Callable[[], None]
) -> dict[str, list[NeedleResult]]:
    """One needle task with exact and with sparse attention."""
    answers: dict[str, list[NeedleResult]] = {attention: [] for attention in ATTENTIONS}
    for prompt in prompts:
        cache = PrefixCache.for_model(lm.model, 1, 0)  # grows as needed; read once for all rules
        for attention, results in answers.items():
            results.append(
                ask(
                    lm,
                    prompt,
                    attention=attention,
                    budget=settings.needle_budget,
                    dense_layers=settings.dense_layers,
                    threshold=settings.threshold,
                    cache=cache,
                )
            )
            advance()
    return answers


def cut_windows(tokens: np.ndarray, length: int, count: int) -> list[np.ndarray]:
    """`count` disjoint windows spread evenly over the held-out tokens.

    Raises:
        RecipeError: the text is too short for that many.
    """
    fitting = len(tokens) // length
    if fitting < count:
        raise RecipeError(
            f"eval.documents: the held-out text has {len(tokens)} tokens, enough for {fitting} windows of {length}; "
            f"{count} were asked for"
        )
    starts = np.linspace(0, fitting - 1, count).round().astype(int) * length
    return [tokens[start : start + length] for start in starts]


def text_metrics(blocks: list[ProbedBlock], budgets: list[int]) -> dict[str, np.ndarray]:
    """Metric name -> mean of every window."""
    units = [b.window for b in blocks]
    metrics = {
        "ce_exact": unit_means([b.ce_exact for b in blocks], units),
        "query_cosine": unit_means([b.query_cosine for b in blocks], units),
    }
    for i, k in enumerate(budgets):
        metrics[f"recall@{k}"] = unit_means([b.recall[i] for b in blocks], units)
        metrics[f"mass@{k}"] = unit_means([b.mass[i] for b in blocks], units)
        metrics[f"ce_mask@{k}"] = unit_means([b.ce_mask[i] for b in blocks], units)
        metrics[f"ce_oracle@{k}"] = unit_means([b.ce_oracle[i] for b in blocks], units)
        metrics[f"ce_gap@{k}"] = metrics[f"ce_mask@{k}"] - metrics["ce_exact"]
    return metrics


def needle_metrics(results: dict[str, dict[str, list[NeedleResult]]]) -> dict[str, np.ndarray]:
    """Metric name -> value of every question."""
    metrics = {}
    for task, arms in results.items():
        for attention, answers in arms.items():
            metrics[f"{task}_{attention}"] = np.array([a.is_right for a in answers])
            if TASKS[task] > 1:  # of one value, the share found says nothing new
                metrics[f"{task}_{attention}_found"] = np.array([a.share_found for a in answers])
            metrics[f"{task}_{attention}_forwards"] = np.array([a.forwards_per_block for a in answers])
    return metrics


def summarise(records: dict[str, dict[str, Any]], settings: Eval, text_sha256: str) -> dict[str, Any]:
    """Estimates of every arm, paired adapter - base differences, and everything they came from."""
    per_unit = {
        arm: text_metrics(found["text"], settings.budgets) | needle_metrics(found["needles"])
        for arm, found in records.items()
    }
    estimates = {arm: {name: asdict(estimate(v)) for name, v in metrics.items()} for arm, metrics in per_unit.items()}
    paired: dict[str, Any] = {}
    if "adapter" in per_unit:
        paired = {
            name: asdict(paired_difference(after, per_unit["base"][name]))
            for name, after in per_unit["adapter"].items()
        }
    return {
        "settings": settings.model_dump() | {"text_sha256": text_sha256},
        "environment": environment(),
        "arms": estimates,
        "paired": paired,
        "records": {
            arm: {
                "text": [asdict(b) for b in found["text"]],
                "needles": {
                    task: {attention: [asdict(r) for r in answers] for attention, answers in arms.items()}
                    for task, arms in found["needles"].items()
                },
            }
            for arm, found in records.items()
        },
    }


@contextmanager
def without_adapter(lm: BlockDiffusionLM) -> Iterator[None]:
    """The same weights with the adapter switched off."""
    assert isinstance(lm.model, PeftModel)
    with lm.model.disable_adapter():
        yield


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar with ETA on a terminal; a line per tenth of the work in a log. Yields the function that advances it."""
    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=total)
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                console.print(f"evaluating: {done}/{total}")

        yield advance
