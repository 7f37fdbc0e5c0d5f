"""What scripts/build_chat.py keeps and how it strings pairs together."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import build_chat as script

from mage_tune.backbone import causal_lm


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


def test_an_existing_folder_is_not_overwritten(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["build_chat.py", "nowhere", str(tmp_path)])
    assert script.main() == 2
    assert "exists" in capsys.readouterr().err


def test_a_model_talks_to_itself(tmp_path: Path, monkeypatch, capsys, tiny_backbone) -> None:
    """A random model says nothing sensible and never stops: what is written is what it was asked and managed."""
    backbone = tiny_backbone(vocab_size=272, max_positions=512)
    causal_lm(backbone.model).save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    asked = []

    def answers(self: script.Writer, questions: list[str], max_tokens: int) -> list[str | None]:
        asked.extend(questions)
        tried = self._write(questions, max_tokens, sample=False)
        assert len(tried) == len(questions)
        return [None if i % 3 == 0 else f"Answer {len(asked)}-{i}." for i in range(len(questions))]

    monkeypatch.setattr(script.Writer, "answers", answers)
    options = ["--pairs", "12", "--batch", "5", "--answer-tokens", "4", "--heldout", "2"]
    monkeypatch.setattr(sys, "argv", ["build_chat.py", str(tmp_path / "model"), str(tmp_path / "out"), *options])
    assert script.main() == 0
    assert len(asked) == 12 and set(asked) <= set(script.plain_questions())
    files = {name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "heldout")}
    written = [json.loads(line)["messages"] for lines in files.values() for line in lines]
    questions = [message["content"] for turn in written for message in turn if message["role"] == "user"]
    assert len(questions) == len(set(questions)) == 12 - 5
    assert len(files["heldout"]) == 2
    assert "12 questions, 5 answers" in capsys.readouterr().out
