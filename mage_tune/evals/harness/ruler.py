"""RULER (arXiv 2404.06654): lm-eval's generators and scores, samples made once and kept.

A sample of length n is made so that prompt and answer together fit in n tokens *of this tokenizer, chat template and
answer prefix included*, which lm-eval's own lengths leave out; that is checked for every prompt before anything runs.
Samples depend on (task, length, seed, tokenizer) alone and are kept as JSON, so that every model, arm and machine is
asked the same; the first n of a longer list are those of a shorter one.

Six of the thirteen tasks are made from word lists (`options.OFFLINE`); the rest needs essays (a Hub data set, and
nltk's punkt_tab) or questions (SQuAD, HotpotQA) from the web and is skipped where there is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.tasks
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml  # its public loader cannot override a task's data

from mage_tune.evals.harness.lm_eval_task import LmEvalTask, first_line, quiet, seeded
from mage_tune.evals.harness.model import HarnessLM
from mage_tune.evals.harness.options import OFFLINE, LmEvalOptions, RulerOptions
from mage_tune.evals.store import write_whole
from mage_tune.evals.tasks import FORWARDS, Defaults, Measure, Skipped
from mage_tune.lm import BlockDiffusionLM

RESERVED = 128
"""Tokens of a sample's length kept free for the chat template and the beginning of the answer."""
SHORTEST = 1024
"""Below it some tasks have no room for their worked example."""
PROBE = "The 7 quick brown foxes: naïve façade, 北京, don't!\n\tdef f(x):\n    return x ** 2  # 12345"
"""Text whose encoding, with the vocabulary, tells tokenizers apart whatever the library that holds them."""
NIAH: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "niah_single_1": ("repeat", "words", "numbers", {}),
    "niah_single_2": ("essay", "words", "numbers", {}),
    "niah_single_3": ("essay", "words", "uuids", {}),
    "niah_multikey_1": ("essay", "words", "numbers", {"num_needle_k": 4}),
    "niah_multikey_2": ("needle", "words", "numbers", {}),
    "niah_multikey_3": ("needle", "uuids", "uuids", {}),
    "niah_multivalue": ("essay", "words", "numbers", {"num_needle_v": 4}),
    "niah_multiquery": ("essay", "words", "numbers", {"num_needle_q": 4}),
}
"""Haystack, keys, values and counts, as lm-eval's `niah_utils` has them."""
QUESTIONS = {"ruler_qa_squad": "read_squad", "ruler_qa_hotpot": "read_hotpotqa"}

RECALL = Measure("RULER score", True, "share of the expected strings that the answer holds", unit="questions")


class RulerTask(LmEvalTask):
    """One of RULER's tasks at one length."""

    kind = "ruler"
    headline = "recall"

    def __init__(self, name: str, length: int, options: RulerOptions | LmEvalOptions, defaults: Defaults) -> None:
        super().__init__(f"{name}_{length}", options, defaults)
        self.spec, self.length = name, length
        self.limit = options.limit or 500  # as many as RULER itself makes
        self.title = f"RULER {name.removeprefix('ruler_')}, {length} tokens"
        self.cache = Path(options.cache) if options.cache else default_cache()
        self.settings |= {"task": name, "length": length, "limit": self.limit}
        self.measures = {"recall": RECALL, "forwards": FORWARDS}

    def load(self, lm: BlockDiffusionLM) -> dict[str, Any]:
        """lm-eval's task with our samples.

        Raises:
            ValueError: the model's context is shorter.
            Skipped: the samples need the web.
        """
        longest = HarnessLM(lm).max_length
        if self.length > longest:
            raise ValueError(f"{self.name}: {self.length} tokens exceed the model's context of {longest}")
        samples = ruler_samples(self.spec, self.length, self.limit, self.seed, lm.tokenizer, self.cache)
        file = Path(lm_eval.tasks.__file__).parent / "ruler" / f"{self.spec.removeprefix('ruler_')}.yaml"
        # Functions stay names: resolving them would import the generators, which takes seconds and asks for downloads.
        config = load_yaml(file, resolve_func=False)
        score = str(config["process_results"]).rpartition(".")[2]
        config |= {
            "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list(samples)},
            "process_results": getattr(import_module("lm_eval.tasks.ruler.common_utils"), score),
            "metric_list": [{"metric": str(self.length), "aggregation": "mean", "higher_is_better": True}],
        }
        for key in ("tag", "group"):
            config.pop(key, None)
        with quiet():
            return {"tasks": {self.spec: ConfigurableTask(config=config)}}

    def check(self, asked: list[Any], harness: HarnessLM) -> None:
        """Every prompt whole: it fits in the length, and what is asked for is in it."""
        for instance in asked:
            harness.check_request(instance, self.length)
            outputs = instance.doc["outputs"]
            if self.spec not in QUESTIONS and not all(output in instance.doc["input"] for output in outputs):
                raise ValueError(
                    f"{self.name} sample {instance.doc_id}: the prompt lacks what it asks for; was it cut?"
                )

    def values(self, sample: Any) -> dict[str, Any]:
        """The one score that lm-eval files under the length, without its -1 for all others."""
        score = sample[str(self.length)]
        return {"recall": bool(score) if len(sample["doc"]["outputs"]) == 1 else float(score)}


def default_cache() -> Path:
    """Where samples are kept when a suite does not say."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mage_tune" / "ruler"


def ruler_samples(
    task: str, length: int, count: int, seed: int, tokenizer: Any, cache: Path | None = None
) -> list[dict[str, Any]]:
    """The first `count` samples of a task, from the cache or made and put there.

    Args:
        task: one of `options.RULER`.
        length: tokens of prompt and answer together.
        count: samples.
        seed: of everything drawn.
        tokenizer: of the model.
        cache: folder; None keeps nothing.

    Raises:
        ValueError: the length is too short.
        Skipped: the task needs what cannot be reached.
    """
    if length < SHORTEST:
        raise ValueError(f"{task}: {length} tokens are too few; RULER starts at {SHORTEST} here")
    key: dict[str, Any] = {"task": task, "length": length, "seed": seed, "tokenizer": tokenizer_digest(tokenizer)}
    file = None if cache is None else cache / f"{task}-{length}-{seed}-{key['tokenizer'][:16]}.json"
    kept = read_samples(file, key) if file is not None else []
    if len(kept) >= count:
        return kept[:count]
    samples = make_samples(task, length - RESERVED, count, seed, tokenizer)
    if len(samples) < count:
        raise ValueError(f"{task}: only {len(samples)} of {count} samples could be made at {length} tokens")
    for sample in samples:
        sample["max_length"] = length
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = {"key": key, "lm_eval": version("lm_eval"), "samples": samples}
        write_whole(file, json.dumps(whole, ensure_ascii=False, indent=0) + "\n")
    return samples


def read_samples(file: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Samples of a cache file; none when it is missing, damaged or another's."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return []
    return list(found["samples"]) if isinstance(found, dict) and found.get("key") == key else []


def make_samples(task: str, length: int, count: int, seed: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Samples by lm-eval's generator, `length` tokens each at most by its own count.

    Raises:
        Skipped: the task needs what cannot be reached.
    """
    if task not in OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise Skipped(f"{task} needs text from the web, and HF_HUB_OFFLINE is set")
    try:
        make, modules = generator(task, tokenizer)
        with seeded(seed), quiet(*modules), contextlib.redirect_stdout(io.StringIO()):
            random.seed(f"{seed} {task} {length}")
            np.random.seed((seed + length) % 2**32)  # noqa: NPY002
            return make(length, count)
    except (OSError, LookupError) as error:
        raise Skipped(f"{task} needs text from the web: {first_line(error)}") from None


def generator(task: str, tokenizer: Any) -> tuple[Callable[[int, int], list[dict[str, Any]]], list[Any]]:
    """make(length, count) of a task, and the modules whose bars are to be kept quiet."""
    if task in NIAH:
        prepare = import_niah()
        return partial(make_niah, prepare, task, tokenizer), [prepare]
    name = "qa" if task in QUESTIONS else task.removeprefix("ruler_")
    module = import_module(f"lm_eval.tasks.ruler.{name}_utils")
    if task == "ruler_cwe":
        return partial(make_common_words, module, tokenizer), [module]
    if task == "ruler_fwe":
        return lambda length, count: module.sys_kwext(tokenizer, length, num_samples=count), [module]
    if task == "ruler_vt":
        return partial(make_tracking, module, tokenizer), [module]
    questions, documents = getattr(module, QUESTIONS[task])()
    return lambda length, count: module.generate_samples(tokenizer, documents, questions, length, count), [module]


def make_niah(prepare: Any, task: str, tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    """Needles in a haystack."""
    template = import_module("lm_eval.tasks.ruler.niah_utils").TEMPLATE
    haystack, keys, values, counts = NIAH[task]
    return prepare.generate_samples(
        prepare.get_haystack(type_haystack=haystack),
        max_seq_length=length,
        template=template,
        type_haystack=haystack,
        type_needle_k=keys,
        type_needle_v=values,
        num_samples=count,
        TOKENIZER=tokenizer,
        **counts,
    )


def make_common_words(module: Any, tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    """The most common words of a list."""
    module.RNG.seed(0)  # the module's own generator goes on from call to call
    _, smallest, _ = module.generate_input_output(10, length)
    check_room("ruler_cwe", tokenizer, smallest, length - 200)
    return module.sys_word_pair_random(count, length, tokenizer=tokenizer)


def check_room(what: str, tokenizer: Any, text: str, room: int) -> None:
    """Make sure that the smallest sample fits: lm-eval's generators would try for ever.

    Raises:
        ValueError: it does not.
    """
    tokens = len(tokenizer(text)["input_ids"])
    if tokens > room:
        raise ValueError(f"{what}: the smallest sample has {tokens} tokens by this tokenizer, and room is for {room}")


def make_tracking(module: Any, tokenizer: Any, length: int, count: int) -> list[dict[str, Any]]:
    """Variable tracking, with the one worked example that RULER shows, which has 500 tokens at most."""
    smallest, _ = module.generate_input_output(5, 1, 4, is_icl=True)
    check_room("ruler_vt's worked example", tokenizer, smallest, 470)
    text, _ = module.generate_input_output(10, 1, 4)
    check_room("ruler_vt", tokenizer, smallest + text, length - 60)
    example = module.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)[0]
    return module.sys_vartrack_w_noise_random(tokenizer, count, length, icl_example=example)


def import_niah() -> Any:
    """lm-eval's needle generator, which asks nltk for punkt_tab when it is imported; only essays need that.

    Raises:
        ImportError: wonderwords or nltk is missing.
    """
    with not_first_rank():
        return import_module("lm_eval.tasks.ruler.prepare_niah")


@contextlib.contextmanager
def not_first_rank() -> Iterator[None]:
    """lm-eval downloads on the first rank alone: importing as another keeps it from the network."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) of a tokenizer's vocabulary and of how it splits a probe."""
    facts = [sorted(tokenizer.get_vocab().items()), list(tokenizer(PROBE)["input_ids"])]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()
