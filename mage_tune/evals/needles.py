"""Needles in a haystack: does a model still find what it was asked for when later steps see only the chosen keys?

One prompt is a haystack of filler text with key-value sentences in it, then one chat turn that asks for some of them:

    single       one needle, asked for                           finds the needle where there is nothing like it
    multi_key    one of many needles                             ... among others that look the same
    multi_value  all values of one key that has several          one question, several places
    multi_query  several keys at once                            ... and several keys

An answer counts when every value asked for appears in it. One needle alone proves little (a single needle survives
k = 8); asking for several at once needs keys that the all-[MASK] step cannot single out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from mage_tune.data.retrieval import (
    ADJECTIVES,
    NOUNS,
    Dialogue,
    Needle,
    draw_needles,
    filler_ids,
    make_haystack,
    question,
)
from mage_tune.decode.result import Generation
from mage_tune.evals.reading import Decoding, Reader, check_context, held_out_ids
from mage_tune.evals.tasks import (
    FORWARDS,
    Advance,
    Arm,
    Defaults,
    Measure,
    SampleRecord,
    Task,
    TaskResult,
    shortened,
)
from mage_tune.lm import BlockDiffusionLM

TASKS = {"single": 1, "multi": 3}
"""Needle tasks of a recipe's evaluation -> needles asked for in one question."""
NeedleKind = Literal["single", "multi_key", "multi_value", "multi_query"]
KINDS: tuple[NeedleKind, ...] = get_args(NeedleKind)
TITLES = {
    "single": "one needle",
    "multi_key": "one of many needles",
    "multi_value": "all values of one key",
    "multi_query": "several keys at once",
}


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about one haystack."""

    input_ids: np.ndarray
    expected: tuple[str, ...]
    depths: tuple[float, ...] = ()
    """Where each expected value stands: the share of the haystack before it."""


@dataclass(frozen=True)
class NeedleResult:
    """One answer: the values asked for, which of them are in it, its text and its cost."""

    expected: tuple[str, ...]
    found: tuple[bool, ...]
    text: str
    forwards_per_block: float

    @property
    def is_right(self) -> bool:
        """Whether every value asked for is there."""
        return all(self.found)

    @property
    def share_found(self) -> float:
        """Share of the values asked for that are there."""
        return float(np.mean(self.found))


def needle_prompts(
    lm: BlockDiffusionLM, text: np.ndarray, *, context: int, needles: int, asked: int, questions: int, seed: int
) -> list[NeedlePrompt]:
    """The same prompts for every arm: drawn from (seed, asked, question number) alone.

    Args:
        lm: its tokenizer's chat template words the question (a plain form without one); its weights are not used.
        text: (n,) token ids of held-out text to hide the needles in.
        context: tokens of the whole prompt.
        needles: sentences hidden in each haystack.
        asked: needles asked for in the one question.
        questions: prompts to make.
        seed: seed of everything drawn.
    """
    assert lm.tokenizer is not None
    filler, dialogue = filler_ids(text, lm.tokenizer, lm.family), Dialogue(lm.tokenizer, lm.family)
    prompts = []
    for number in range(questions):
        rng = np.random.default_rng([seed, asked, number])
        hidden = draw_needles(rng, needles)
        candidates = [n for n in hidden if len(n.values) == 1]
        wanted = [candidates[i] for i in rng.choice(len(candidates), size=asked, replace=False)]
        before, after = dialogue.prompt(question([n.key for n in wanted]))
        haystack, _ = make_haystack(rng, filler, lm.tokenizer, context - len(before) - len(after), hidden)
        prompts.append(NeedlePrompt(np.concatenate([before, haystack, after]), tuple(n.values[0] for n in wanted)))
    return prompts


def grid_prompt(
    lm: BlockDiffusionLM,
    filler: np.ndarray,
    kind: NeedleKind,
    length: int,
    depth: float,
    *,
    needles: int,
    asked: int,
    rng: np.random.Generator,
) -> NeedlePrompt:
    """One prompt of the depth by length grid.

    Args:
        filler: (n,) ids of held-out text, from `filler_ids`.
        length: tokens of the whole prompt.
        depth: share of the haystack before the first value asked for; others follow at equal distances, wrapping
            round at the end.
        needles: sentences in the haystack, those asked for included; `single` has one.
        asked: values asked for by multi_value and multi_query.

    Raises:
        ValueError: the needles do not fit.
    """
    assert lm.tokenizer is not None
    count = asked if kind in ("multi_value", "multi_query") else 1
    depths = tuple(sorted((depth + i / count) % 1.0 if count > 1 else depth for i in range(count)))
    others = 0 if kind == "single" else needles - count
    keys, values = _draw(rng, others + count)
    if kind == "multi_value":
        wanted = [Needle(keys[0], tuple(values[:count]), depths)]
    else:
        wanted = [Needle(key, (value,), (at,)) for key, value, at in zip(keys, values[:count], depths, strict=False)]
    hidden = wanted + [Needle(key, (value,)) for key, value in zip(keys[count:], values[count:], strict=True)]
    before, after = Dialogue(lm.tokenizer, lm.family).prompt(
        question([needle.key for needle in wanted], every=kind == "multi_value")
    )
    room = length - len(before) - len(after)
    try:
        haystack, placed = make_haystack(rng, filler, lm.tokenizer, room, hidden)
    except ValueError as error:
        raise ValueError(f"needles: {error} left beside the question in a context of {length}") from None
    found = [needle for needle in placed if needle.key in {w.key for w in wanted}]
    return NeedlePrompt(
        np.concatenate([before, haystack, after]),
        tuple(value for needle in found for value in needle.values),
        tuple(at for needle in found for at in needle.depth),
    )


def _draw(rng: np.random.Generator, count: int) -> tuple[list[str], list[str]]:
    """Keys and values, all different."""
    drawn = rng.choice(len(ADJECTIVES) * len(NOUNS), size=count, replace=False)
    keys = [f"{ADJECTIVES[d // len(NOUNS)]}-{NOUNS[d % len(NOUNS)]}" for d in drawn]
    return keys, [str(v) for v in rng.choice(900_000, size=count, replace=False) + 100_000]


def score(prompt: NeedlePrompt, out: Generation) -> NeedleResult:
    """Which of the values asked for are in an answer."""
    text = out.text or ""
    found = tuple(value in text for value in prompt.expected)
    return NeedleResult(prompt.expected, found, text, out.forwards_per_block)


RIGHT = Measure("right answers", True, "share of questions whose answer has every value asked for", "questions")
FOUND = Measure("values found", True, "share of the values asked for that are in the answer", "questions")


FORWARDS_ASKED = replace(FORWARDS, unit="questions")


class NeedleTask(Task):
    """Questions of one kind over a grid of context lengths and depths.

    Args:
        kind: what is asked.
        name: unique in the suite.
        lengths: tokens of the prompts.
        depths: shares of the haystack before the (first) value asked for.
        needles: sentences in a haystack (`single` has one).
        asked: values asked for by multi_value and multi_query.
        questions: prompts per cell of the grid.
        steps: denoising steps per block; None goes by the threshold.
    """

    headline = "found"
    kind: ClassVar[str] = "needles"
    measures: Mapping[str, Measure] = {"right": RIGHT, "found": FOUND, "forwards": FORWARDS_ASKED}

    def __init__(
        self,
        defaults: Defaults,
        needle_kind: NeedleKind,
        *,
        name: str,
        lengths: Sequence[int],
        depths: Sequence[float],
        needles: int,
        asked: int,
        questions: int,
        steps: int | None,
    ) -> None:
        self.name, self.title = name, f"Needles: {TITLES[needle_kind]}"
        self.needle_kind, self.text, self.seed, self.threshold = (
            needle_kind,
            defaults.text,
            defaults.seed,
            (defaults.threshold),
        )
        self.lengths, self.depths, self.needles, self.questions = list(lengths), list(depths), needles, questions
        self.asked, self.steps = asked, steps
        self.settings = {
            "kind": needle_kind,
            "lengths": self.lengths,
            "depths": self.depths,
            "needles": needles if needle_kind != "single" else 1,
            "asked": asked if needle_kind in ("multi_value", "multi_query") else 1,
            "questions": questions,
            "threshold": defaults.threshold,
            "steps": steps,
            "seed": defaults.seed,
        }
        self.cells: list[tuple[int, float, int]] = [
            (length, depth, number) for length in lengths for depth in depths for number in range(questions)
        ]
        self.samples = len(self.cells)
        self.prompts: list[NeedlePrompt] = []
        self.reader = Reader()

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Hide the needles."""
        filler = haystack_text(lm, self.text)
        for length in self.lengths:
            check_context(lm, f"{self.name}: length", length, new=self.decoding(lm).max_new_tokens)
        self.prompts = [
            grid_prompt(
                lm,
                filler,
                self.needle_kind,
                length,
                depth,
                needles=self.needles,
                asked=self.asked,
                rng=np.random.default_rng(
                    [self.seed, KINDS.index(self.needle_kind), length, round(1000 * depth), number]
                ),
            )
            for length, depth, number in self.cells
        ]
        return digest(self.prompts)

    def decoding(self, lm: BlockDiffusionLM) -> Decoding:
        """How answers are written."""
        size = lm.family.block_size
        steps = self.steps if self.steps is None else min(self.steps, size)
        return Decoding(size * (1 + int(self.settings["asked"])), self.threshold, steps)

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Ask every question."""
        names = [f"{length} tokens, depth {depth:g}, {number + 1}" for length, depth, number in self.cells]
        facts: list[dict[str, Any]] = [{"length": length, "depth": depth} for length, depth, _ in self.cells]
        return ask(lm, arm, self.prompts, names, facts, self.decoding(lm), self.reader, advance)

    def release(self) -> None:
        """Forget what was read of the prompts."""
        self.reader.forget()


class RecipeNeedles(Task):
    """A needle task of a recipe's `eval` section: one context length, needles anywhere, several asked for by `multi`.

    Its keys are those that results and cards have always had: multi_mage, multi_mage_found, multi_mage_forwards.
    """

    headline = "right"
    kind: ClassVar[str] = "needles"

    def __init__(
        self, defaults: Defaults, name: str, *, context: int, needles: int, questions: int, filler: np.ndarray
    ) -> None:
        self.name, self.title, self.asked = name, f"Needles: {name}", TASKS[name]
        self.context, self.needles, self.samples, self.defaults = context, needles, questions, defaults
        self.filler = filler
        self.measures = {"right": RIGHT, "forwards": FORWARDS_ASKED} | ({"found": FOUND} if self.asked > 1 else {})
        self.settings = {
            "asked": self.asked,
            "context": context,
            "needles": needles,
            "questions": questions,
            "threshold": defaults.threshold,
            "seed": defaults.seed,
        }
        self.prompts: list[NeedlePrompt] = []
        self.reader = Reader()

    def key(self, metric: str, arm: Arm) -> str:
        """ "multi_mage" and so on; a recipe has one budget for its needles."""
        return f"{self.name}_{arm.rule}" + ("" if metric == "right" else f"_{metric}")

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Hide the needles."""
        self.prompts = needle_prompts(
            lm,
            self.filler,
            context=self.context,
            needles=self.needles,
            asked=self.asked,
            questions=self.samples,
            seed=self.defaults.seed,
        )
        return digest(self.prompts)

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Ask every question."""
        decoding = Decoding(lm.family.block_size * (1 + self.asked), self.defaults.threshold)
        names = [f"question {i + 1}" for i in range(len(self.prompts))]
        found = ask(lm, arm, self.prompts, names, [{} for _ in names], decoding, self.reader, advance)
        # Of one value, the share found says nothing new.
        kept = {name: values for name, values in found.metrics.items() if name in self.measures}
        return replace(found, metrics=kept)

    def release(self) -> None:
        """Forget what was read of the prompts."""
        self.reader.forget()


def haystack_text(lm: BlockDiffusionLM, text: str | None) -> np.ndarray:
    """Ids of the held-out text.

    Raises:
        ValueError: there is none, or no tokenizer to ask with.
    """
    if lm.tokenizer is None:
        raise ValueError("needles: this model has no tokenizer to ask with; leave the needle tasks out")
    if text is None:
        raise ValueError("text: held-out text is needed to hide needles in; give a file (--set text=PATH)")
    return filler_ids(held_out_ids(lm, text), lm.tokenizer, lm.family)


def ask(
    lm: BlockDiffusionLM,
    arm: Arm,
    prompts: Sequence[NeedlePrompt],
    names: Iterable[str],
    facts: Iterable[dict[str, Any]],
    decoding: Decoding,
    reader: Reader,
    advance: Advance,
) -> TaskResult:
    """Answer prompts greedily and score the answers; `names` and `facts` are of each prompt."""
    metrics: dict[str, list[Any]] = {"right": [], "found": [], "forwards": []}
    records = []
    for prompt, name, known in zip(prompts, names, facts, strict=True):
        out, seconds = reader.answer(lm, prompt.input_ids, arm, decoding)
        result = score(prompt, out)
        metrics["right"].append(result.is_right)
        metrics["found"].append(result.share_found)
        metrics["forwards"].append(result.forwards_per_block)
        told = {"expected": list(prompt.expected), "found": list(result.found)}
        if prompt.depths:
            told["depths"] = [round(depth, 4) for depth in prompt.depths]
        told["is_right"] = result.is_right
        told["sparse_share"] = sparse_steps(out)
        records.append(
            SampleRecord(name, shortened(result.text), result.forwards_per_block, seconds, dict(known) | told)
        )
        advance()
    return TaskResult(metrics, records, decoding.settings())


def sparse_steps(out: Generation) -> float:
    """Share of the denoising forwards that were sparse."""
    forwards = out.forwards
    return forwards["sparse"] / max(1, forwards["exact"] + forwards["sparse"])


def digest(prompts: Sequence[NeedlePrompt]) -> str:
    """Of the prompts and what they expect."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(np.ascontiguousarray(prompt.input_ids, dtype=np.int64).tobytes())
        total.update(repr(prompt.expected).encode())
    return total.hexdigest()
