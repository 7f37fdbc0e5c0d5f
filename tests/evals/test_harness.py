"""Our model in lm-evaluation-harness: requests, tasks, and the exact arm against a loop that knows no lm-eval."""

import json
import random
from dataclasses import replace
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from mage_tune.evals import harness as package
from mage_tune.evals.harness import build_tasks, lm_eval_task
from mage_tune.evals.harness.likelihood import ContinuationScorer
from mage_tune.evals.harness.lm_eval_task import LmEvalTask
from mage_tune.evals.harness.model import HarnessLM
from mage_tune.evals.harness.options import LmEvalOptions
from mage_tune.evals.tasks import Arm, Defaults, Skipped
from mage_tune.lm import BlockDiffusionLM, from_backbone

DEFAULTS = Defaults(seed=5, threshold=0.7)
TEXTS = ["A short one", "Something rather longer, which fills more blocks than that", "!", "Fourteen words?"]


@pytest.fixture(scope="module")
def lm(tiny_backbone) -> BlockDiffusionLM:
    backbone = tiny_backbone("converted", vocab_size=264, max_positions=512, block_size=8)
    lm = from_backbone(backbone)
    # Random weights write stop tokens and broken letters: answers must have a length, and be text that compares.
    lm.family = replace(lm.family, stop_ids=(7,))
    return lm


def request(text: str, *, number: int = 0, **wish) -> Instance:
    return Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 12} | wish), number, ("made", number, 1))


def scored(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, ("made", 0, 1))


# --- requests ---


def test_a_batch_answers_what_single_prompts_do_in_the_order_asked(lm):
    requests = [request(text, number=i) for i, text in enumerate(TEXTS)]
    together = HarnessLM(lm, batch_size=3, threshold=0.7)
    seen = []
    together.advance = lambda: seen.append(1)
    answers = together.generate_until(requests)
    assert answers == [lm.generate(text, max_new_tokens=12, threshold=0.7).text for text in TEXTS]
    assert len(set(answers)) > 1
    assert len(seen) == len(TEXTS)
    for text, asked in zip(TEXTS, requests, strict=True):
        alone, found = lm.generate(text, max_new_tokens=12, threshold=0.7), together.answers[id(asked)]
        assert found.row.tokens == alone.tokens
        assert found.forwards_per_block == alone.forwards_per_block
        assert found.prompt_tokens == len(text)
    assert together.settings["acceptance"]["threshold"] == 0.7


def test_wishes_of_a_request_hold(lm):
    model = HarnessLM(lm)
    whole = lm.generate(TEXTS[1], max_new_tokens=12).text
    letter = whole[4]
    cut, short, sampled = model.generate_until(
        [
            request(TEXTS[1], until=[letter]),
            request(TEXTS[1], max_gen_toks=3),
            request(TEXTS[1], do_sample=True, temperature=2.0),
        ]
    )
    assert cut == whole[: whole.index(letter)]
    assert short == lm.generate(TEXTS[1], max_new_tokens=3).text
    assert sampled == lm.generate(TEXTS[1], max_new_tokens=12, temperature=2.0).text
    assert sampled != whole
    ignored = model.generate_until([request(TEXTS[1], do_sample=False, temperature=1.0)])  # LongBench's tasks say so
    assert ignored == [whole]


def test_batches_hold_no_more_than_they_may(lm):
    wish = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = [[4] * length for length in (30, 5, 80, 31, 29, 6, 500)]
    model = HarnessLM(lm, batch_size=3, batch_tokens=130)
    batches = model.batches(prompts, [wish] * 7)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[6], [2], [3, 0, 4], [5, 1]]
    other = [wish | {"max_gen_toks": 12 + (i == 4)} for i in range(7)]
    assert [4] in model.batches(prompts, other)


def test_a_prompt_that_does_not_fit_is_refused_not_cut(lm):
    model = HarnessLM(lm)
    model.generate_until([request("x" * 500)])
    with pytest.raises(ValueError, match=r"made sample 3: a prompt of 501 tokens and an answer of 12 exceed 512"):
        model.generate_until([request("x" * 501, number=3)])
    with pytest.raises(ValueError, match="nothing is cut silently"):
        model.loglikelihood([scored("x" * 512, " y")])


def test_options_that_cannot_be_are_refused(lm, tiny_backbone, monkeypatch):
    with pytest.raises(ValueError, match="no option 'threshhold'"):
        HarnessLM(lm, threshhold=0.9)
    with pytest.raises(ValueError, match="batch_size 'auto'"):
        HarnessLM(lm, batch_size="auto")
    with pytest.raises(ValueError, match="max_length 513 is not between 2 and the model's 512 positions"):
        HarnessLM(lm, max_length=513)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here for 'cuda:0', which is lm-eval's default; give --device cpu"):
        HarnessLM(lm, device="cuda:0")
    with pytest.raises(ValueError, match="no tokenizer"):
        HarnessLM(from_backbone(tiny_backbone()))
    with pytest.raises(ValueError, match="not defined under refresh"):
        HarnessLM(lm, attention="mage", budget=8, refresh="draft").loglikelihood([scored("a", "b")])


def test_registered_and_loads_from_a_path(converted_checkpoint, tiny_backbone):
    backbone = tiny_backbone("converted", vocab_size=264, block_size=8)
    folder = converted_checkpoint(backbone)
    model_class = get_model("mage_tune")
    assert model_class is HarnessLM
    arguments = f"pretrained={folder},attention=mage,budget=8,dense_layers=1,threshold=0.5"
    model = model_class.create_from_arg_string(arguments, {"batch_size": "2", "device": "cpu", "max_batch_size": None})
    assert model.lm.family.block_size == 8
    assert model.generate_until([request("A" * 40)])
    assert model.settings["attention"]["rule"] == "mage"
    assert model.settings["attention"]["budget"] == 8
    assert model.settings["acceptance"]["threshold"] == 0.5
    assert model.tokenizer_name and "/" not in model.tokenizer_name


def test_chat_template_leaves_the_last_message_open_for_a_prefix(lm):
    model = HarnessLM(lm)
    asked = [{"role": "user", "content": "Why?"}]
    assert model.apply_chat_template(asked) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    begun = [*asked, {"role": "assistant", "content": "Because"}]
    text = model.apply_chat_template(begun, add_generation_prompt=False)
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause"
    assert model.tok_encode(text)[0] == lm.tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_likelihoods_are_the_scorers(lm):
    model = HarnessLM(lm)
    pairs = [("The sky is", " blue"), ("The sky is", " made of cheese"), ("", "Hello"), ("Two ", "words")]
    found = model.loglikelihood([scored(*pair) for pair in pairs])
    one = ContinuationScorer(lm, Arm().attention(), 64)

    def score(context, continuation):
        prefix = lm.tokenizer(context)["input_ids"] if context else [model.prefix_token_id]
        return one.score(prefix, lm.tokenizer(continuation)["input_ids"])

    expected = [score(*pair) for pair in [*pairs[:3], ("Two", " words")]]  # lm-eval moves the space to what is scored
    assert [value for value, _ in found] == pytest.approx([e.log_probability for e in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [e.is_greedy for e in expected]


def test_rolling_likelihood_scores_every_token_once(lm):
    model = HarnessLM(lm, max_length=24)
    text = "A text of more than two windows, each token of it scored once."
    rolling = Instance("loglikelihood_rolling", {}, (text,), 0, ("made", 0, 1))
    tokens = lm.tokenizer(text)["input_ids"]
    one = ContinuationScorer(lm, Arm().attention(), 64)
    assert 46 < len(tokens) < 69  # three windows, of which the last is filled up with what came before
    total = one.score([model.prefix_token_id], tokens[:23]).log_probability
    total += one.score(tokens[22:23], tokens[23:46]).log_probability
    total += one.score(tokens[-24:46], tokens[46:]).log_probability
    assert model.loglikelihood_rolling([rolling]) == [pytest.approx(total, abs=1e-3)]


# --- tasks ---


class MadeTask(LmEvalTask):
    """A task of lm-eval from documents of our own instead of a file of its."""

    def __init__(self, documents, config=None, **options):
        super().__init__("made", LmEvalOptions(tasks=["made"], **options), DEFAULTS, options.get("shots"))
        split = datasets.Dataset.from_list(documents)
        self.config = {
            "task": "made",
            "custom_dataset": lambda **kwargs: {"test": split},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        } | (config or {})

    def load(self, lm):
        return {"tasks": {"made": ConfigurableTask(config=dict(self.config))}}


def run(task, lm, arm=None):
    digest, steps = task.prepare(lm), []
    found = task.run(lm, arm or Arm(), lambda: steps.append(1))
    assert len(steps) == task.samples
    return digest, found


@pytest.mark.parametrize("chat", [False, True])
def test_the_exact_arm_scores_as_a_plain_loop_does(lm, chat):
    """Generate and compare, one prompt at a time; every other answer is made right, for something to be scored."""
    questions, answers, is_right = ["one?", "two, and more?", "three", "4 4 4 4 4 4", "V"], [], []
    for number, question in enumerate(questions):
        prompt = f"Q: {question}\nA:"
        if chat:
            prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        text = lm.generate(ids, max_new_tokens=10, threshold=0.7, stop_strings=["\n\n"]).text
        answers.append(text if number % 2 else "no model writes this")
        is_right.append(text == answers[-1])
    documents = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    task = MadeTask(documents, chat=chat, batch_size=2)
    _, found = run(task, lm)
    assert found.metrics["exact_match"] == is_right == [False, True, False, True, False]
    assert [record.sample for record in found.records] == [f"made {i}" for i in range(5)]
    assert [record.output for record in found.records][1::2] == answers[1::2]
    assert found.metrics["forwards"] == [record.forwards_per_block for record in found.records]
    assert task.headline == "exact_match"
    json.dumps([found.settings, task.settings, [record.facts for record in found.records]])


def test_an_arm_decides_how_prompts_are_read_and_the_adapter_is_the_callers_to_switch(lm):
    documents = [{"question": "word " * 20, "answer": "x"}]
    task = MadeTask(documents)
    digest, exact = run(task, lm)
    arm = Arm("base", "mage", 8, (("dense_layers", 1),))
    again, sparse = run(task, lm, arm)
    assert again == digest
    assert sparse.settings["attention"]["rule"] == "mage"
    assert sparse.records[0].output == lm.generate(
        lm.tokenizer(f"<|im_start|>user\nQ: {'word ' * 20}\nA:<|im_end|>\n<|im_start|>assistant\n")["input_ids"],
        max_new_tokens=10, threshold=0.7, attention="mage", budget=8, dense_layers=1, stop_strings=["\n\n"],
    ).text  # fmt: skip
    assert exact.settings["attention"]["rule"] == "exact"


def test_choices_are_scored_by_likelihood(lm):
    documents = [{"question": f"{i}?", "choices": [" yes", " no", " perhaps so"], "answer": i % 3} for i in range(4)]
    config = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": None,
    }
    task = MadeTask(documents, config)
    _, found = run(task, lm)
    assert task.samples == 12  # requests, each of which moves the bar
    assert not task.is_chat
    one = ContinuationScorer(lm, Arm().attention(), 64)
    for document, is_right in zip(documents, found.metrics["acc"], strict=True):
        context = lm.tokenizer(f"Q: {document['question']}\nA:")["input_ids"]
        scores = [one.score(context, lm.tokenizer(f" {choice}")["input_ids"]) for choice in document["choices"]]
        best = max(range(3), key=lambda i: scores[i].log_probability)
        assert is_right == (best == document["answer"])
    assert "forwards" not in found.metrics
    assert task.takes(Arm("base", "mage", 8))
    assert not task.takes(Arm("base", "mage", 8, (("refresh", "draft"),)))
    assert MadeTask(documents).takes(Arm("base", "mage", 8, (("refresh", "draft"),)))


def test_worked_examples_are_the_same_in_every_arm(lm):
    documents = [{"question": f"what is {i}?", "answer": f"{i}"} for i in range(8)]
    task = MadeTask(documents, {"fewshot_split": "test"}, shots=2, chat=False, limit=2)
    digest, _ = run(task, lm)
    prompt = task.loaded["tasks"]["made"].instances[0].args[0]
    assert prompt.count("Q: ") == 3
    task.run(lm, Arm(), lambda: None)  # asserts inside that its prompts are those of `prepare`
    assert task.loaded["tasks"]["made"].instances[0].args[0] == prompt
    assert MadeTask(documents, {"fewshot_split": "test"}, shots=2, chat=False, limit=2).prepare(lm) == digest


def test_bits_per_byte_of_texts(lm):
    config = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name} for name in lm_eval_task.ROLLING],
        "generation_kwargs": None,
    }
    text = "Eight words of text, and no more than that"
    _, found = run(MadeTask([{"question": "", "answer": text}], config), lm)
    model = HarnessLM(lm)
    total = ContinuationScorer(lm, Arm().attention(), 64).score(
        [model.prefix_token_id], lm.tokenizer(text)["input_ids"]
    )
    assert found.metrics == {"bits_per_byte": [pytest.approx(-total.log_probability / len(text) / 0.6931472, rel=1e-4)]}


def test_refusals_before_anything_is_measured(lm, monkeypatch):
    with pytest.raises(ValueError, match=r"a prompt of 6\d\d tokens and an answer of 10 exceed 512"):
        MadeTask([{"question": "x" * 600, "answer": ""}]).prepare(lm)
    with pytest.raises(ValueError, match="runs code that a model wrote"):
        MadeTask([{"question": "x", "answer": ""}], {"unsafe_code": True}).prepare(lm)
    few = TaskManager(include_defaults=False, include_path=str(lm_eval_tasks("arc")))
    monkeypatch.setattr(lm_eval_task, "task_manager", lambda: few)
    with pytest.raises(ValueError, match="lm-eval has no task 'arc_eazy'; did you mean 'arc_easy'"):
        LmEvalTask("arc_eazy", LmEvalOptions(tasks=["arc_eazy"]), DEFAULTS).prepare(lm)
    with pytest.raises(Skipped, match="arc_easy needs data that cannot be reached"):
        LmEvalTask("arc_easy", LmEvalOptions(tasks=["arc_easy"]), DEFAULTS).prepare(lm)


def lm_eval_tasks(name):
    return Path(lm_eval.tasks.__file__).parent / name


# --- suites ---


def test_a_suites_entries_become_tasks():
    tasks = build_tasks("lm_eval", {"tasks": ["gsm8k", "ruler_vt"], "lengths": [2048, 4096], "limit": 3}, DEFAULTS)
    assert [(task.kind, task.name) for task in tasks] == [
        ("lm_eval", "gsm8k"),
        ("ruler", "ruler_vt_2048"),
        ("ruler", "ruler_vt_4096"),
    ]
    assert [task.settings["limit"] for task in tasks] == [3, 3, 3]
    assert len(build_tasks("ruler", {}, DEFAULTS)) == 13
    assert [task.name for task in build_tasks("longbench", {"tasks": ["lcc"]}, DEFAULTS)] == ["longbench_lcc"]
    assert len(build_tasks("longbench", {"tasks": "all"}, DEFAULTS)) == 21
    assert tasks[0].settings["threshold"] == 0.7
    assert build_tasks("longbench", {"threshold": 0.5}, DEFAULTS)[0].settings["threshold"] == 0.5


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ruler", {"lenghts": [4096]}, "unknown key 'lenghts'; did you mean 'lengths'"),
        ("ruler", {"tasks": ["niah_singel_1"]}, "unknown RULER task 'niah_singel_1'; did you mean 'niah_single_1'"),
        ("longbench", {"tasks": ["hotpot"]}, "unknown LongBench task 'hotpot'; did you mean 'hotpotqa'"),
        ("lm_eval", {}, "key 'tasks': field required"),
        ("lm_eval", {"tasks": ["gsm8k"], "limit": 0}, "key 'limit': input should be greater than or equal to 1, got 0"),
        ("babilong", {}, "unknown benchmark 'babilong'"),
    ],
)
def test_a_wrong_entry_is_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build_tasks(kind, options, DEFAULTS)


@pytest.mark.parametrize(("kind", "options"), [("lm_eval", {"tasks": ["gsm8k"]}), ("ruler", {}), ("longbench", {})])
def test_without_lm_eval_every_benchmark_says_so(monkeypatch, lm, kind, options):
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    for task in build_tasks(kind, options, DEFAULTS):
        with pytest.raises(Skipped, match=r"needs lm-evaluation-harness: pip install 'mage_tune\[eval\]'"):
            task.prepare(lm)


def test_random_state_is_left_alone(lm):
    random.seed(3)
    expected = random.Random(3).random()
    run(MadeTask([{"question": "a", "answer": "b"}]), lm)
    assert random.random() == expected
