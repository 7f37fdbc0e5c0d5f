"""Conversations: which tokens are supervised, and what is refused."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mage_tune.data.chat import ChatRows, ChatStream
from mage_tune.data.tokenizer import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi — ü."},
    {"role": "user", "content": "Two\nlines"},
    {"role": "assistant", "content": "  spaced\n"},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nHi — ü.<|im_end|>\n"
    "<|im_start|>user\nTwo\nlines<|im_end|>\n<|im_start|>assistant\n  spaced\n<|im_end|>"
)


def supervised(row, tokenizer) -> list[str]:
    """The text of each stretch of supervised tokens."""
    ids, weight = row
    assert ids.dtype == np.int64
    assert weight.dtype == np.float32
    borders = np.flatnonzero(np.diff(weight)) + 1
    parts = zip(np.split(ids, borders), np.split(weight, borders), strict=True)
    return [tokenizer.decode(part) for part, w in parts if w[0] == 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_only_answers_and_their_stop_tokens_are_supervised(write, tokenizer, family, name):
    path = write(name, [{"messages": [SYSTEM, *TURNS]}])
    rows = ChatRows(path, tokenizer, family, 1000)
    assert len(rows) == 1
    assert tokenizer.decode(rows[0][0]) == RENDERED
    assert supervised(rows[0], tokenizer) == ["Hi — ü.<|im_end|>", "  spaced\n<|im_end|>"]


def test_messages_after_the_last_answer_are_left_out(write, tokenizer, family):
    more = [{"role": "tool", "content": "42"}, {"role": "user", "content": "And?"}]
    rows = ChatRows(write("a.jsonl", [{"messages": [SYSTEM, *TURNS, *more]}]), tokenizer, family, 1000)
    assert tokenizer.decode(rows[0][0]) == RENDERED


def test_smollm2_masks(write, smollm2, smollm2_family):
    rows = ChatRows(write("a.jsonl", [{"messages": TURNS}]), smollm2, smollm2_family, 1000)
    text = smollm2.apply_chat_template(TURNS, tokenize=False)
    assert smollm2.decode(rows[0][0]) == text.removesuffix("\n")
    assert supervised(rows[0], smollm2) == ["Hi — ü.<|im_end|>", "  spaced\n<|im_end|>"]
    prompt = smollm2.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    prompt_ids = smollm2(prompt, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(rows[0][0][: len(prompt_ids)], prompt_ids)  # as in decoding


def test_sharegpt_messages_are_understood(write, tokenizer, family):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in [SYSTEM, *TURNS]]
    rows = ChatRows(write("a.jsonl", [{"conversations": shared}]), tokenizer, family, 1000)
    assert tokenizer.decode(rows[0][0]) == RENDERED


def test_prompt_and_completion_strings_need_no_template(write, family):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    path = write("a.jsonl", [{"prompt": "1 + 1 = ", "completion": "2"}])
    rows = ChatRows(path, tokenizer, family, 1000)
    assert tokenizer.decode(rows[0][0]) == "1 + 1 = 2<|im_end|>"
    assert supervised(rows[0], tokenizer) == ["2<|im_end|>"]


def test_only_the_completion_of_prompt_and_completion_messages_is_supervised(write, tokenizer, family):
    path = write("a.jsonl", [{"prompt": [SYSTEM, *TURNS[:3]], "completion": TURNS[3:]}])
    rows = ChatRows(path, tokenizer, family, 1000)
    assert tokenizer.decode(rows[0][0]) == RENDERED
    assert supervised(rows[0], tokenizer) == ["  spaced\n<|im_end|>"]


def test_streaming_gives_the_same_rows(write, tokenizer, family):
    records = [{"prompt": f"{i}: ", "completion": "x" * i} for i in range(20)]
    path = write("a.jsonl", records)
    rows = ChatRows(path, tokenizer, family, 12)
    streamed = list(ChatStream(path, tokenizer, family, 12))
    assert 0 < len(rows) == len(streamed) < 20
    used = [f"record {path}:{i + 1}" for i in range(20) if len(tokenizer(f"{i}: " + "x" * i)["input_ids"]) < 12]
    assert [rows.place(i) for i in range(len(rows))] == used[-len(rows) :]
    for i, row in enumerate(streamed):
        np.testing.assert_array_equal(row[0], rows[i][0])
        np.testing.assert_array_equal(row[1], rows[i][1])


class TestOverlong:
    LONG = [  # noqa: RUF012
        {"prompt": "a", "completion": "b"},
        {"prompt": "prompt", "completion": "completion"},
        {"prompt": "a prompt that is too long", "completion": "b"},
    ]

    def test_drop(self, write, tokenizer, family):
        rows = ChatRows(write("a.jsonl", self.LONG), tokenizer, family, 8, overlong="drop")
        assert [tokenizer.decode(rows[i][0]) for i in range(len(rows))] == ["ab<|im_end|>"]

    def test_truncate_keeps_what_still_has_an_answer(self, write, tokenizer, family):
        rows = ChatRows(write("a.jsonl", self.LONG), tokenizer, family, 8, overlong="truncate")
        texts = [tokenizer.decode(rows[i][0]) for i in range(len(rows))]
        assert texts == ["ab<|im_end|>", "promptco"]
        assert supervised(rows[1], tokenizer) == ["co"]

    def test_error_names_the_line(self, write, tokenizer, family):
        path = write("a.jsonl", self.LONG)
        with pytest.raises(ValueError, match=r"a\.jsonl:2: 17 tokens, more than data\.length 8"):
            ChatRows(path, tokenizer, family, 8, overlong="error")

    def test_nothing_left(self, write, tokenizer, family):
        path = write("a.jsonl", self.LONG[1:])
        message = r"a\.jsonl: zero supervised tokens.*0 without an answer, 2 longer than 8 tokens"
        with pytest.raises(ValueError, match=message):
            ChatRows(path, tokenizer, family, 8)


def test_zero_supervised_tokens_is_an_error_that_names_the_file(write, tokenizer, family):
    path = write("a.jsonl", [{"messages": [SYSTEM, TURNS[0]]}, {"prompt": "a", "completion": ""}])
    message = r"a\.jsonl: zero supervised tokens; of its conversations 2 without an answer"
    with pytest.raises(ValueError, match=message):
        ChatRows(path, tokenizer, family, 100)
    with pytest.raises(ValueError, match=message):
        next(iter(ChatStream(path, tokenizer, family, 100)))


GOOD = {"messages": TURNS}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "neither 'messages' nor 'prompt' and 'completion' .*fields: 'text'"),
        ({"prompt": "x"}, "neither 'messages' nor 'prompt' and 'completion'"),
        ({"messages": "x"}, "'messages' is not a list of messages"),
        ({"messages": []}, r"'messages' is not a list of \{role, content\} messages"),
        ({"messages": ["x"]}, r"'messages' is not a list of \{role, content\} messages"),
        ({"messages": [TURNS[0], "x"]}, "message 1 is not an object with a role"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, r"message 1 \(assistant\) has no text"),
        ({"messages": [{"role": "user", "content": 3}]}, r"message 0 \(user\) has no text"),
        ({"messages": [TURNS[1]]}, "the conversation begins with an answer"),
        ({"prompt": 3, "completion": "x"}, "'prompt' is a number"),
        ({"prompt": "x", "completion": TURNS[1:2]}, "'completion' is a list, expected a string"),
        ({"prompt": "x", "completion": "a <|mask|>"}, r"spells the mask token \(id 2\)"),
    ],
)
def test_a_bad_record_is_named(write, tokenizer, family, record, message):
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{message}"):
        ChatRows(write("a.jsonl", [GOOD, record]), tokenizer, family, 1000)


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer 'byte_tokenizer' has no chat template; put a chat_template.jinja"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "'byte_tokenizer' does not render message 1 as a continuation",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "does not end an answer with the stop token '<|im_end|>'; set model.stop_ids",
        ),
        ("{{ raise_exception('no system') }}", "refuses this conversation: no system"),
    ],
)
def test_a_template_that_does_not_do(write, family, template, message):
    import re

    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*" + re.escape(message)):
        ChatRows(write("a.jsonl", [GOOD]), with_template(template), family, 1000)


QWEN3_LIKE = (  # the last answer gets a think block that earlier ones do not have
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_answers(write, family):
    tokenizer = with_template(QWEN3_LIKE)
    rows = ChatRows(write("one.jsonl", [{"messages": TURNS[:2]}]), tokenizer, family, 1000)
    assert supervised(rows[0], tokenizer) == ["<think>\n\n</think>\n\nHi — ü.<|im_end|>"]
    with pytest.raises(ValueError, match=r"message 3 as a continuation.*one answer per record"):
        ChatRows(write("two.jsonl", [{"messages": TURNS}]), tokenizer, family, 1000)
