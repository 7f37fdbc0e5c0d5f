"""Needle prompts and the scoring of answers, with a language model of ten lines."""

from types import SimpleNamespace

import numpy as np
import pytest

from mage_tune.data.tokenizer import byte_tokenizer
from mage_tune.evals.needles import KINDS, NeedlePrompt, ask, grid_prompt, needle_prompts
from mage_tune.evals.reading import Decoding, Reader
from mage_tune.evals.tasks import Arm
from mage_tune.families import get_family


class Parrot:
    """Says one prepared sentence after another and remembers how it was asked."""

    def __init__(self, *sentences: str) -> None:
        self.family = get_family("converted").with_overrides(block_size=8, mask_id=2, stop_ids=(1,), pad_id=0)
        self.tokenizer = byte_tokenizer()
        self.sentences, self.asked = list(sentences), []

    def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        forwards = {"exact": 1, "sparse": 3}
        return SimpleNamespace(text=self.sentences[len(self.asked) - 1], forwards_per_block=2.5, forwards=forwards)


class NoCache(Reader):
    """A reader for a model that needs no cache."""

    def read(self, lm, ids, arm, room):
        return None


def asked(lm, prompts, arm, decoding):
    seen = []
    names, facts = [f"q{i}" for i in range(len(prompts))], [{"depth": 0.5}] * len(prompts)
    found = ask(lm, arm, prompts, names, facts, decoding, NoCache(), lambda: seen.append(1))
    assert len(seen) == len(prompts)
    return found


def test_an_answer_is_right_when_every_value_is_in_it():
    lm = Parrot("They are 111111, 222222.", "222222", "none of them")
    prompts = [NeedlePrompt(np.array([i, 5]), ("111111", "222222"), (0.1, 0.9)) for i in range(3)]
    found = asked(lm, prompts, Arm("base", "mage", 16), Decoding(24, 0.9))
    assert found.metrics == {"right": [True, False, False], "found": [1.0, 0.5, 0.0], "forwards": [2.5, 2.5, 2.5]}
    assert [r.output for r in found.records] == lm.sentences
    assert [r.facts["found"] for r in found.records] == [[True, True], [False, True], [False, False]]
    first = found.records[0]
    assert (first.sample, first.facts["depths"], first.facts["sparse_share"]) == ("q0", [0.1, 0.9], 0.75)
    assert [prompt for prompt, _ in lm.asked] == [[0, 5], [1, 5], [2, 5]]


def test_arms_differ_in_attention_alone():
    lm = Parrot("a", "b", "c")
    prompt = NeedlePrompt(np.array([5]), ("111111",), (0.5,))
    for arm in (Arm(), Arm("base", "mage", 16, dense_layers=1)):
        asked(lm, [prompt], arm, Decoding(16, 0.9))
    asked(lm, [prompt], Arm(), Decoding(16, 0.9, steps=4, stops=False))
    (_, exact), (_, sparse), (_, stepped) = lm.asked
    assert {k: v for k, v in exact.items() if k != "attention"} == {k: v for k, v in sparse.items() if k != "attention"}
    assert (exact["attention"].name, exact["max_new_tokens"], exact["threshold"]) == ("exact", 16, 0.9)
    rule = sparse["attention"]
    assert (rule.name, rule.budget, rule.dense_layers) == ("mage", 16, 1)
    assert (stepped["acceptance"], stepped["steps"], stepped["stop_ids"]) == ("static", 4, ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_of_the_grid_stand_where_they_were_asked_to(kind, depth):
    lm = Parrot()
    text = np.asarray(lm.tokenizer("Plain text. It goes on.\n" * 200)["input_ids"])
    options = {"needles": 5, "asked": 2}
    prompt = grid_prompt(lm, text, kind, 1024, depth, rng=np.random.default_rng(3), **options)
    count = 2 if kind in ("multi_value", "multi_query") else 1
    assert prompt.input_ids.shape == (1024,)
    assert len(prompt.expected) == len(prompt.depths) == count
    written = lm.tokenizer.decode(prompt.input_ids)
    assert written.count("One of the special magic numbers") == (1 if kind == "single" else 5)
    places = [written.index(value) for value in prompt.expected]
    assert all(written.count(value) == 1 for value in prompt.expected)
    if count == 1:
        assert prompt.depths[0] == pytest.approx(depth, abs=0.25 if kind == "multi_key" and depth else 0.12)
    else:
        assert abs(prompt.depths[1] - prompt.depths[0]) == pytest.approx(0.5, abs=0.25)
    for place, at in zip(places, prompt.depths, strict=True):
        assert place / 1024 == pytest.approx(0.1 + 0.8 * at, abs=0.15)  # words stand before and after the haystack
    key = written[: places[0]].rsplit("numbers for ", 1)[1].split(" is")[0]
    assert written[written.rindex("What ") :].count(key) == 1
    if kind == "multi_value":
        assert "What are all the special magic numbers for" in written
    again = grid_prompt(lm, text, kind, 1024, depth, rng=np.random.default_rng(3), **options)
    assert np.array_equal(again.input_ids, prompt.input_ids)


def test_needles_that_do_not_fit_are_said():
    lm = Parrot()
    text = np.asarray(lm.tokenizer("Plain text. " * 50)["input_ids"])
    with pytest.raises(ValueError, match=r"needles: 40 needles do not fit in .* context of 1024"):
        grid_prompt(lm, text, "multi_key", 1024, 0.5, needles=40, asked=2, rng=np.random.default_rng(0))


@pytest.mark.parametrize("asked", [1, 3])
def test_prompts_fill_the_context_and_hold_every_value_once(asked):
    lm = Parrot()
    text = np.asarray(lm.tokenizer("Plain text. It goes on.\n" * 200)["input_ids"])
    options = {"context": 1024, "needles": 6, "asked": asked, "questions": 4, "seed": 3}
    prompts = needle_prompts(lm, text, **options)
    for prompt in prompts:
        assert prompt.input_ids.shape == (1024,)
        assert len(prompt.expected) == asked
        written = lm.tokenizer.decode(prompt.input_ids)
        assert all(written.count(value) == 1 for value in prompt.expected)
        assert written.count("One of the special magic numbers") == 6
    again = needle_prompts(Parrot(), text, **options)  # every arm gets the same prompts
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(prompts, again, strict=True))
    assert len({prompt.expected for prompt in prompts}) == 4
