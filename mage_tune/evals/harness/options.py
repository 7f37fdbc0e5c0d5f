"""What a suite may say of a public benchmark, checked when the suite is read."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
"""The thirteen tasks of RULER (arXiv 2404.06654), as lm-eval calls them."""
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""Those made from word lists and fixed sentences alone; the others need essays or questions from the web."""
LONGBENCH = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
)
"""The 21 tasks of LongBench v1 (arXiv 2308.14508)."""
PAPER_SIX = ("hotpotqa", "narrativeqa", "qasper", "qmsum", "repobench-p", "triviaqa")
"""The six that MAGE v2 reports; what `kind: longbench` runs when a suite names no tasks."""

Options = TypeVar("Options", bound="BenchmarkOptions")


class BenchmarkOptions(BaseModel):
    """What every benchmark takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: int | None = Field(None, ge=1, description="Samples of each task; all of them when null.")
    chat: bool | None = Field(
        None, description="Ask through the chat template; null: where there is one and the task wants text."
    )
    threshold: float | None = Field(None, ge=0, le=1, description="Acceptance threshold; the suite's when null.")
    steps: int | None = Field(None, ge=1, description="Denoising steps of a block; as many as it takes when null.")
    batch_size: int = Field(16, ge=1, description="Most prompts that decode together.")
    batch_tokens: int = Field(131_072, ge=1, description="Most tokens that a batch holds; one prompt always goes.")


class LmEvalOptions(BenchmarkOptions):
    """`kind: lm_eval`: any tasks, groups or tags of lm-evaluation-harness."""

    tasks: list[str] = Field(min_length=1, description="Names as `lm_eval ls tasks` gives them.")
    shots: int | None = Field(None, ge=0, description="Worked examples ahead of the question; the task's when null.")
    lengths: list[int] = Field([4096], min_length=1, description="Of RULER's tasks: tokens of prompt and answer.")
    cache: str | None = Field(None, description="Folder of RULER's samples; the user's cache when null.")


class RulerOptions(BenchmarkOptions):
    """`kind: ruler`: RULER's tasks at some lengths."""

    tasks: list[str] = Field(list(RULER), min_length=1, description="Some of RULER's thirteen tasks.")
    limit: int = Field(32, ge=1, description="Samples of each task at each length.")
    lengths: list[int] = Field([4096], min_length=1, description="Tokens of prompt and answer together.")
    cache: str | None = Field(None, description="Folder of the samples; the user's cache when null.")


class LongBenchOptions(BenchmarkOptions):
    """`kind: longbench`: LongBench v1's tasks."""

    tasks: list[str] | Literal["all"] = Field(list(PAPER_SIX), description='Some of the 21 tasks, or "all".')
    path: str | None = Field(None, description="Folder of TASK.jsonl files, or data.zip; the Hub's when null.")
    max_length: int | None = Field(
        None, ge=256, description="Tokens of the prompt before its middle is cut; as many as fit when null."
    )


def read_options(kind: str, model: type[Options], options: dict[str, Any]) -> Options:
    """Options as a suite gives them to `kind: ...`, checked.

    Raises:
        ValueError: one is unknown or cannot be; names it and, if it is near one, that.
    """
    try:
        return model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{kind}: unknown key {key!r}{near(key, model.model_fields)}") from None
        raise ValueError(f"{kind}: key {key!r}: {first['msg'].lower()}, got {first['input']!r:.60}") from None


def check_names(what: str, names: list[str], known: Any) -> None:
    """Make sure that every name is known.

    Raises:
        ValueError: one is not; names those near it.
    """
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}{near(name, known)}")


def near(name: str, known: Any) -> str:
    """ "; did you mean ...?", or what there is where nothing is near and that is not much."""
    found = difflib.get_close_matches(name, list(known), n=3)
    if found:
        return f"; did you mean {' or '.join(map(repr, found))}?"
    return f" (known: {', '.join(known)})" if len(known) <= 30 else ""
