"""RULER: samples made once, the same everywhere, whole; what cannot be made here says why."""

import json
import random
import runpy
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import requests
import wonderwords
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mage_tune.evals.harness import build_tasks, ruler
from mage_tune.evals.harness.options import OFFLINE, RULER
from mage_tune.evals.harness.ruler import RulerTask, import_niah, ruler_samples, tokenizer_digest
from mage_tune.evals.tasks import Arm, Defaults, Skipped
from mage_tune.lm import BlockDiffusionLM, from_backbone

DEFAULTS = Defaults(seed=3, threshold=0.9)
SCRIPT = Path(__file__).parents[2] / "scripts" / "run_ruler.py"


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """lm-eval's generator joins every adjective to every noun when it is imported: six million words take seconds."""

    class FewWords(wonderwords.RandomWord):
        def __init__(self) -> None:
            super().__init__()
            self._categories = {kind: words[:400] for kind, words in self._categories.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", FewWords)
        import_niah()
        import_module("lm_eval.tasks.ruler.cwe_utils")


@pytest.fixture(scope="module")
def tokenizer(few_words) -> PreTrainedTokenizerFast:
    """Pieces of words, as real ones have, learnt from the texts that RULER is made of."""
    niah = import_niah()
    cwe = import_module("lm_eval.tasks.ruler.cwe_utils")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tracked, _ = import_module("lm_eval.tasks.ruler.vt_utils").generate_input_output(5, 1, 4)
    fwe = import_module("lm_eval.tasks.ruler.fwe_utils")
    texts = [tracked, niah.NEEDLE, *cwe.WORDS, cwe.TEMPLATE, fwe.TEMPLATE, *(str(n) for n in range(0, 9999, 7))] * 2
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2400, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>", "<mask>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", mask_token="<mask>")


@pytest.fixture(scope="module")
def lm(tiny_backbone, tokenizer) -> BlockDiffusionLM:
    backbone = tiny_backbone("converted", vocab_size=2400, max_positions=2048, block_size=8)
    backbone = replace(backbone, tokenizer=tokenizer, family=replace(backbone.family, stop_ids=(1,), mask_id=2))
    return from_backbone(backbone)


@pytest.mark.parametrize("task", OFFLINE)
def test_samples_are_whole_and_hold_what_is_asked_for(tokenizer, task):
    samples = ruler_samples(task, 2048, 3, 3, tokenizer)
    assert len(samples) == 3
    assert len({sample["input"] for sample in samples}) == 3
    for sample in samples:
        assert sample["max_length"] == 2048
        assert 0.5 * 2048 < len(tokenizer(sample["input"] + sample["gen_prefix"])["input_ids"]) <= 2048 - 50
        assert all(output in sample["input"] for output in sample["outputs"])
    expected = {"ruler_vt": 5, "ruler_cwe": 10, "ruler_fwe": 3}.get(task, 1)
    assert [len(sample["outputs"]) for sample in samples] == [expected] * 3


@pytest.mark.parametrize("task", ["niah_multikey_3", "ruler_cwe", "ruler_vt"])
def test_samples_depend_on_seed_and_place_alone(tokenizer, task):
    three = ruler_samples(task, 1024, 3, 3, tokenizer)
    random.seed(99)
    assert ruler_samples(task, 1024, 2, 3, tokenizer) == three[:2]
    assert ruler_samples(task, 1024, 3, 4, tokenizer) != three


def test_the_cache_is_used_and_grows_and_heals(tokenizer, tmp_path, monkeypatch):
    made = ruler_samples("niah_single_1", 1024, 2, 3, tokenizer, tmp_path)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    assert kept["key"]["tokenizer"] == tokenizer_digest(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(ruler, "make_samples", lambda *args: pytest.fail("made again"))
        assert ruler_samples("niah_single_1", 1024, 2, 3, tokenizer, tmp_path) == made
        assert ruler_samples("niah_single_1", 1024, 1, 3, tokenizer, tmp_path) == made[:1]
    assert ruler_samples("niah_single_1", 1024, 3, 3, tokenizer, tmp_path)[:2] == made
    assert len(json.loads(file.read_text())["samples"]) == 3
    for damaged in ("{", json.dumps(kept | {"key": {}})):
        file.write_text(damaged)
        assert ruler_samples("niah_single_1", 1024, 2, 3, tokenizer, tmp_path) == made


def test_tokenizers_are_told_apart_by_what_they_do(tokenizer):
    from mage_tune.data.tokenizer import byte_tokenizer

    assert tokenizer_digest(byte_tokenizer()) == tokenizer_digest(byte_tokenizer())
    assert tokenizer_digest(byte_tokenizer()) != tokenizer_digest(tokenizer)


def test_needles_are_described_as_lm_eval_describes_them(monkeypatch):
    """Our table against the arguments lm-eval's own eight functions give its generator."""
    import_niah()
    module = import_module("lm_eval.tasks.ruler.niah_utils")
    monkeypatch.setattr(module, "get_tokenizer", lambda name: None)
    monkeypatch.setattr(module, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(module, "download_dataset", list)
    monkeypatch.setattr(module, "generate_samples", lambda haystack, **arguments: arguments)
    common = {"max_seq_length", "template", "num_samples", "TOKENIZER"}
    for task, (haystack, keys, values, counts) in ruler.NIAH.items():
        (given,) = getattr(module, task)(max_seq_lengths=[4096])
        expected = {"type_haystack": haystack, "type_needle_k": keys, "type_needle_v": values, **counts}
        assert {name: value for name, value in given.items() if name not in common} == expected
        assert given["template"] == module.TEMPLATE


@pytest.mark.parametrize("task", sorted(set(RULER) - set(OFFLINE)))
def test_tasks_that_need_the_web_say_so_without_it(tokenizer, task, monkeypatch):
    with pytest.raises(Skipped, match=f"{task} needs text from the web, and HF_HUB_OFFLINE is set"):
        ruler_samples(task, 1024, 1, 3, tokenizer)
    monkeypatch.setattr(ruler.huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(import_niah(), "get_haystack", unreachable)
    monkeypatch.setattr(import_module("lm_eval.tasks.ruler.qa_utils"), "download_json", unreachable)
    with pytest.raises(Skipped, match=f"{task} needs text from the web: no route to host"):
        ruler_samples(task, 1024, 1, 3, tokenizer)


def test_a_task_scores_what_a_plain_loop_scores(lm, tmp_path):
    """Tracked variables; some are made to be what the model writes, so that the score is not nought throughout."""
    (task,) = build_tasks(
        "ruler", {"tasks": ["ruler_vt"], "lengths": [1024], "limit": 3, "cache": str(tmp_path)}, DEFAULTS
    )
    assert isinstance(task, RulerTask)
    task.prepare(lm)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    expected = []
    for number, sample in enumerate(kept["samples"]):
        prompt = f"{sample['input']} {sample['gen_prefix']}"
        text = lm.generate(lm.tokenizer(prompt)["input_ids"], max_new_tokens=30, threshold=0.9).text
        written = sorted({letter for letter in text if letter.isalnum() and letter in sample["input"]})[:number]
        sample["outputs"] = [*sample["outputs"][: 3 - number], *written]
        expected.append(sum(o.lower() in text.lower() for o in sample["outputs"]) / len(sample["outputs"]))
    file.write_text(json.dumps(kept))
    assert task.prepare(lm)
    found = task.run(lm, Arm(), lambda: None)
    assert found.metrics["recall"] == expected
    assert len(set(expected)) > 1
    assert set(found.metrics) == {"recall", "forwards"}
    assert task.headline == "recall"


def test_lengths_that_cannot_be_are_refused(lm, tmp_path, tokenizer):
    options = {"tasks": ["niah_single_1"], "limit": 1, "cache": str(tmp_path)}
    (long,) = build_tasks("ruler", options | {"lengths": [4096]}, DEFAULTS)
    with pytest.raises(ValueError, match="niah_single_1_4096: 4096 tokens exceed the model's context of 2048"):
        long.prepare(lm)
    (short,) = build_tasks("ruler", options | {"lengths": [512]}, DEFAULTS)
    with pytest.raises(ValueError, match="512 tokens are too few"):
        short.prepare(lm)
    from mage_tune.data.tokenizer import byte_tokenizer

    with pytest.raises(ValueError, match="ruler_vt's worked example: the smallest sample has"):
        ruler_samples("ruler_vt", 1024, 1, 3, byte_tokenizer())


def test_a_prompt_that_lost_something_is_refused(lm, tmp_path):
    (task,) = build_tasks(
        "ruler", {"tasks": ["niah_single_1"], "lengths": [1024], "limit": 1, "cache": str(tmp_path)}, DEFAULTS
    )
    task.prepare(lm)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    sample = kept["samples"][0]
    cut = sample | {"input": sample["input"].replace(sample["outputs"][0], "")}
    file.write_text(json.dumps(kept | {"samples": [cut]}))
    with pytest.raises(ValueError, match="niah_single_1_1024 sample 0: the prompt lacks what it asks for"):
        task.prepare(lm)
    longer = sample | {"input": sample["input"] + " and so on" * 200}
    file.write_text(json.dumps(kept | {"samples": [longer]}))
    with pytest.raises(ValueError, match="exceed 1024 tokens; nothing is cut silently"):
        task.prepare(lm)


def test_the_script_writes_checks_and_goes_on(tiny_backbone, tokenizer, converted_checkpoint, tmp_path, monkeypatch):
    backbone = tiny_backbone("converted", vocab_size=2400, max_positions=2048, block_size=8)
    facts = replace(backbone.family, stop_ids=(1,), mask_id=2)
    folder = converted_checkpoint(replace(backbone, tokenizer=tokenizer, family=facts))
    out = tmp_path / "ruler.json"
    where = ["--cache", str(tmp_path / "samples"), "--folder", str(tmp_path / "arms"), "--out", str(out)]
    what = ["--tasks", "niah_single_1", "--lengths", "1024", "--limit", "2", "--budget", "64", "--check", "2"]
    monkeypatch.setattr("sys.argv", ["run_ruler.py", str(folder), *what, *where, "--commit", "abc"])
    main = runpy.run_path(str(SCRIPT))["main"]
    main.__globals__["THRESHOLD"] = 0.0  # whole blocks at a step: what random weights write is noise anyway
    assert main() == 0
    found = json.loads(out.read_text())
    assert found["environment"]["commit"] == "abc"
    assert found["check"]["niah_single_1_1024"] == {"loop": [0.0, 0.0], "harness": [0.0, 0.0], "same_text": 2}
    arms = {f"niah_single_1_1024.{m}@{r}" for r in ("exact", "mage 64") for m in ("recall", "forwards")}
    assert set(found["arms"]["base"]) == arms
    # One answer is right or wrong, so that its mean is a share with Wilson's interval.
    assert found["values"]["base"]["niah_single_1_1024.recall@mage 64"] == [False, False]
    assert found["arms"]["base"]["niah_single_1_1024.recall@exact"]["high"] > 0.5
    assert str(tmp_path) not in out.read_text()
    monkeypatch.setattr(RulerTask, "run", lambda *args: pytest.fail("run again"))
    assert main() == 0
    assert json.loads(out.read_text())["values"] == found["values"]
