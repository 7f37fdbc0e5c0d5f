"""Any task, group or tag of lm-evaluation-harness as one task of an evaluation.

lm-eval makes the prompts, asks our model, filters and scores; we keep its per-sample scores, which is what paired
statistics need. Corpus-level metrics (BLEU over a test set, say) have no value per sample and are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import lm_eval.api.task
import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from mage_tune.evals.harness.model import HarnessLM
from mage_tune.evals.harness.options import BenchmarkOptions, near
from mage_tune.evals.tasks import (
    FORWARDS,
    Advance,
    Arm,
    Defaults,
    Measure,
    SampleRecord,
    Skipped,
    Task,
    TaskResult,
    bools,
    floats,
    shortened,
)
from mage_tune.lm import BlockDiffusionLM

YES_OR_NO = {"acc", "acc_norm", "exact_match"}
"""lm-eval's metrics that are right or wrong for every sample."""
ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Each (log-likelihood, weight) per text; of the three only bits per byte has a meaning text by text."""
BITS = Measure("bits per byte", False, "negative log2-likelihood of a text per byte of it", unit="texts")


class LmEvalTask(Task):
    """One name of lm-eval's: a task, or a group or tag, whose tasks' samples then follow one another."""

    kind = "lm_eval"

    def __init__(self, name: str, options: BenchmarkOptions, defaults: Defaults, shots: int | None = None) -> None:
        self.name = self.title = name
        self.spec = name
        self.options, self.seed, self.shots = options, defaults.seed, shots
        self.threshold = defaults.threshold if options.threshold is None else options.threshold
        self.settings: dict[str, Any] = {
            "task": name,
            "limit": options.limit,
            "shots": shots,
            "chat": options.chat,
            "threshold": self.threshold,
            "steps": options.steps,
            "seed": defaults.seed,
        }
        self.measures: Mapping[str, Measure] = {"forwards": FORWARDS, "bits_per_byte": BITS}
        self.loaded: dict[str, Any] = {}
        self.is_chat = False
        self.digest = ""

    def takes(self, arm: Arm) -> bool:
        """Levers change what later steps of a block see, which a likelihood does not know."""
        likelihoods = any(task.OUTPUT_TYPE != "generate_until" for task in self.loaded.get("tasks", {}).values())
        return not (likelihoods and arm.levers.is_used)

    # -- before anything is measured

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Load the task's data and make its prompts; see `Task.prepare`."""
        harness = self.harness(lm)
        with seeded(self.seed), quiet(lm_eval.api.task):
            self.loaded = self.load(lm)
            for task in self.loaded["tasks"].values():
                self._configure(task)
            outputs = {task.OUTPUT_TYPE for task in self.loaded["tasks"].values()}
            has_template = bool(getattr(lm.tokenizer, "chat_template", None))
            if self.options.chat and not has_template:
                raise ValueError(f"{self.name}: chat: true, but the tokenizer has no chat template")
            generates = outputs == {"generate_until"}
            self.is_chat = has_template and generates if self.options.chat is None else self.options.chat
            asked = [instance for task in self.loaded["tasks"].values() for instance in self._requests(task, harness)]
        self.samples = len(asked)
        self.check(asked, harness)
        self.digest = digest(asked)
        return self.digest

    def load(self, lm: BlockDiffusionLM) -> dict[str, Any]:
        """What `TaskManager.load` gives.

        Raises:
            ValueError: lm-eval has no such task, or one that we do not run.
            Skipped: its data or a library is missing here.
        """
        manager = task_manager()
        if self.spec not in manager.all_tasks:
            raise ValueError(f"lm-eval has no task {self.spec!r}{near(self.spec, manager.all_tasks)}")
        try:
            return dict(manager.load([self.spec]))
        except ImportError as error:
            raise Skipped(f"{self.spec} needs a library that is not installed: {first_line(error)}") from None
        except OSError as error:  # ConnectionError too: no network, or a data set that is not there
            raise Skipped(f"{self.spec} needs data that cannot be reached: {first_line(error)}") from None

    def _configure(self, task: Any) -> None:
        """What lm-eval's own `simple_evaluate` does to a task before it is asked."""
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"{task.task_name} runs code that a model wrote; mage_tune does not")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{task.task_name} asks about images or sound; these models read text")
        if self.shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=self.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=self.seed)

    def _requests(self, task: Any, harness: HarnessLM) -> list[Any]:
        task.build_all_requests(
            limit=self.options.limit,
            rank=0,
            world_size=1,
            apply_chat_template=self.is_chat,
            chat_template=harness.apply_chat_template if self.is_chat else None,
            tokenizer_name=harness.tokenizer_name if self.is_chat else "",
        )
        return list(task.instances)

    def check(self, asked: list[Any], harness: HarnessLM) -> None:
        """Refuse prompts that the model cannot read whole, before anything is measured.

        Raises:
            ValueError: one is too long.
        """
        for instance in asked:
            if instance.request_type == "generate_until":
                harness.check_request(instance)

    # -- one arm

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Ask, filter and score through lm-eval; see `Task.run`."""
        harness = self.harness(lm, **arm.generate_options())
        harness.advance = advance
        with seeded(self.seed), quiet(lm_eval.api.task):
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=self.seed)  # lm-eval makes the prompts anew, and must make the same
            found = evaluate(
                harness,
                self.loaded,
                limit=self.options.limit,
                bootstrap_iters=0,
                apply_chat_template=self.is_chat,
            )
        asked = [instance for task in self.loaded["tasks"].values() for instance in task.instances]
        assert digest(asked) == self.digest, f"{self.name}: lm-eval made other prompts than before"
        metrics: dict[str, list[Any]] = defaultdict(list)
        records = []
        for name, samples in found["samples"].items():
            requests = requests_of(self.loaded["tasks"][name])
            for sample in samples:
                for metric, value in self.values(sample).items():
                    metrics[metric].append(value)
            first = [s for s in samples if s["filter"] == samples[0]["filter"]]
            records += [record(name, s, requests[i], harness) for i, s in enumerate(first)]
        if not metrics:
            raise ValueError(f"{self.name}: none of its metrics has a value for each sample, so arms cannot be paired")
        if harness.answers:
            metrics["forwards"] = [r.forwards_per_block for r in records if r.forwards_per_block is not None]
        typed = {name: typed_values(name, values) for name, values in metrics.items()}
        if self.headline is None:
            self.headline = next(iter(typed))
        return TaskResult(typed, records, harness.settings)

    def harness(self, lm: BlockDiffusionLM, **options: Any) -> HarnessLM:
        """The model with our decoding settings; the arm's come on top."""
        own: dict[str, Any] = {"batch_size": self.options.batch_size, "batch_tokens": self.options.batch_tokens}
        return HarnessLM(lm, threshold=self.threshold, steps=self.options.steps, **own, **options)

    def values(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Metric -> value of one logged sample."""
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        found = {}
        for metric in sample["metrics"]:
            value = sample[metric]
            if metric in ROLLING:
                if metric == "bits_per_byte":
                    found[metric] = -value[0] / value[1] / math.log(2)
            elif isinstance(value, (bool, int, float, np.number, np.bool_)):
                found[metric + suffix] = value
        return found


def digest(asked: list[Any]) -> str:
    """Of all prompts and what is expected of them."""
    prompts = [[instance.task_name, instance.doc, instance.args] for instance in asked]
    return hashlib.sha256(json.dumps(prompts, sort_keys=True, default=str).encode()).hexdigest()


def requests_of(task: Any) -> list[list[Any]]:
    """The requests of each sample, in order of samples."""
    by_sample: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        by_sample[instance.doc_id].append(instance)
    return [by_sample[i] for i in sorted(by_sample)]


def record(name: str, sample: Mapping[str, Any], requests: list[Any], harness: HarnessLM) -> SampleRecord:
    """One sample for people."""
    answer = harness.answers.get(id(requests[0]))
    output = sample["filtered_resps"][0]
    facts: dict[str, Any] = {"expected": shortened(str(sample["target"]))}
    if answer is not None:
        facts |= {
            "prompt_tokens": answer.prompt_tokens,
            "finish": answer.row.finish,
            "sparse_share": answer.sparse_share,
        }
    return SampleRecord(
        f"{name} {sample['doc_id']}",
        shortened(output if isinstance(output, str) else json.dumps(sample["filtered_resps"], default=str)),
        None if answer is None else answer.forwards_per_block,
        0.0 if answer is None else answer.seconds,
        facts,
    )


def typed_values(metric: str, values: list[Any]) -> list[float] | list[bool]:
    """bool for what is right or wrong, float for the rest."""
    is_share = metric.partition(",")[0] in YES_OR_NO and set(values) <= {0, 1}
    return bools(values) if is_share or all(isinstance(value, bool) for value in values) else floats(values)


@cache
def task_manager() -> TaskManager:
    """lm-eval's list of tasks; making it takes seconds."""
    return TaskManager()


def first_line(error: BaseException) -> str:
    """What an exception says, shortened."""
    return shortened(str(error).strip().partition("\n")[0] or type(error).__name__, 160)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators seeded, as lm-eval's tasks draw from them, and put back afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def quiet(*modules: ModuleType) -> Iterator[None]:
    """No warnings of lm-eval's log and no bars of these modules: they would tear our own progress apart."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    for module in modules:
        module.tqdm = lambda items, *args, **kwargs: items  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar  # type: ignore[attr-defined]
