"""What a row teaches, made visible: the text of a row with the weight of each stretch of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mage_tune.data.example import Example

SHOWN_TOKENS = 48
"""Longer stretches are shown by their first and last tokens, so that answers are not lost."""


def preview(example: Example, tokenizer: PreTrainedTokenizerBase | None) -> Text:
    """A row for a terminal: prompt dim, supervised text bold and green (plain green where the row
    weighs it less than its most weighty tokens), special tokens as they are written.
    """
    most = float(example.loss_weight.max(initial=0.0))
    shown = Text(_headline(example) + "\n")
    for weight, text in _stretches(example, tokenizer):
        style = "dim" if weight == 0 else "bold green" if weight == most else "green"
        shown.append(text, style=style)
    return shown


def preview_text(example: Example, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The same for a log: one line per stretch, with its weight."""
    lines = [f"[{w:g}] {text!r}" for w, text in _stretches(example, tokenizer)]
    return "\n".join([_headline(example), *lines])


def beginning(example: Example, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The first words of a row, for a message."""
    return _decode(example.input_ids[: SHOWN_TOKENS // 2], tokenizer)


def _headline(example: Example) -> str:
    supervised = int((example.loss_weight > 0).sum())
    return f"row {example.row}: {len(example.input_ids)} tokens, {supervised} supervised"


def _stretches(example: Example, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[float, str]]:
    """(weight, text) of each stretch of tokens of the same weight."""
    weight = example.loss_weight
    borders = np.flatnonzero(np.diff(weight)) + 1
    for start, end in pairwise([0, *borders.tolist(), len(weight)]):
        if start == end:
            continue
        ids = example.input_ids[start:end]
        if len(ids) <= 2 * SHOWN_TOKENS:
            text = _decode(ids, tokenizer)
        else:
            left_out = len(ids) - 2 * SHOWN_TOKENS
            text = (
                f"{_decode(ids[:SHOWN_TOKENS], tokenizer)} [... {left_out} tokens ...] "
                f"{_decode(ids[-SHOWN_TOKENS:], tokenizer)}"
            )
        yield float(weight[start]), text


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
