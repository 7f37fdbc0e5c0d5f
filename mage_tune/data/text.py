"""Plain text: documents joined by the stop token into one flat array of ids, cut into rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from mage_tune.data.files import read_records
from mage_tune.families import Family

Row = tuple[np.ndarray, np.ndarray]
"""(input_ids int64 (n,), loss_weight float32 (n,)), n <= data.length."""

BATCH_CHARS = 2_000_000
"""Characters tokenised at a time: enough to keep every core busy, and little memory."""


class TextRows:
    """Windows of `length` tokens, all of weight 1; the last, shorter one is kept if it has a block.

    Args:
        ids: (tokens,) flat ids of all documents, any integer type; may be a memory map.
        length: tokens per row.
        block_size: tokens per block.
        path: what errors name.
        stop: the token that ends a document, where messages about rows shall count documents.
    """

    def __init__(
        self, ids: np.ndarray, length: int, block_size: int, path: str = "text", stop: int | None = None
    ) -> None:
        whole, rest = divmod(len(ids), length)
        self.ids, self.length, self.stop = ids, length, stop
        self.num_rows = whole + (rest >= min(block_size, length))
        if self.num_rows == 0:
            raise ValueError(f"{path}: {len(ids)} tokens are less than one block of {block_size}")

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < self.num_rows:
            raise IndexError(i)
        return _row(self.ids[i * self.length : (i + 1) * self.length])

    def place(self, i: int) -> str:
        """Where row i lies in the text, for messages."""
        start, end = i * self.length, min((i + 1) * self.length, len(self.ids))
        tokens = f"tokens {start} to {end - 1}"
        if self.stop is None:
            return tokens
        return f"document {1 + np.count_nonzero(self.ids[:start] == self.stop)}, {tokens}"


class TextStream:
    """The rows of `TextRows`, in order, read anew on each pass without holding the text.

    Raises:
        ValueError: (while reading) the whole text has less than one block of tokens.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        length: int,
        split: str = "train",
        field: str = "text",
    ) -> None:
        self.path, self.split, self.field = path, split, field
        self.tokenizer, self.family, self.length = tokenizer, family, length

    def __iter__(self) -> Iterator[Row]:
        parts = document_ids(self.path, self.tokenizer, self.family, self.split, self.field, streaming=True)
        held = np.empty(0, dtype=np.uint32)
        is_empty = True
        for part in parts:
            held = np.concatenate([held, part])
            whole = len(held) // self.length
            for i in range(whole):
                is_empty = False
                yield _row(held[i * self.length : (i + 1) * self.length])
            held = held[whole * self.length :]
        if len(held) >= min(self.family.block_size, self.length):
            yield _row(held)
        elif is_empty:
            raise ValueError(f"{self.path}: fewer tokens than one block")


def load_ids(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    family: Family,
    split: str = "train",
    field: str = "text",
) -> np.ndarray:
    """All documents of `path` as one flat array, each followed by the stop token.

    Args:
        path: as in `read_records`, or an .npy file that holds such an array already
            (then no tokenizer is needed, and the file stays on disk as a memory map).

    Returns:
        (tokens,) uint16 where every id fits, else uint32; an .npy file keeps its own type.

    Raises:
        ValueError: no readable data, no tokenizer for text, or ids that the model does not have.
    """
    if path.endswith(".npy"):
        return _load_npy(path, tokenizer, family)
    if tokenizer is None:
        raise ValueError(f"{path}: this model comes without a tokenizer; give an .npy file of token ids instead")
    parts = list(document_ids(path, tokenizer, family, split, field))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


def document_ids(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    split: str = "train",
    field: str = "text",
    streaming: bool = False,
) -> Iterator[np.ndarray]:
    """The ids of `load_ids`, a batch of documents at a time."""
    stop = stop_id(family)
    dtype = np.uint16 if max(len(tokenizer), stop + 1) <= 2**16 else np.uint32
    records = read_records(path, split, streaming)
    texts = (text for record in records if (text := record.text(field)).strip())
    while batch := _take_chars(texts, BATCH_CHARS):
        # A document that spells a special token (a tokenizer's manual, say) is still only text.
        encoded = tokenizer(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        flat = itertools.chain.from_iterable((*ids, stop) for ids in encoded)
        yield np.fromiter(flat, dtype=dtype, count=sum(len(ids) + 1 for ids in encoded))


def stop_id(family: Family) -> int:
    """The token that ends a document or an answer.

    Raises:
        ValueError: the family has none.
    """
    if not family.stop_ids:
        raise ValueError(f"family {family.name}: no stop token is known; set model.stop_ids")
    return family.stop_ids[0]


def _row(ids: np.ndarray) -> Row:
    return np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)


def _take_chars(texts: Iterator[str], limit: int) -> list[str]:
    """The next texts, up to the first that brings them to `limit` characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= limit:
            break
    return batch


def _load_npy(path: str, tokenizer: PreTrainedTokenizerBase | None, family: Family) -> np.ndarray:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # Never unpickle: a pickle runs code.
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an .npy file of token ids ({error})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected a flat array of integer token ids")
    vocabulary = len(tokenizer) if tokenizer is not None else math.inf
    for start in range(0, len(ids), 2**24):  # in parts, so that the map is never wholly in memory
        part = ids[start : start + 2**24]
        if part.min() < 0 or part.max() >= vocabulary:
            at = start + int(np.flatnonzero((part < 0) | (part >= vocabulary))[0])
            raise ValueError(f"{path}: id {ids[at]} at position {at} is not in the vocabulary")
        if family.mask_id is not None and (part == family.mask_id).any():
            at = start + int(np.flatnonzero(part == family.mask_id)[0])
            raise ValueError(f"{path}: the mask token {family.mask_id} occurs at position {at}")
    return ids
