"""LongBench: its scores against the published scripts, its prompts, its cut, and a set of our own in its format."""

import json
import math
import warnings
import zipfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mage_tune.evals.harness import build_tasks, longbench
from mage_tune.evals.harness.longbench_metrics import METRICS, score
from mage_tune.evals.harness.model import HarnessLM
from mage_tune.evals.harness.options import LONGBENCH, PAPER_SIX
from mage_tune.evals.run import measure
from mage_tune.evals.store import Store
from mage_tune.evals.suites import read_suite
from mage_tune.evals.tasks import Arm, Defaults, Skipped
from mage_tune.lm import BlockDiffusionLM, from_backbone

OURS = Path(__file__).parent / "longbench"
"""Two samples of every task, written for these tests."""
DEFAULTS = Defaults(seed=1, threshold=0.9)
CLASSES = ["Number", "Number of something", "Individual", "City", "Date"]


@pytest.fixture(scope="module")
def published():
    """lm-eval's copy of LongBench's metrics.py, which needs the libraries of the original."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fuzzywuzzy: "using slow pure-python SequenceMatcher"
        return import_module("lm_eval.tasks.longbench.metrics")


@pytest.fixture(scope="module")
def lm(tiny_backbone) -> BlockDiffusionLM:
    lm = from_backbone(tiny_backbone("converted", vocab_size=264, max_positions=2048, block_size=8))
    lm.family = replace(lm.family, stop_ids=(7,))
    return lm


# --- scores ---

KNOWN = [
    # F1 over normalised words (SQuAD's definition): articles, case and marks do not count, repeated words do.
    ("hotpotqa", "The Beatles!", ["beatles"], 1.0),
    ("hotpotqa", "it was the town of Tarrow", ["Tarrow"], 2 * (1 / 5) / (1 / 5 + 1)),  # 1 of 5 words, all of 1
    ("narrativeqa", "red red blue", ["red blue green"], 2 / 3),  # 2 of 3 both ways
    ("qasper", "", ["yes"], 0.0),
    ("qasper", "no", ["yes", "no"], 1.0),  # the best of the answers
    ("triviaqa", "\n\nnine bells\nPassage: another", ["nine"], 2 / 3),  # the first line alone
    ("multifieldqa_zh", "数学。", ["数学"], 1.0),
    # share of the numbers that are right
    ("passage_count", "There are 3, or 4, or 3.", ["3"], 2 / 3),
    ("passage_count", "none", ["3"], 0.0),
    ("passage_retrieval_en", "Paragraph 2 or paragraph 12", ["Paragraph 2"], 1 / 2),
    ("passage_retrieval_zh", "段落7", ["段落7"], 1.0),
    # 1 / classes named; a class whose name is part of the right one's does not count against it
    ("trec", "Number of something", ["Number of something"], 1.0),
    ("trec", "Number of something", ["Number"], 1 / 2),
    ("trec", "City or Date", ["Date"], 1 / 2),
    ("trec", "nothing", ["Date"], 0.0),
    # 2 * matching characters / all characters, in whole per cent: 3 of "abcd" and "bcde" match, 2 * 3 / 8
    ("lcc", "# a comment\nabcd\nmore", ["bcde"], 0.75),
    ("lcc", "```python\nabcd", ["abcd"], 1.0),
    ("repobench-p", "x = 1", ["x = 2"], 0.8),
]


@pytest.mark.parametrize(("task", "prediction", "answers", "expected"), KNOWN)
def test_scores_of_the_definition(task, prediction, answers, expected):
    """By hand, from the definitions in LongBench's metrics.py (github.com/THUDM/LongBench)."""
    assert score(task, prediction, answers, CLASSES) == pytest.approx(expected)


def test_a_blank_first_line_is_the_line_that_counts():
    """The original takes off newlines, not spaces; lm-eval's copy has skipped blank lines since its version 6."""
    assert score("lcc", "\n\n  \nabcd", ["abcd"]) == 0.0


def test_rouge_l_of_the_definition():
    """Summary level, over distinct words, as the `rouge` package has it: "the", "cat" and "mat" are in order."""
    found = score("qmsum", "the cat the mat", ["the cat on a mat"])
    precision, recall = 3 / 3, 3 / 5
    assert found == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert score("qmsum", "...", ["a summary"]) == 0.0
    assert score("qmsum", "", ["a summary"]) == 0.0


@pytest.mark.parametrize("task", LONGBENCH)
def test_scores_equal_the_published_ones(task, published):
    names = {"f1": "qa_f1", "rouge_l": "rouge", "edit_similarity": "code_sim"}
    metric = METRICS[task][0]
    name = names.get(metric) or {
        "trec": "classification",
        "lsht": "classification",
        "passage_count": "count",
        "passage_retrieval_en": "retrieval",
        "passage_retrieval_zh": "retrieval_zh",
    }.get(task)
    if task in ("multifieldqa_zh", "dureader", "vcsum"):
        name += "_zh"
    theirs = getattr(published, f"{name}_score")
    samples = [json.loads(line) for line in (OURS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    some_other = [answer for sample in samples for answer in sample["answers"]]
    found = []
    for sample in samples:
        context = sample["context"]
        for prediction in [
            *some_other,
            context,
            context[: len(context) // 2],
            " ".join(some_other),
            "Paragraph 2, 2 段落1",
        ]:
            if task in ("trec", "triviaqa", "samsum", "lsht"):
                first = prediction.lstrip("\n").split("\n")[0]
            else:
                first = prediction
            classes = sample["all_classes"]
            expected = max(float(theirs(first, answer, all_classes=classes)) for answer in sample["answers"])
            found.append(score(task, prediction, sample["answers"], classes))
            assert found[-1] == pytest.approx(expected, abs=1e-12), prediction
    assert max(found) == pytest.approx(1.0)
    assert min(found) < 0.9


# --- prompts ---


def prepared(lm, name, **options):
    (task,) = build_tasks("longbench", {"tasks": [name], "path": str(OURS), **options}, DEFAULTS)
    digest = task.prepare(lm)
    return task, digest


@pytest.mark.parametrize("name", LONGBENCH)
def test_prompts_hold_the_sample_in_the_official_words(lm, name):
    task, _ = prepared(lm, name)
    assert task.samples == 2
    for question, line in zip(task.questions, (OURS / f"{name}.jsonl").read_text("utf-8").splitlines(), strict=True):
        sample, prompt = json.loads(line), lm.tokenizer.decode(question.prompt)
        assert sample["context"] in prompt
        assert sample["input"] in prompt
        assert prompt.index(sample["context"]) <= prompt.rindex(sample["input"])
        is_plain = name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
        assert prompt.startswith("<|im_start|>user\n") != is_plain
        assert question.cut == 0
        assert question.answers == sample["answers"]
    lengths = {"hotpotqa": 32, "narrativeqa": 128, "qasper": 128, "qmsum": 512, "repobench-p": 64, "triviaqa": 32}
    assert task.new_tokens == lengths.get(name, task.new_tokens)


def test_without_names_the_papers_six_run():
    assert [task.dataset for task in build_tasks("longbench", {}, DEFAULTS)] == list(PAPER_SIX)


def test_a_long_prompt_loses_its_middle_and_says_how_much(lm, tmp_path):
    """The official rule: the first and last max_length / 2 tokens stay. Tokens are bytes here."""
    sample = json.loads((OURS / "hotpotqa.jsonl").read_text().splitlines()[0])
    sample["context"] = "".join(f"<{i:05}>" for i in range(2000))
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(sample))
    whole = longbench.dataset2prompt["hotpotqa"].format(context=sample["context"], question=sample["input"])
    (task,) = build_tasks("longbench", {"tasks": ["hotpotqa"], "path": str(tmp_path), "max_length": 1001}, DEFAULTS)
    task.prepare(lm)
    (question,) = task.questions
    expected = f"<|im_start|>user\n{whole[:500]}{whole[-500:]}<|im_end|>\n<|im_start|>assistant\n"
    assert lm.tokenizer.decode(question.prompt) == expected
    assert question.cut == len(whole) - 1000
    (free,) = build_tasks("longbench", {"tasks": ["hotpotqa"], "path": str(tmp_path)}, DEFAULTS)
    free.prepare(lm)
    assert 2048 - 2 <= len(free.questions[0].prompt) + 32 <= 2048
    record = free.run(lm, Arm(), lambda: None).records[0]
    assert record.facts["cut_tokens"] == free.questions[0].cut > 0


def test_cut_text_that_reads_as_more_tokens_is_cut_again(lm, monkeypatch):
    """Decoding and reading again may give more tokens than were kept; the prompt must fit all the same."""
    task, _ = prepared(lm, "lcc")
    harness = HarnessLM(lm, max_length=512)
    plain = harness.tok_encode
    monkeypatch.setattr(harness, "tok_encode", lambda text: plain(text) + [9] * (len(text) // 20))
    sample = {"context": "x = 1\n" * 200, "input": "", "answers": ["y"]}
    question = task._question(0, sample, harness)
    assert len(question.prompt) + 64 <= 512
    assert question.cut > 0


# --- data ---


def test_a_zip_as_the_hub_has_it_is_read_like_a_folder(lm, tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("hotpotqa", "trec"):
            file.write(OURS / f"{name}.jsonl", f"data/{name}.jsonl")
    _, of_folder = prepared(lm, "trec")
    assert prepared(lm, "trec", path=str(archive))[1] == of_folder
    asked = []
    monkeypatch.setattr(
        longbench.huggingface_hub,
        "hf_hub_download",
        lambda *args, **kwargs: asked.append((args, kwargs)) or str(archive),
    )
    assert prepared(lm, "trec", path=None)[1] == of_folder
    assert asked == [(("zai-org/LongBench", "data.zip"), {"repo_type": "dataset"})]
    with pytest.raises(ValueError, match=r"data\.zip: holds no lcc\.jsonl"):
        prepared(lm, "lcc", path=str(archive))


def test_without_network_it_is_skipped_with_the_reason(lm, monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot find the requested files in the cache")

    monkeypatch.setattr(longbench.huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(Skipped, match=r"\(zai-org/LongBench on the Hub\) cannot be reached: cannot find"):
        prepared(lm, "qasper", path=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"qasper\.jsonl, line 1: not JSON"),
        ("[1]", r"line 1: not a JSON object"),
        ('{"context": "a", "input": "b"}', "sample 0: not in LongBench's format: it needs context, input and a list"),
        ('{"context": "a", "input": "b", "answers": []}', "not in LongBench's format"),
        ("\n", "its file holds no samples"),
    ],
)
def test_a_bad_file_is_named(lm, tmp_path, text, message):
    (tmp_path / "qasper.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepared(lm, "qasper", path=str(tmp_path))


def test_other_trouble_is_named(lm, tmp_path):
    with pytest.raises(ValueError, match=r"holds no qasper\.jsonl"):
        prepared(lm, "qasper", path=str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder of TASK"):
        prepared(lm, "qasper", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="max_length 2048 and an answer of 128 tokens exceed the context of 2048"):
        prepared(lm, "qasper", max_length=2048)


# --- a run ---


def test_every_task_runs_and_scores_what_was_answered(lm):
    """All 21, with short answers, under a sparse rule."""
    for name in LONGBENCH:
        (task,) = build_tasks("longbench", {"tasks": [name], "path": str(OURS), "limit": 1}, DEFAULTS)
        task.new_tokens = 8
        task.prepare(lm)
        steps = []
        found = task.run(lm, Arm("base", "mage", 64, (("dense_layers", 1),)), lambda steps=steps: steps.append(1))
        (record,) = found.records
        said = lm.generate(task.questions[0].prompt, max_new_tokens=8, attention="mage", budget=64, dense_layers=1).text
        assert record.output == said
        (value,) = found.metrics[METRICS[name][0]]
        question = task.questions[0]
        assert value == score(name, said, question.answers, question.classes)
        assert len(steps) == 1
        assert math.isfinite(found.metrics["forwards"][0])
        assert found.settings["attention"]["rule"] == "mage"
        json.dumps([found.settings, record.facts, task.settings])


def test_a_suite_runs_it_and_finds_its_arms_again(lm, tmp_path, monkeypatch):
    """From YAML to results, as `mage-tune eval --suite` does it; a task without its data is skipped and named."""
    (tmp_path / "suite.yaml").write_text(
        "rules:\n- {rule: mage, budgets: [64]}\n"
        "tasks:\n"
        f"- {{kind: longbench, options: {{tasks: [trec, hotpotqa], path: '{OURS}'}}}}\n"
        "- {kind: ruler, options: {tasks: [niah_single_2], lengths: [1024]}}\n"
    )
    plan = read_suite(str(tmp_path / "suite.yaml"))
    found = measure(lm, plan, Store(tmp_path / "arms"), has_adapter=False)
    assert list(found["tasks"]) == ["longbench_trec", "longbench_hotpotqa"]
    assert "needs text from the web" in found["skipped"]["niah_single_2_1024"]
    assert found["arms"]["base"]["longbench_hotpotqa.f1@mage 64"]["n"] == 2
    monkeypatch.setattr(longbench.LongBenchTask, "run", lambda *args: pytest.fail("run again"))
    again = measure(lm, read_suite(str(tmp_path / "suite.yaml")), Store(tmp_path / "arms"), has_adapter=False)
    assert again["values"] == found["values"]
