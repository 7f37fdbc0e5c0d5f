"""Synthetic retrieval: needles where they are said to be, right answers, rows from (seed, i)."""

import re
import time

import numpy as np
import pytest

from mage_tune.data.retrieval import (
    ADJECTIVES,
    INTRODUCTION,
    NOUNS,
    Dialogue,
    Needle,
    RetrievalRows,
    answer,
    draw_needles,
    draw_turns,
    filler_ids,
    make_haystack,
    question,
    sentence,
)
from mage_tune.data.tokenizer import STOP_ID, byte_tokenizer

TEXT = (
    "Call me what you like. Some years ago, never mind how long, I went to sea! Did it help? "
    "It did.\nEvery line is a border; so is every full stop.\n\nVersion 2.5 is not one. " * 60
)
SAID = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{6})\.")


@pytest.fixture(scope="module")
def filler(tokenizer, family):
    ids = np.array([*tokenizer(TEXT)["input_ids"], STOP_ID] * 2, dtype=np.uint16)
    return filler_ids(ids, tokenizer, family)


@pytest.fixture(scope="module")
def smollm2_filler(smollm2, smollm2_family):
    ids = np.array([*smollm2(TEXT)["input_ids"], 2] * 2, dtype=np.uint16)
    return filler_ids(ids, smollm2, smollm2_family)


def test_word_lists():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) == 60
        assert all(re.fullmatch("[a-z]+", word) for word in words)


def test_stop_tokens_between_documents_become_line_breaks(tokenizer, filler):
    assert STOP_ID not in filler
    assert tokenizer.decode(filler) == (TEXT + "\n") * 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 24])
def test_drawn_needles_are_distinct(count):
    num_double = 0
    for seed in range(30):
        needles = draw_needles(np.random.default_rng(seed), count)
        values = [v for n in needles for v in n.values]
        assert len(values) == len(set(values)) == count
        assert len({n.key for n in needles}) == len(needles)
        assert all(re.fullmatch(r"[1-9]\d{5}", v) for v in values)
        num_double += sum(len(n.values) == 2 for n in needles)
    assert (num_double > 0) == (count >= 3)


def test_turns_ask_for_no_needle_twice_and_for_all_kinds():
    kinds = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        needles = draw_needles(rng, 12)
        turns = draw_turns(rng, needles, 5)
        asked = [n.key for turn in turns for n in turn]
        assert 1 <= len(turns) <= 5
        assert len(asked) == len(set(asked))
        for turn in turns:
            assert len(turn) == 1 or all(len(n.values) == 1 for n in turn)
        kinds |= {(len(turn), len(turn[0].values)) for turn in turns}
    assert kinds == {(1, 1), (2, 1), (3, 1), (1, 2)}
    assert draw_turns(np.random.default_rng(0), draw_needles(np.random.default_rng(0), 1), 6)


@pytest.mark.parametrize("length", [400, 2000, 20_000])  # the last is longer than the text
def test_needles_are_where_they_are_said_to_be(tokenizer, filler, length):
    needles = draw_needles(np.random.default_rng(1), 5)
    ids, placed = make_haystack(np.random.default_rng(2), filler, tokenizer, length, needles)
    assert ids.shape == (length,)
    assert ids.dtype == np.int64
    assert [(n.key, n.values) for n in placed] == [(n.key, n.values) for n in needles]
    hidden = []
    for needle in placed:
        for value, start, depth in zip(needle.values, needle.starts, needle.depth, strict=True):
            assert depth == start / length
            text = tokenizer.decode(ids[start:])
            assert text.removeprefix(" ").startswith(sentence(needle.key, value))
            before = tokenizer.decode(ids[:start])
            assert before.endswith("\n") or (before[-1] in ".!?" and text[0] == " ")
            hidden.append((start, needle.key, value))
        assert list(needle.starts) == sorted(needle.starts)  # values in the order of the text
    assert SAID.findall(tokenizer.decode(ids)) == [said[1:] for said in sorted(hidden)]


def test_only_needles_are_added_to_the_text(tokenizer, filler):
    needles = draw_needles(np.random.default_rng(1), 5)
    ids, _ = make_haystack(np.random.default_rng(2), filler, tokenizer, 1500, needles)
    text = re.sub(" " + SAID.pattern, "", tokenizer.decode(ids))
    text = re.sub(SAID.pattern + "\n", "", text)
    assert text in tokenizer.decode(filler)


def test_depth_can_be_asked_for(tokenizer, filler):
    needles = [Needle(f"a-{i}", ("123456",), depth=(d,)) for i, d in enumerate((0.0, 0.5, 1.0))]
    _, placed = make_haystack(np.random.default_rng(0), filler, tokenizer, 4000, needles)
    start, middle, end = (n.depth[0] for n in placed)
    assert start < 0.03
    assert abs(middle - 0.5) < 0.03
    assert end > 0.95


def test_haystack_errors(tokenizer, filler):
    needles = draw_needles(np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match="needles do not fit in 100 tokens"):
        make_haystack(np.random.default_rng(0), filler, tokenizer, 100, needles)
    with pytest.raises(ValueError, match="no text to hide needles in"):
        make_haystack(np.random.default_rng(0), filler[:0], tokenizer, 1000, needles)


def test_text_without_borders(tokenizer):
    filler = np.full(3000, 8 + ord("x"), dtype=np.uint16)
    needles = draw_needles(np.random.default_rng(0), 3)
    ids, _ = make_haystack(np.random.default_rng(0), filler, tokenizer, 1000, needles)
    assert len(SAID.findall(tokenizer.decode(ids))) == 3


def test_wording():
    one, two = Needle("a-b", ("111111",)), Needle("c-d", ("222222",))
    both = Needle("e-f", ("444444", "333333"))
    assert question(["a-b"]) == "What is the special magic number for a-b?"
    assert question(["a-b", "c-d"]) == "What are the special magic numbers for a-b and c-d?"
    assert question(["x", "y", "z"]).endswith("for x, y and z?")
    assert question(["e-f"], every=True) == "What are all the special magic numbers for e-f?"
    assert answer([one]) == "111111"
    assert answer([two, one]) == "222222, 111111"
    assert answer([both]) == "444444, 333333"


def check_row(rows: RetrievalRows, i: int, stop: str, is_chat: bool) -> int:
    """Every answer of row i against its haystack; returns how many there are."""
    tokenizer = rows.tokenizer
    ids, weight = rows[i]
    assert ids.shape == weight.shape == (rows.length,)
    assert ids.dtype == np.int64
    assert weight.dtype == np.float32
    assert set(weight.tolist()) == {np.float32(4.3), np.float32(0.3)}
    text = tokenizer.decode(ids)
    said: dict[str, list[str]] = {}
    for key, value in SAID.findall(text):
        said.setdefault(key, []).append(value)
    borders = np.flatnonzero(np.diff(weight)) + 1
    parts = [tokenizer.decode(part) for part in np.split(ids, borders)]
    prompts, answers = parts[::2], parts[1::2]
    assert len(prompts) == len(answers)
    for prompt, answered in zip(prompts, answers, strict=True):
        asked = re.findall(r"(?:Question: |\n)(What (?:is|are) .*\?)", prompt)[-1]
        keys = re.findall(r"[a-z]+-[a-z]+", asked)
        assert asked == question(keys, every="all the" in asked)
        numbers = [value for key in keys for value in said[key]]
        if "all the" not in asked:
            assert len(numbers) == len(keys)  # else the question would have two right answers
        assert answered == ("" if is_chat else " ") + ", ".join(numbers) + stop
    return len(answers)


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("length", [400, 1024, 4096])
def test_rows(filler, family, is_chat, length):
    tokenizer = byte_tokenizer()
    if not is_chat:
        tokenizer.chat_template = None
    rows = RetrievalRows(filler, tokenizer, family, length, seed=3)
    counts = [check_row(rows, i, "<|im_end|>", is_chat) for i in range(30)]
    assert max(counts) > 1 or length < 1024


def test_row_is_what_the_template_writes(tokenizer, family, filler):
    rows = RetrievalRows(filler, tokenizer, family, 2048)
    text = tokenizer.decode(rows[4][0])
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert messages[0]["content"].startswith(INTRODUCTION)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "\n"


def test_rows_depend_on_seed_and_number_alone(tokenizer, family, filler):
    def rows(seed):
        return RetrievalRows(filler, tokenizer, family, 1024, seed=seed)

    one, other = rows(0), rows(0)
    _ = one[5]
    for i in (7, 2**31 - 1):
        np.testing.assert_array_equal(one[i][0], other[i][0])
        np.testing.assert_array_equal(one[i][1], other[i][1])
    assert len(one) == 2**31
    drawn = {rows(seed)[i][0].tobytes() for seed in range(3) for i in range(5)}
    assert len(drawn) == 15


def test_ranges_are_kept(tokenizer, family, filler):
    rows = RetrievalRows(filler, tokenizer, family, 4096, needles=(6, 8), questions=(2, 3))
    for i in range(30):
        ids, weight = rows[i]
        assert 6 <= len(SAID.findall(tokenizer.decode(ids))) <= 8
        assert 2 <= (np.diff(weight) > 0).sum() <= 3


def test_too_short_a_length(tokenizer, family, filler):
    with pytest.raises(ValueError, match=r"data\.length 200 is too short for a retrieval row"):
        RetrievalRows(filler, tokenizer, family, 200)


def test_templates_that_treat_the_last_answer_apart(family, filler):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = RetrievalRows(filler, tokenizer, family, 2048, questions=(3, 3), needles=(8, 8))
    text = tokenizer.decode(rows[0][0])
    assert text.count("<think></think>") == 1
    assert re.search(r"<think></think>[\d, ]+<\|im_end\|>$", text)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write every turn in the same way"):
        Dialogue(tokenizer, family)


def test_smollm2_rows(smollm2, smollm2_family, smollm2_filler):
    rows = RetrievalRows(smollm2_filler, smollm2, smollm2_family, 2048, seed=1)
    assert sum(check_row(rows, i, "<|im_end|>", is_chat=True) for i in range(20)) > 20


def test_smollm2_pieces_are_tokenised_as_the_whole(smollm2, smollm2_family):
    dialogue = Dialogue(smollm2, smollm2_family)
    before, after = dialogue.prompt("What is it?")
    message = {"role": "user", "content": f"{INTRODUCTION}Text.\n\nWhat is it?"}
    prompt = smollm2.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    whole = smollm2(prompt, add_special_tokens=False)["input_ids"]
    text = smollm2("Text.", add_special_tokens=False)["input_ids"]
    assert [*before, *text, *after] == whole


def test_smollm2_sentences_are_tokenised_as_the_whole(smollm2, smollm2_filler):
    needles = draw_needles(np.random.default_rng(0), 24)
    ids, placed = make_haystack(np.random.default_rng(0), smollm2_filler, smollm2, 2048, needles)
    forms = set()
    for needle in placed:
        for value, start in zip(needle.values, needle.starts, strict=True):
            for form in (" {}", "{}\n"):
                whole = smollm2(form.format(sentence(needle.key, value)))["input_ids"]
                if ids[start : start + len(whole)].tolist() == whole:
                    forms.add(form)
                    break
            else:
                pytest.fail(f"{needle} is tokenised in another way")
    assert forms == {" {}", "{}\n"}


def test_smollm2_rows_are_made_fast(smollm2, smollm2_family, smollm2_filler):
    rows = RetrievalRows(smollm2_filler, smollm2, smollm2_family, 2048)
    begin = time.process_time()
    for i in range(50):
        _ = rows[i]
    assert (time.process_time() - begin) / 50 < 0.02  # about 3 ms; slack for a loaded machine
