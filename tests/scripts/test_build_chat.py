"""What scripts/build_chat.py keeps and how it strings pairs together."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import build_chat as script


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("What is the capital of France?", True),
        ("Hi there", False),
        ("word " * 61, False),
        ("1. a list of things", False),
        ("so <|im_start|> it goes", False),
    ],
)
def test_questions_worth_answering(text: str, kept: bool) -> None:
    assert script.is_question(text) == kept


def test_circles() -> None:
    assert not script.is_circular("The sky is blue because of scattering.\nThat is all there is to it, more or less.")
    assert script.is_circular("a b c d e f g h and then a b c d e f g h")
    assert script.is_circular("1. Be kind to all.\n2. Sleep.\n1. Be kind to all.")


def test_conversations_hold_every_pair_once_and_fit() -> None:
    pairs = [((f"q{i}", f"a{i}"), 10 + i % 7) for i in range(200)]
    conversations = list(script.string_together(pairs, 60, random.Random(0)))
    length = dict(pairs)
    assert sorted(p for c in conversations for p in c) == sorted(length)
    assert all(sum(length[p] for p in c) <= 60 for c in conversations)
    assert 20 < sum(len(c) == 1 for c in conversations) < 80
    assert max(map(len, conversations)) > 2


def test_a_pair_longer_than_the_limit_stands_alone() -> None:
    (only,) = script.string_together([(("q", "a"), 99)], 60, random.Random(1))
    assert only == [("q", "a")]


def test_records_are_what_chat_sources_read() -> None:
    record = script.as_record([("q", "a"), ("r", "b")])
    assert [m["role"] for m in record["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in record["messages"]] == ["q", "a", "r", "b"]


def test_an_existing_file_is_not_overwritten(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "chat.jsonl"
    out.write_text(json.dumps({}))
    monkeypatch.setattr(sys, "argv", ["build_chat.py", "nowhere", str(out)])
    assert script.main() == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "{}"
