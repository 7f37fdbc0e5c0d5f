"""The byte tokenizer is an ordinary transformers tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mage_tune.data.tokenizer import FIRST_BYTE, VOCAB_SIZE, byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_a_byte_is_a_token(text):
    ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert ids == [FIRST_BYTE + byte for byte in text.encode()]
    assert TOKENIZER.decode(ids) == text


def test_special_tokens():
    assert len(TOKENIZER) == VOCAB_SIZE == 264
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.mask_token_id) == (0, 1, 2)
    assert sorted(TOKENIZER.all_special_ids) == list(range(8))
    assert TOKENIZER("a<|im_end|>")["input_ids"] == [8 + ord("a"), 1]


@pytest.mark.parametrize("generation", [False, True])
def test_chat_template(generation):
    messages = [{"role": "user", "content": "x"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    start = "<|im_start|>assistant\n" if generation else ""
    assert text == "<|im_start|>user\nx<|im_end|>\n" + start


def test_saves_and_loads(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("hé <|mask|>")["input_ids"] == TOKENIZER("hé <|mask|>")["input_ids"]
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
