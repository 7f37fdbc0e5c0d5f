"""The schedule of sources, the order inside a source, streaming, the factory, the preview."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mage_tune.data.example import Example
from mage_tune.data.mixture import (
    Mixture,
    StreamingMixture,
    build_mixture,
    make_schedule,
    preview,
    preview_text,
)
from mage_tune.data.retrieval import ENDLESS
from mage_tune.recipe import Data


class Numbers:
    """Row i of source `tag` is [tag, i]."""

    def __init__(self, tag: int, length: int) -> None:
        self.tag, self.length = tag, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([self.tag, i]), np.ones(2, dtype=np.float32)

    def place(self, i: int) -> str:
        return f"[{self.tag}, {i}]"


class NumberStream:
    def __init__(self, tag: int, length: int) -> None:
        self.rows = Numbers(tag, length)

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


def rows_of(dataset) -> list[tuple[int, int, int]]:
    return [(e.row, *e.input_ids.tolist()) for e in dataset]


shares_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(shares_lists, st.integers(1, 400))
def test_counts_stay_within_one_of_the_shares(shares, num_rows):
    source, position = make_schedule(shares, num_rows)
    assert source.shape == position.shape == (num_rows,)
    is_source = source[:, None] == np.arange(len(shares))
    counts = is_source.cumsum(axis=0)
    expected = np.outer(np.arange(1, num_rows + 1), np.array(shares) / sum(shares))
    assert np.abs(counts - expected).max() < 1 + 1e-3
    before = counts - is_source
    np.testing.assert_array_equal(position, before[np.arange(num_rows), source])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 60), st.integers(1, 60))
def test_a_longer_run_begins_like_a_shorter_one(shares, num_rows, more):
    short, long = make_schedule(shares, num_rows), make_schedule(shares, num_rows + more)
    for a, b in zip(short, long, strict=True):
        np.testing.assert_array_equal(a, b[:num_rows])


def test_equal_shares_alternate():
    assert make_schedule([1.0, 1.0], 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert make_schedule([0.5, 0.25, 0.25], 8)[0].tolist() == [0, 1, 0, 2, 0, 1, 0, 2]
    source, position = make_schedule([1 / 3, 2 / 3], 3_000_000)
    assert (source == 0).sum() == 1_000_000
    assert position[-3:].max() == 1_999_999


@pytest.mark.parametrize("shares", [[], [1.0, 0.0], [-1.0], [float("nan")]])
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares must be positive"):
        make_schedule(shares, 4)


def test_every_epoch_covers_a_source_in_a_new_order():
    mixture = Mixture([Numbers(0, 20), Numbers(1, 7)], [2, 1], 120, seed=0)
    assert [mixture.place(n) for n in range(120)] == [str(e.input_ids.tolist()) for e in mixture]
    assert len(mixture) == 120
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for row, (n, tag, i) in enumerate(rows_of(mixture)):
        assert n == row
        drawn[tag].append(i)
    for tag, length in ((0, 20), (1, 7)):
        epochs = [drawn[tag][e : e + length] for e in range(0, len(drawn[tag]), length)]
        whole = [e for e in epochs if len(e) == length]
        assert len(whole) > 2
        assert all(sorted(e) == list(range(length)) for e in whole)
        assert len({tuple(e) for e in whole}) == len(whole)


def test_rows_can_be_asked_for_in_any_order():
    def mixture(seed=0):
        return Mixture([Numbers(0, 5), Numbers(1, 3)], [1, 2], 40, seed)

    expected = rows_of(mixture())
    backwards = mixture()
    assert [rows_of([backwards[n]])[0] for n in reversed(range(40))] == expected[::-1]
    assert rows_of(mixture(seed=1)) != expected
    for n in (-1, 40):
        with pytest.raises(IndexError):
            backwards[n]


def test_endless_sources_are_taken_in_order():
    mixture = Mixture([Numbers(0, ENDLESS)], [1], 5, seed=0)
    assert [i for _, _, i in rows_of(mixture)] == [0, 1, 2, 3, 4]


def first(batch):
    return batch[0]


# Python 3.12 warns of every fork of a process with threads, and torch has some.
forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@forks
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(workers):
    mixture = Mixture([Numbers(0, 5), Numbers(1, 3)], [1, 2], 24, seed=0)
    loader = DataLoader(mixture, batch_size=1, num_workers=workers, collate_fn=first)
    assert rows_of(loader) == rows_of(mixture)


class TestStreaming:
    def mixture(self, num_rows=30):
        sources = [NumberStream(0, 4), Numbers(1, 6)]
        return StreamingMixture(sources, [1, 2], num_rows, seed=0)

    def test_streams_are_read_in_order_and_again(self):
        streamed = [i for _, tag, i in rows_of(self.mixture()) if tag == 0]
        assert streamed == [0, 1, 2, 3] * 2 + [0, 1]

    def test_schedule_and_other_sources_are_those_of_a_mixture(self):
        plain = Mixture([Numbers(0, 4), Numbers(1, 6)], [1, 2], 30, seed=0)
        ours = rows_of(self.mixture())
        assert [r[:2] for r in ours] == [r[:2] for r in rows_of(plain)]
        assert [r for r in ours if r[1] == 1] == [r for r in rows_of(plain) if r[1] == 1]

    @forks
    def test_one_worker_changes_nothing_and_two_are_refused(self):
        loader = DataLoader(self.mixture(), batch_size=1, num_workers=1, collate_fn=first)
        assert rows_of(loader) == rows_of(self.mixture())
        loader = DataLoader(self.mixture(), batch_size=1, num_workers=2, collate_fn=first)
        with pytest.raises(ValueError, match=r"set data\.workers to 0 or 1"):
            rows_of(loader)

    def test_an_empty_stream(self):
        with pytest.raises(ValueError, match="has no rows"):
            rows_of(StreamingMixture([NumberStream(0, 0)], [1], 3, seed=0))


TEXT = "A sentence of text. Another one follows it.\n" * 100


def data(*sources, length=512) -> Data:
    return Data.model_validate({"length": length, "sources": list(sources)})


def test_all_kinds_of_sources_together(write, tokenizer, family):
    text = write("t.txt", TEXT)
    chat = write("c.jsonl", [{"prompt": "Question?", "completion": f"No. {i}"} for i in range(3)])
    mixture = build_mixture(
        data(
            {"kind": "text", "path": text, "share": 2},
            {"kind": "chat", "path": chat},
            {"kind": "retrieval", "path": text, "seed": 5, "needles": [2, 3]},
        ),
        tokenizer,
        family,
        40,
        seed=0,
    )
    assert isinstance(mixture, Mixture)
    kinds = Counter()
    for example in mixture:
        assert 0 < len(example.input_ids) <= 512
        assert example.input_ids.dtype == np.int64
        assert example.loss_weight.dtype == np.float32
        decoded = tokenizer.decode(example.input_ids)
        is_chat = decoded.startswith("Question?")
        kinds["retrieval" if "magic" in decoded else "chat" if is_chat else "text"] += 1
    assert kinds == {"text": 20, "chat": 10, "retrieval": 10}


@forks
def test_workers_change_nothing_of_real_sources(write, tokenizer, family):
    path = write("t.txt", TEXT)
    sources = [{"kind": "text", "path": path}, {"kind": "retrieval", "path": path}]
    mixture = build_mixture(data(*sources), tokenizer, family, 12, seed=0)
    loader = DataLoader(mixture, batch_size=1, num_workers=2, collate_fn=first)
    for ours, theirs in zip(mixture, loader, strict=True):
        assert ours.row == theirs.row
        np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
        np.testing.assert_array_equal(ours.loss_weight, theirs.loss_weight)


def test_a_text_used_twice_is_tokenised_once(write, tokenizer, family, monkeypatch):
    from mage_tune.data import mixture as module

    loaded = []
    load_ids = module.load_ids
    monkeypatch.setattr(module, "load_ids", lambda *a: loaded.append(a[0]) or load_ids(*a))
    path = write("t.txt", TEXT)
    sources = [{"kind": "text", "path": path}, {"kind": "retrieval", "path": path}]
    build_mixture(data(*sources), tokenizer, family, 8, seed=0)
    assert loaded == [path]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_streaming_sources(write, tokenizer, family, kind):
    records = [{"text": TEXT, "prompt": "a", "completion": str(i)} for i in range(5)]
    path = write("a.jsonl", records)
    source = {"kind": kind, "path": path, "streaming": True}
    mixture = build_mixture(data(source), tokenizer, family, 12, seed=0)
    assert isinstance(mixture, StreamingMixture)
    again = [e.input_ids.tolist() for e in mixture]
    assert [e.input_ids.tolist() for e in mixture] == again
    if kind == "chat":
        assert again[0] == again[5]


def test_a_model_without_a_tokenizer(write, family):
    path = write("ids.npy", np.arange(8, 200, dtype=np.uint16))
    source = {"kind": "text", "path": path}
    mixture = build_mixture(data(source, length=64), None, family, 4, seed=0)
    assert [len(e.input_ids) for e in mixture] == [64] * 4
    with pytest.raises(ValueError, match=r"ids\.npy: this model comes without a tokenizer"):
        build_mixture(data({"kind": "retrieval", "path": path}), None, family, 4, seed=0)


def test_rows_that_teach_nothing(write, tokenizer, family):
    path = write("t.txt", TEXT)
    source = {"kind": "retrieval", "path": path, "answer_weight": 0, "other_weight": 0}
    with pytest.raises(ValueError, match=r"zero supervised tokens in the first 10 rows of .*t\.t"):
        build_mixture(data(source), tokenizer, family, 10, seed=0)


class TestPreview:
    def example(self, tokenizer, prompt="<|im_start|>user\nü?", answer="So.<|im_end|>"):
        ids = [tokenizer(part)["input_ids"] for part in (prompt, answer)]
        weight = np.repeat(np.array([0, 1], dtype=np.float32), [len(part) for part in ids])
        return Example(3, np.concatenate(ids), weight)

    def test_supervised_text_stands_out(self, tokenizer):
        shown = preview(self.example(tokenizer), tokenizer)
        assert shown.plain.endswith("<|im_start|>user\nü?So.<|im_end|>")
        styles = {shown.plain[s.start : s.end]: s.style for s in shown.spans}
        assert styles == {"<|im_start|>user\nü?": "dim", "So.<|im_end|>": "bold green"}

    def test_plain_form(self, tokenizer):
        assert preview_text(self.example(tokenizer), tokenizer).splitlines() == [
            "row 3: 13 tokens, 4 supervised",
            r"[0] '<|im_start|>user\nü?'",
            "[1] 'So.<|im_end|>'",
        ]

    def test_long_stretches_are_shortened(self, tokenizer):
        example = self.example(tokenizer, prompt="p" * 500)
        text = preview_text(example, tokenizer)
        assert "p [... 404 tokens ...] p" in text
        assert "So.<|im_end|>" in text

    def test_without_a_tokenizer(self):
        example = Example(0, np.array([8, 9]), np.ones(2, dtype=np.float32))
        assert preview_text(example, None).endswith("[1] '8 9'")
