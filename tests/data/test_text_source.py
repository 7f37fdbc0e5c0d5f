"""Text: window arithmetic, stop tokens between documents, flat arrays from .npy files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.data import text as text_module
from mage_tune.data.text import TextRows, TextStream, load_ids
from mage_tune.data.tokenizer import MASK_ID, STOP_ID

DOCUMENTS = ["The first.", "Zweites: ü\n", "a third one, somewhat longer than the others are"]


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 8))
def test_windows_tile_the_text(num_tokens, block_size, blocks):
    length = block_size * blocks
    ids = np.arange(num_tokens, dtype=np.uint16)
    if num_tokens < block_size:
        with pytest.raises(ValueError, match="less than one block"):
            TextRows(ids, length, block_size)
        return
    rows = TextRows(ids, length, block_size)
    parts = [rows[i] for i in range(len(rows))]
    assert all(len(tokens) == length for tokens, _ in parts[:-1])
    assert block_size <= len(parts[-1][0]) <= length
    got = np.concatenate([tokens for tokens, _ in parts])
    np.testing.assert_array_equal(got, ids[: len(got)])
    assert num_tokens - len(got) < block_size  # only a tail shorter than a block is left out
    for tokens, weight in parts:
        assert tokens.dtype == np.int64
        assert weight.dtype == np.float32
        assert (weight == 1).all()
        assert weight.shape == tokens.shape
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_documents_are_joined_by_the_stop_token(write, tokenizer, family):
    path = write("a.jsonl", [{"text": d} for d in [*DOCUMENTS, "", "  "]])
    ids = load_ids(path, tokenizer, family)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == "".join(d + "<|im_end|>" for d in DOCUMENTS)


def test_a_row_is_found_again_in_its_text(write, tokenizer, family):
    path = write("a.jsonl", [{"text": d} for d in ["", *DOCUMENTS]])
    ids = load_ids(path, tokenizer, family)
    rows = TextRows(ids, 8, family.block_size, path, STOP_ID)
    starts = np.cumsum([0, *(len(tokenizer(d)["input_ids"]) + 1 for d in DOCUMENTS)])
    for i in range(len(rows)):
        document = int(np.flatnonzero(starts <= 8 * i)[-1]) + 1
        assert rows.place(i) == f"document {document}, tokens {8 * i} to {min(8 * i + 8, len(ids)) - 1}"
    assert TextRows(ids, 8, family.block_size).place(1) == "tokens 8 to 15"


def test_special_tokens_spelt_in_text_stay_text(write, tokenizer, family):
    path = write("a.txt", "a <|mask|> and <|im_end|> here")
    ids = load_ids(path, tokenizer, family)
    assert MASK_ID not in ids
    assert np.flatnonzero(ids == STOP_ID).tolist() == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == "a <|mask|> and <|im_end|> here"


@pytest.mark.parametrize("length", [4, 8, 12, 400])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_streaming_gives_the_same_rows(write, tokenizer, family, monkeypatch, name, length):
    monkeypatch.setattr(text_module, "BATCH_CHARS", 20)  # several batches
    path = write(name, [{"body": d} for d in DOCUMENTS * 5])
    rows = TextRows(load_ids(path, tokenizer, family, field="body"), length, family.block_size)
    stream = TextStream(path, tokenizer, family, length, field="body")
    for _ in range(2):
        streamed = list(stream)
        assert len(streamed) == len(rows)
        for i, (ids, weight) in enumerate(streamed):
            np.testing.assert_array_equal(ids, rows[i][0])
            np.testing.assert_array_equal(weight, rows[i][1])


def test_too_little_text_for_a_stream(write, tokenizer, family):
    with pytest.raises(ValueError, match=r"a\.txt: fewer tokens than one block"):
        list(TextStream(write("a.txt", "x"), tokenizer, family, 8))


def test_token_ids_from_npy(write, tokenizer, family):
    ids = np.arange(8, 40, dtype=np.uint16)
    path = write("ids.npy", ids)
    loaded = load_ids(path, None, family)
    assert isinstance(loaded, np.memmap)
    np.testing.assert_array_equal(loaded, ids)
    np.testing.assert_array_equal(TextRows(loaded, 16, 4)[1][0], ids[16:])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), dtype=np.int64), "expected a flat array"),
        (np.zeros(4), "expected a flat array of integer"),
        (np.array([8, 9, 264]), "id 264 at position 2 is not in the vocabulary"),
        (np.array([8, -1]), "id -1 at position 1 is not in the vocabulary"),
        (np.array([8, 9, MASK_ID]), "the mask token 2 occurs at position 2"),
        (np.array([{}], dtype=object), "not an .npy file of token ids"),
    ],
)
def test_bad_npy_files(write, tokenizer, family, array, message):
    with pytest.raises(ValueError, match=rf"ids\.npy: {message}"):
        load_ids(write("ids.npy", array), tokenizer, family)


def test_text_needs_a_tokenizer_and_a_stop_token(write, tokenizer, family):
    path = write("a.txt", "some text")
    with pytest.raises(ValueError, match=r"a\.txt: this model comes without a tokenizer"):
        load_ids(path, None, family)
    from mage_tune.families import CONVERTED

    with pytest.raises(ValueError, match=r"no stop token is known; set model\.stop_ids"):
        load_ids(path, tokenizer, CONVERTED)


def test_smollm2_text(write, smollm2, smollm2_family):
    path = write("a.jsonl", [{"text": "Hello there.\nA <jupyter_script> here."}])
    ids = load_ids(path, smollm2, smollm2_family)
    assert ids.dtype == np.uint16
    assert 15 not in ids  # the mask token's spelling stays text
    assert smollm2.decode(ids) == "Hello there.\nA <jupyter_script> here.<|im_end|>"
