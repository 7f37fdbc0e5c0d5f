"""Needle prompts and the scoring of answers, with a language model of ten lines."""

from types import SimpleNamespace

import numpy as np
import pytest

from mage_tune.data.tokenizer import byte_tokenizer
from mage_tune.evals.needles import NeedlePrompt, ask, needle_prompts
from mage_tune.families import get_family


class Parrot:
    """Says one prepared sentence after another and remembers how it was asked."""

    def __init__(self, *sentences: str) -> None:
        self.family = get_family("converted").with_overrides(block_size=8, mask_id=2, stop_ids=(1,), pad_id=0)
        self.tokenizer = byte_tokenizer()
        self.sentences, self.asked = list(sentences), []

    def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        return SimpleNamespace(text=self.sentences[len(self.asked) - 1], forwards_per_block=2.5)


OPTIONS = {"budget": 16, "dense_layers": 2, "threshold": 0.9}


def test_an_answer_is_right_when_every_value_is_in_it():
    lm = Parrot("They are 111111, 222222.", "222222", "none of them")
    prompts = [NeedlePrompt(np.array([i, 5]), ("111111", "222222")) for i in range(3)]
    results = [ask(lm, prompt, attention="mage", **OPTIONS) for prompt in prompts]
    assert [r.is_right for r in results] == [True, False, False]
    assert [r.share_found for r in results] == [1.0, 0.5, 0.0]
    assert [r.text for r in results] == lm.sentences
    assert all(r.expected == ("111111", "222222") and r.forwards_per_block == 2.5 for r in results)
    assert [prompt for prompt, _ in lm.asked] == [[0, 5], [1, 5], [2, 5]]


def test_only_sparse_attention_is_given_a_budget():
    lm = Parrot("a", "b")
    prompt = NeedlePrompt(np.array([5]), ("111111",))
    ask(lm, prompt, attention="exact", **OPTIONS)
    ask(lm, prompt, attention="mage", **OPTIONS)
    (_, exact), (_, sparse) = lm.asked
    assert exact.items() <= sparse.items() | {("attention", "exact")}
    assert "budget" not in exact
    assert (sparse["attention"], sparse["budget"], sparse["dense_layers"]) == ("mage", 16, 2)
    assert sparse["max_new_tokens"] >= 16  # the value and the stop token fit, over a block's border too


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
