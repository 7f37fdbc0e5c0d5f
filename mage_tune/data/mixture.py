"""Several sources mixed into one fixed schedule of rows.

Row n of a run always comes from the same source and is always the same row of it, whatever the
number of workers and GPUs and wherever a run was resumed: a resumed run just asks for later rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from mage_tune.data.example import Example
from mage_tune.data.preview import preview, preview_text
from mage_tune.data.retrieval import ENDLESS, RetrievalRows, filler_ids
from mage_tune.data.text import Row, TextRows, TextStream, load_ids, stop_id
from mage_tune.families import Family
from mage_tune.recipe import ChatSource, Data, RetrievalSource, TextSource

__all__ = [
    "Mixture",
    "Rows",
    "Stream",
    "StreamingMixture",
    "build_mixture",
    "make_schedule",
    "preview",
    "preview_text",
]

PROBED_ROWS = 64
"""Rows that must hold a supervised token among them, or the run does not start."""


@runtime_checkable
class Rows(Protocol):
    """A source with random access; row i depends on the source's settings and i alone.

    Rows of a source of length `ENDLESS` are independent draws: they are taken in order.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Row: ...

    def place(self, i: int, /) -> str:
        """Where row i is to be found in the source, for messages."""
        ...


class Stream(Protocol):
    """A source that can only be read from its beginning; each pass gives the same rows."""

    def __iter__(self) -> Iterator[Row]: ...


class Mixture(Dataset[Example]):
    """`num_rows` rows from several sources with random access.

    Row n is row `permutation(seed, source, epoch)[j % len]` of its source, where j counts the rows
    taken from that source before and epoch = j // len.

    Args:
        sources, shares: what is mixed, and how much of each (any positive numbers).
        num_rows: rows of the whole run.
        seed: decides the order of rows inside each source; the schedule of sources is fixed.
    """

    def __init__(self, sources: Sequence[Rows], shares: Sequence[float], num_rows: int, seed: int) -> None:
        self.shuffled = [Shuffled(rows, seed, s) for s, rows in enumerate(sources)]
        self.source, self.position = make_schedule(shares, num_rows)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, n: int) -> Example:
        if not 0 <= n < len(self.source):
            raise IndexError(n)
        return Example(n, *self.shuffled[self.source[n]][int(self.position[n])])

    def place(self, n: int) -> str:
        """Where row n is to be found in its source, for messages."""
        shuffled = self.shuffled[self.source[n]]
        return shuffled.rows.place(shuffled.index(int(self.position[n])))


class StreamingMixture(IterableDataset[Example]):
    """The same schedule where some sources are streams; those are read in order, again and again.

    Raises:
        ValueError: (while reading) a stream has no rows, or several workers would read the same.
    """

    def __init__(self, sources: Sequence[Rows | Stream], shares: Sequence[float], num_rows: int, seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.source, self.position = make_schedule(shares, num_rows)

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("a streaming source is read by one worker: set data.workers to 0 or 1")
        readers = [
            map(Shuffled(rows, self.seed, s).__getitem__, range(ENDLESS)) if isinstance(rows, Rows) else _repeat(rows)
            for s, rows in enumerate(self.sources)
        ]
        for n, source in enumerate(self.source):
            yield Example(n, *next(readers[source]))

    def place(self, n: int) -> str:
        """How many rows of its source came before row n, for messages: what is streamed is not looked up."""
        return f"row {int(self.position[n]) + 1} in the order of reading"


class Shuffled:
    """Row j of a source that is read for ever, in a new order each time it starts again."""

    def __init__(self, rows: Rows, seed: int, number: int) -> None:
        self.rows, self.seed, self.number = rows, seed, number
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, j: int) -> Row:
        return self.rows[self.index(j)]

    def index(self, j: int) -> int:
        """Which row of the source comes as the j-th."""
        num_rows = len(self.rows)
        if num_rows >= ENDLESS:
            return j
        epoch, at = divmod(j, num_rows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, self.number, epoch])
            self.epoch, self.order = epoch, rng.permutation(num_rows)
        return int(self.order[at])


def make_schedule(shares: Sequence[float], num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source each row comes from, and how many rows of that source came before it.

    After any number N of rows, every source has given floor or ceil of its share of N. This is the
    scheduling of unit jobs with deadlines, earliest deadline first: job j of a source with share w
    may run from row floor(j / w) on and must have run by row ceil((j + 1) / w).

    Returns:
        (num_rows,) int16 source numbers and (num_rows,) int64 counts.

    Raises:
        ValueError: no share, or one that is not positive.
    """
    if not len(shares) or any(not share > 0 for share in shares):
        raise ValueError(f"shares must be positive, got {list(shares)}")
    # Whole numbers: the schedule is the same on every machine, and repeats after `period` rows.
    exact = [Fraction(share).limit_denominator(10**6) or Fraction(share) for share in shares]
    weights = [share / sum(exact) for share in exact]
    period = math.lcm(*(weight.denominator for weight in weights))
    jobs = [int(weight * period) for weight in weights]
    length = min(period, num_rows)
    source = np.zeros(length, dtype=np.int16)
    position = np.zeros(length, dtype=np.int64)
    count = [0] * len(jobs)
    for n in range(length):
        ready = [s for s, job in enumerate(jobs) if count[s] * period < job * (n + 1)]
        chosen = min(ready, key=lambda s: -(-(count[s] + 1) * period // jobs[s]))
        source[n], position[n] = chosen, count[chosen]
        count[chosen] += 1
    if length == num_rows:
        return source, position
    row = np.arange(num_rows)
    source, position = source[row % period], position[row % period]
    return source, position + row // period * np.array(jobs)[source]


def build_mixture(
    data: Data,
    tokenizer: PreTrainedTokenizerBase | None,
    family: Family,
    num_rows: int,
    seed: int,
) -> Mixture | StreamingMixture:
    """The recipe's sources, read and mixed; a `StreamingMixture` if any of them is streamed.

    Args:
        tokenizer: None for a model without one, which can train on .npy files of token ids only.
        num_rows: rows of the whole run, over all devices.

    Raises:
        ValueError: unreadable data (names file and line), or the first rows teach nothing.
    """
    texts = _Texts(tokenizer, family)
    sources = [_build(source, data.length, tokenizer, family, texts) for source in data.sources]
    shares = [source.share for source in data.sources]
    rows = [source for source in sources if isinstance(source, Rows)]
    mixture: Mixture | StreamingMixture
    if len(rows) == len(sources):
        mixture = Mixture(rows, shares, num_rows, seed)
    else:
        mixture = StreamingMixture(sources, shares, num_rows, seed)
    if not any((e.loss_weight > 0).any() for e in itertools.islice(iter(mixture), PROBED_ROWS)):
        paths = ", ".join(source.path for source in data.sources)
        raise ValueError(f"zero supervised tokens in the first {min(PROBED_ROWS, num_rows)} rows of {paths}")
    return mixture


class _Texts:
    """Tokenised texts by path, so that sources that share a text tokenise it once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, family: Family) -> None:
        self.tokenizer, self.family = tokenizer, family
        self.ids: dict[tuple[str, str, str], np.ndarray] = {}

    def __call__(self, path: str, split: str, field: str) -> np.ndarray:
        key = (path, split, field)
        if key not in self.ids:
            self.ids[key] = load_ids(path, self.tokenizer, self.family, split, field)
        return self.ids[key]


def _build(
    source: TextSource | ChatSource | RetrievalSource,
    length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    family: Family,
    texts: _Texts,
) -> Rows | Stream:
    if isinstance(source, TextSource) and (not source.streaming or source.path.endswith(".npy")):
        ids = texts(source.path, source.split, source.field)
        is_text = not source.path.endswith(".npy")  # an array may be too large to count its documents
        return TextRows(ids, length, family.block_size, source.path, stop_id(family) if is_text else None)
    if tokenizer is None:
        raise ValueError(
            f"{source.path}: this model comes without a tokenizer, so it can only be trained on "
            "text from an .npy file of token ids"
        )
    if isinstance(source, TextSource):
        return TextStream(source.path, tokenizer, family, length, source.split, source.field)
    if isinstance(source, RetrievalSource):
        return RetrievalRows(
            filler_ids(texts(source.path, "train", source.field), tokenizer, family),
            tokenizer,
            family,
            length,
            seed=source.seed,
            needles=source.needles,
            questions=source.questions,
            answer_weight=source.answer_weight,
            other_weight=source.other_weight,
        )
    # Imported here: TRL takes seconds to import, and only conversations need it.
    from mage_tune.data.chat import ChatRows, ChatStream

    chat = ChatStream if source.streaming else ChatRows
    return chat(source.path, tokenizer, family, length, source.split, source.overlong)


def _repeat(stream: Stream) -> Iterator[Row]:
    while True:
        is_empty = True
        for row in stream:
            is_empty = False
            yield row
        if is_empty:
            raise ValueError("a streaming source has no rows")
