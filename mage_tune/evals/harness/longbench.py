"""LongBench v1 (arXiv 2308.14508): 21 long-context tasks with their official prompts, cut, lengths and scores.

    - {kind: longbench}                                      the six tasks of the MAGE paper, from the Hub
    - {kind: longbench, tasks: all, path: data, limit: 50}   a folder of TASK.jsonl in LongBench's own format

1. The prompt is the official template (lm-eval's copy of LongBench's table), filled with `context` and `input`.
2. A prompt of more than `max_length` tokens loses its middle: its first and last max_length / 2 tokens stay. How many
   tokens went is in every sample's record.
3. It is asked as one chat turn, except in few-shot and code tasks, which are plain text in the official code too.
4. The answer, greedy and of the official length, is scored by `longbench_metrics`.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from lm_eval.tasks.longbench._generate_config import dataset2maxlen, dataset2prompt  # LongBench's own tables

from mage_tune.evals.harness import longbench_metrics
from mage_tune.evals.harness.model import Answer, HarnessLM
from mage_tune.evals.harness.options import LongBenchOptions
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
    shortened,
)
from mage_tune.lm import BlockDiffusionLM

REPOSITORY = "zai-org/LongBench"
"""Where the authors publish data.zip."""
PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
"""Few-shot and code tasks: never asked through a chat template."""
LABELS = {
    "f1": Measure("F1", True, "overlap of the words of answer and truth", unit="questions"),
    "rouge_l": Measure("ROUGE-L", True, "longest common word sequences of summary and truth", unit="summaries"),
    "accuracy": Measure("accuracy", True, "the right class or number, less what else is named", unit="questions"),
    "edit_similarity": Measure("edit similarity", True, "likeness of the line of code written", unit="lines"),
}


@dataclass(frozen=True)
class Question:
    """One sample of LongBench, ready to be asked."""

    id: str
    prompt: list[int]
    """Token ids, chat template included."""
    cut: int
    """Tokens taken from the middle."""
    answers: list[str]
    classes: list[str]


class LongBenchTask(Task):
    """One of LongBench's tasks."""

    kind = "longbench"

    def __init__(self, name: str, options: LongBenchOptions, defaults: Defaults) -> None:
        self.name, self.title = f"longbench_{name}", f"LongBench {name}"
        self.dataset, self.options = name, options
        self.metric = longbench_metrics.METRICS[name][0]
        self.headline = self.metric
        self.new_tokens = dataset2maxlen[name]
        self.threshold = defaults.threshold if options.threshold is None else options.threshold
        self.settings: dict[str, Any] = {
            "task": name,
            "limit": options.limit,
            "chat": options.chat,
            "max_length": options.max_length,
            "max_new_tokens": self.new_tokens,
            "threshold": self.threshold,
            "steps": options.steps,
        }
        self.measures = {self.metric: LABELS[self.metric], "forwards": FORWARDS}
        self.questions: list[Question] = []

    def prepare(self, lm: BlockDiffusionLM) -> str:
        """Read the data and make the prompts; see `Task.prepare`."""
        check_libraries(self.dataset)
        harness = HarnessLM(lm)
        self.questions = []
        for number, sample in enumerate(read_samples(self.dataset, self.options.path)):
            if self.options.limit is not None and number >= self.options.limit:
                break
            self.questions.append(self._question(number, sample, harness))
        if not self.questions:
            raise ValueError(f"{self.name}: its file holds no samples")
        self.samples = len(self.questions)
        facts = [[q.id, q.prompt, q.answers, q.classes] for q in self.questions]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _question(self, number: int, sample: dict[str, Any], harness: HarnessLM) -> Question:
        where = f"{self.name} sample {number}"
        missing = {"context", "input", "answers"} - sample.keys()
        if missing or not isinstance(sample["answers"], list) or not sample["answers"]:
            raise ValueError(f"{where}: not in LongBench's format: it needs context, input and a list of answers")
        text = dataset2prompt[self.dataset].format(context=sample["context"], question=sample["input"])
        template = self._uses_chat(harness)
        around = len(render(harness, "", template)) if template else 0
        room = harness.max_length - self.new_tokens - around
        longest = room if self.options.max_length is None else self.options.max_length
        if longest > room:
            raise ValueError(
                f"{self.name}: max_length {longest} and an answer of {self.new_tokens} tokens exceed the context of "
                f"{harness.max_length}"
            )
        text, cut = middle_cut(harness, text, longest)
        prompt = render(harness, text, template)
        while len(prompt) + self.new_tokens > harness.max_length:  # cut text may read as more tokens than were left
            longest -= 8
            text, more = middle_cut(harness, text, longest)
            cut, prompt = cut + more, render(harness, text, template)
        answers = [str(answer) for answer in sample["answers"]]
        classes = [str(name) for name in sample.get("all_classes") or []]
        return Question(str(sample.get("_id", number)), prompt, cut, answers, classes)

    def _uses_chat(self, harness: HarnessLM) -> bool:
        has_template = bool(getattr(harness.tokenizer, "chat_template", None))
        if self.options.chat and not has_template:
            raise ValueError(f"{self.name}: chat: true, but the tokenizer has no chat template")
        return has_template and self.dataset not in PLAIN and self.options.chat is not False

    def run(self, lm: BlockDiffusionLM, arm: Arm, advance: Advance) -> TaskResult:
        """Answer and score every question; see `Task.run`."""
        options = self.options
        harness = HarnessLM(
            lm,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            threshold=self.threshold,
            steps=options.steps,
            **arm.generate_options(),
        )
        scores, forwards, records = [0.0] * self.samples, [0.0] * self.samples, {}
        wish = {"until": [], "max_gen_toks": self.new_tokens, "do_sample": False}
        for batch in harness.batches([q.prompt for q in self.questions], [wish] * self.samples):
            started = time.perf_counter()
            out = harness.generate([self.questions[i].prompt for i in batch], wish)
            seconds = (time.perf_counter() - started) / len(batch)
            for i, row in zip(batch, out.rows, strict=True):
                question, text = self.questions[i], row.text or ""
                scores[i] = longbench_metrics.score(self.dataset, text, question.answers, question.classes)
                answer = Answer(row, len(question.prompt), seconds)
                forwards[i] = answer.forwards_per_block
                facts = {
                    "expected": [shortened(truth) for truth in question.answers],
                    "score": scores[i],
                    "prompt_tokens": answer.prompt_tokens,
                    "cut_tokens": question.cut,
                    "finish": row.finish,
                    "sparse_share": answer.sparse_share,
                }
                records[i] = SampleRecord(question.id, shortened(text), forwards[i], seconds, facts)
                advance()
        ordered = [records[i] for i in range(self.samples)]
        return TaskResult({self.metric: scores, "forwards": forwards}, ordered, harness.settings)


def render(harness: HarnessLM, text: str, is_chat: bool) -> list[int]:
    """Token ids of a prompt, as one chat turn or plain."""
    return harness.tok_encode(harness.apply_chat_template([{"role": "user", "content": text}]) if is_chat else text)


def middle_cut(harness: HarnessLM, text: str, longest: int) -> tuple[str, int]:
    """The official truncation: the first and the last longest / 2 tokens, and how many tokens went."""
    tokens = harness.tok_encode(text)
    if len(tokens) <= longest:
        return text, 0
    half = longest // 2
    decode = harness.tokenizer.decode
    kept = decode(tokens[:half], skip_special_tokens=True) + decode(tokens[-half:], skip_special_tokens=True)
    return kept, len(tokens) - 2 * half


def check_libraries(task: str) -> None:
    """Make sure that a task can be scored before it is answered.

    Raises:
        Skipped: a library is missing.
    """
    try:
        if task in longbench_metrics.SPLITS_CHINESE:
            import jieba  # noqa: F401
        if longbench_metrics.METRICS[task][0] == "rouge_l":
            import rouge  # noqa: F401
    except ImportError as error:
        raise Skipped(f"longbench_{task} is scored with {error.name}: pip install 'mage_tune[eval]'") from None


def read_samples(task: str, path: str | None) -> Iterator[dict[str, Any]]:
    """The samples of a task in LongBench's JSONL: a folder, data.zip, or the Hub's data.zip.

    Raises:
        ValueError: no such file, or a line that is not JSON.
        Skipped: the Hub cannot be reached.
    """
    source = Path(path) if path is not None else download()
    if source.is_dir():
        file = source / f"{task}.jsonl"
        if not file.is_file():
            raise ValueError(f"{source}: holds no {task}.jsonl")
        with file.open(encoding="utf-8") as lines:
            yield from parse(lines, str(file))
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            found = [name for name in archive.namelist() if Path(name).name == f"{task}.jsonl"]
            if not found:
                raise ValueError(f"{source}: holds no {task}.jsonl")
            with archive.open(found[0]) as binary:
                yield from parse((line.decode("utf-8") for line in binary), f"{source}: {found[0]}")
    else:
        raise ValueError(f"{source}: neither a folder of TASK.jsonl files nor LongBench's data.zip")


def parse(lines: Any, where: str) -> Iterator[dict[str, Any]]:
    """One sample a line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sample = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}, line {number}: not JSON: {error.msg}") from None
            if not isinstance(sample, dict):
                raise ValueError(f"{where}, line {number}: not a JSON object")
            yield sample


def download() -> Path:
    """The Hub's data.zip, from its cache where it is there.

    Raises:
        Skipped: it cannot be had.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, "data.zip", repo_type="dataset"))
    except OSError as error:
        said = str(error).strip().partition("\n")[0]
        raise Skipped(f"LongBench's data ({REPOSITORY} on the Hub) cannot be reached: {shortened(said, 120)}") from None
