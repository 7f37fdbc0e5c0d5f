"""The model card: metadata that the Hub accepts, and a body made of the run's own records (card.md.jinja).

Every number comes from a file of the run. The same run gives the same card, so publishing it again changes nothing.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mage_tune.evals.report import Section, headline, interval, number, sections, signed, summary
from mage_tune.publish.contents import WEIGHTS, Run, is_hub_id

VERDICTS = {"better": "✔ better", "worse": "✘ worse", "unclear": "~", "too few": "too few"}


@dataclass(frozen=True)
class Base:
    """What the card has to say about the base model."""

    id: str
    license: str
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] | None = None


class Metadata(BaseModel):
    """What the Hub demands of a model card's metadata, checked here so that no upload has to find out."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    base_model: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    base_model_relation: Literal["adapter", "finetune"]
    library_name: Literal["peft", "transformers"]
    pipeline_tag: Literal["text-generation"]
    license: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] | None = Field(None, min_length=1)
    datasets: list[str] | None = Field(None, min_length=1)
    tags: list[str] = Field(min_length=1)
    model_index: list[dict[str, Any]] | None = Field(None, alias="model-index", min_length=1)

    @model_validator(mode="after")
    def _other_is_explained(self) -> Metadata:
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError("license 'other' needs license_name and license_link")
        return self


def make_card(run: Run, base: Base, repo_id: str, recipe_yaml: str, merge_report: dict[str, Any] | None) -> str:
    """The card's whole text.

    Args:
        run: the run.
        base: its base model.
        repo_id: where it will be published.
        recipe_yaml: the resolved recipe as it is published.
        merge_report: merge.json of a merged checkpoint; None for an adapter.

    Raises:
        ValueError: the Hub would refuse the metadata.
    """
    data = metadata(run, base, repo_id, is_merged=merge_report is not None)
    check_metadata(data.to_dict())
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("card.md.jinja")
    body = page.render(
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2],
        base=base,
        family=run.family,
        recipe=run.recipe,
        recipe_yaml=recipe_yaml,
        terms=[name for name, term in run.recipe.objective.model_dump().items() if term["weight"]],
        rank=run.adapter["r"],
        versions=run.versions,
        training=training_facts(run),
        result=run.results,
        headline=headline(run.results) if run.results else None,
        summary=summary(run.results) if run.results else [],
        tables=[markdown_table(section) for section in sections(run.results)] if run.results else [],
        plots=[p.name for p in sorted((run.folder / "eval").glob("*.png")) if not p.stem.endswith("-dark")],
        merge=merge_report,
        layer_budgets=run.layer_budgets,
        sha256=hashlib.sha256((run.folder / WEIGHTS).read_bytes()).hexdigest(),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def metadata(run: Run, base: Base, repo_id: str, *, is_merged: bool) -> ModelCardData:
    """The front matter."""
    sources = [source.path for source in run.recipe.data.sources if is_hub_id(source.path)]
    return ModelCardData(
        base_model=base.id,
        base_model_relation="finetune" if is_merged else "adapter",
        library_name="transformers" if is_merged else "peft",
        pipeline_tag="text-generation",
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=base.language,
        datasets=list(dict.fromkeys(sources)) or None,
        tags=["diffusion", "block-diffusion", "sparse-attention", "mage_tune", *([] if is_merged else ["lora"])],
        model_name=repo_id.rpartition("/")[2] if run.results else None,  # it is the model-index's alone
        eval_results=eval_results(run.results) if run.results else None,
    )


def check_metadata(data: dict[str, Any]) -> None:
    """Hold the front matter against `Metadata`.

    Raises:
        ValueError: it does not fit; the message names the field.
    """
    try:
        Metadata.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "metadata"
        raise ValueError(f"the card's {where} would be refused by the Hub: {first['msg']}") from None


def eval_results(result: dict[str, Any]) -> list[EvalResult]:
    """The tuned model's numbers for the Hub's model-index; base and intervals are in the body's tables."""
    arm = "adapter" if "adapter" in result["arms"] else "base"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="mage_tune-text" if index == 0 else "mage_tune-needles",
            dataset_name=f"{section.title.partition(':')[0]}, {result['settings']['context']} tokens",
            metric_type=row.key.partition("@")[0],
            metric_name=row.label if index == 0 else f"{section.title.partition(': ')[2]}: {row.label}",
            metric_value=round(row.arms[arm].mean, 4),
        )
        for index, section in enumerate(sections(result))
        for row in section.rows
        if math.isfinite(row.arms[arm].mean)
    ]


def markdown_table(section: Section) -> dict[str, Any]:
    """A section as title, header and rows of words."""
    arms = list(section.rows[0].arms)
    has_change = section.rows[0].difference is not None
    lines = []
    for row in section.rows:
        cells = [f"{row.label} {row.direction}"]
        cells += [f"{number(value.mean)} ({interval(value)})" for value in row.arms.values()]
        if row.difference is not None and row.verdict is not None:
            change = f"{signed(row.difference.mean)} ({interval(row.difference, signed)})"
            cells += [change, VERDICTS[row.verdict]]
        lines.append(cells)
    header = ["", *arms, *(["paired change", ""] if has_change else [])]
    names = {"title": section.title, "units": section.units, "meanings": section.meanings}
    return names | {"header": header, "rows": lines}


def training_facts(run: Run) -> dict[str, str]:
    """The training in words, from metrics.jsonl."""
    recipe, lines = run.recipe, run.training
    facts = {
        "steps": f"{recipe.train.steps} of {recipe.train.rows * recipe.train.accumulation} rows "
        f"and {recipe.data.length} tokens",
        "peak learning rate": f"{recipe.train.learning_rate:g}",
        "seed": str(recipe.seed),
        "device": str(run.versions["device"]),
    }
    if recipe.model.quantise == "nf4":
        facts["base model held in"] = "4 bits (NF4, scales quantised too)"
    if lines:
        facts["loss, first to last logged step"] = f"{lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}"
        facts["tokens/s (median)"] = f"{statistics.median(line['tokens_per_s'] for line in lines):,.0f}"
        peaks = [line["peak_gib"] for line in lines if line.get("peak_gib")]
        if peaks:
            facts["peak memory"] = f"{max(peaks):.1f} GiB"
    known = ("mage_tune", "torch", "transformers", "peft")
    facts["versions"] = ", ".join(f"{name} {run.versions[name]}" for name in known)
    facts["commit of mage_tune"] = str(run.versions.get("commit"))
    return facts
