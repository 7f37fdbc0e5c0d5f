"""Synthetic retrieval: numbered needles scattered in text, then chat turns that ask for some.

    ... text ... One of the special magic numbers for amber-otter is: 483920. ... text ...
    user: What is the special magic number for amber-otter?    assistant: 483920

A row is drawn from (seed, row number) alone. The pieces (`draw_needles`, `make_haystack`,
`question`, `answer`, `Dialogue`) are what the needle evaluation is made of as well, so training and
evaluation ask in the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from mage_tune.data.text import Row, stop_id
from mage_tune.families import Family

ENDLESS = 2**31
"""Length of a source that can be drawn from for ever."""

_ADJECTIVES = (
    "amber ancient ardent arid bold brave brisk broad calm candid clever coastal cosmic crimson "
    "curious daring distant dusty eager early elegant faint fearless fierce formal fragile gentle "
    "glossy golden grand hidden hollow honest humble icy idle jolly keen lively lofty lucid mellow "
    "misty modest narrow nimble noble pale patient placid quiet rapid rustic scarlet silent sleepy "
    "solemn sturdy tender vivid"
)
_NOUNS = (
    "anchor anvil apple arrow badger basin beacon blanket bottle bridge candle canyon carpet "
    "castle cellar cherry cliff compass copper cottage cradle desert engine falcon feather "
    "forest garden glacier hammer harbor island jacket kettle ladder lantern marble meadow mirror "
    "mountain needle orchard otter paddle pebble pillow planet pocket quarry ribbon river saddle "
    "shadow spider statue temple thunder tunnel valley walnut window"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

SENTENCE_START = "One of the special magic numbers for"
SENTENCE_MIDDLE = " {} is: {}"
SENTENCE_END = "."
"""The sentence of a needle, cut where no token reaches across."""

INTRODUCTION = (
    "Some special magic numbers are hidden in the following text. Remember them: there will be questions about them.\n"
)
"""Ends with one line break: two at the end of a piece would become one token, as they do nowhere
inside a prompt."""

ONE_KEY_SHARE, MANY_KEYS_SHARE = 0.7, 0.18
"""Share of the turns that ask for one key, and for two or three at once; the rest ask for all the
numbers of a key that has two."""
TWO_VALUES_SHARE = 0.5
"""Share of the rows in which some keys have two numbers."""


@dataclass(frozen=True)
class Needle:
    """A key and its numbers; each number has a sentence of its own in the haystack."""

    key: str
    values: tuple[str, ...]
    depth: tuple[float, ...] = ()
    """Share of the haystack before each sentence: asked for when given to `make_haystack` (empty:
    anywhere), true in what it returns."""
    starts: tuple[int, ...] = ()
    """Token index in the haystack at which each sentence begins; set by `make_haystack`."""


Forms = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
"""(key, value) -> ids of its sentence within a line, and as a line of its own."""


class RetrievalRows:
    """Rows of exactly `length` tokens: a haystack, then questions and answers.

    Row i depends on (seed, i) and the text alone.

    Args:
        filler: (tokens,) ids of the text, from `filler_ids`.
        needles: fewest and most needle sentences of a row; fewer where they would not fit.
        questions: fewest and most turns; fewer where they would not fit or the keys run out.
        answer_weight: loss weight of answers and their stop token; `other_weight`: of the rest.

    Raises:
        ValueError: one needle and one question do not fit in `length`.
    """

    def __init__(
        self,
        filler: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        length: int,
        *,
        seed: int = 0,
        needles: tuple[int, int] = (4, 24),
        questions: tuple[int, int] = (1, 6),
        answer_weight: float = 4.3,
        other_weight: float = 0.3,
    ) -> None:
        self.filler, self.tokenizer, self.length, self.seed = filler, tokenizer, length, seed
        self.needles, self.questions = needles, questions
        self.answer_weight, self.other_weight = answer_weight, other_weight
        self.dialogue = Dialogue(tokenizer, family)
        # A length that is too short for some row must show now, not at that row.
        longest = _longest_needle(tokenizer)
        self._fit([longest], [[longest]], _sentence_ids([longest], tokenizer))

    def __len__(self) -> int:
        return ENDLESS

    def place(self, i: int) -> str:
        """Which row it is, for messages; no record holds it."""
        return f"draw {i} of seed {self.seed}"

    def __getitem__(self, i: int) -> Row:
        rng = np.random.default_rng([self.seed, i])
        needles = draw_needles(rng, int(rng.integers(*self.needles, endpoint=True)))
        turns = draw_turns(rng, needles, int(rng.integers(*self.questions, endpoint=True)))
        forms = _sentence_ids(needles, self.tokenizer)
        needles, spoken = self._fit(needles, turns, forms)
        num_spoken = sum(len(ids) for ids, _ in spoken)
        haystack, _ = _hide(rng, self.filler, self.tokenizer, self.length - num_spoken, needles, forms)
        (head, _), *rest = spoken
        ids = [head, haystack, *(ids for ids, _ in rest)]
        is_answer = [False, False, *(is_answer for _, is_answer in rest)]
        weight = np.repeat(
            [self.answer_weight if a else self.other_weight for a in is_answer],
            [len(part) for part in ids],
        )
        return np.concatenate(ids), weight.astype(np.float32)

    def _fit(
        self, needles: list[Needle], turns: list[list[Needle]], forms: Forms
    ) -> tuple[list[Needle], list[tuple[np.ndarray, bool]]]:
        """As many turns, then needles, as fit: needles nobody asks for take at most half the text.

        Returns the needles and what is said.
        """
        costs = {n: _most_tokens([n], forms) for n in needles}
        while True:
            spoken = self.dialogue.turns([(_ask(turn), answer(turn)) for turn in turns])
            room = self.length - sum(len(ids) for ids, _ in spoken)
            asked = {needle for turn in turns for needle in turn}
            used = sum(costs[n] for n in asked)
            if used <= room:
                break
            if len(turns) == 1 and len(asked) == 1:
                raise ValueError(
                    f"data.length {self.length} is too short for a retrieval row: a needle with "
                    f"two numbers and its question take up to {self.length - room + used} tokens"
                )
            turns = turns[:-1] if len(turns) > 1 else [turns[0][:1]]
        kept = []
        for needle in needles:
            if needle not in asked:
                if used + costs[needle] > room // 2:
                    continue
                used += costs[needle]
            kept.append(needle)
        return kept, spoken


class Dialogue:
    """The words around a haystack, as token ids: the chat template's, or a plain form without one.

    The template is rendered once, on stand-ins for what is said; then only questions and answers
    are tokenised.

    Raises:
        ValueError: the template does not repeat itself from turn to turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
        self.tokenizer = tokenizer
        self.stop = str(tokenizer.convert_ids_to_tokens(stop_id(family)))
        if tokenizer.chat_template:
            self.head, self.to_answer, self.last_answer, self.to_question = self._read_template()
        else:
            self.head, self.to_answer, self.last_answer = "", "\nAnswer:", ""
            self.to_question = "\n\n"
        self.is_plain = not tokenizer.chat_template
        (self.head_ids,) = _encode([self.head + INTRODUCTION], tokenizer)

    def prompt(self, question: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) before and after the haystack, up to where the answer begins."""
        (head, _), (asked, _), _ = self.turns([(question, "")])
        return head, asked

    def turns(self, turns: Sequence[tuple[str, str]]) -> list[tuple[np.ndarray, bool]]:
        """Ids (int64) of what is said, in order, and whether each piece is an answer.

        The first piece comes before the haystack, all others after it.
        """
        texts = []
        for i, (asked, answered) in enumerate(turns):
            if self.is_plain:
                asked, answered = f"Question: {asked}", f" {answered}"
            before = self.to_question if i else "\n\n"
            is_last = i + 1 == len(turns)
            texts.append(before + asked + self.to_answer)
            texts.append((self.last_answer if is_last else "") + answered + self.stop)
        encoded = _encode(texts, self.tokenizer)
        return [(self.head_ids, False), *((ids, i % 2 == 1) for i, ids in enumerate(encoded))]

    def _read_template(self) -> tuple[str, str, str, str]:
        """(before the first question, question -> answer, before the last answer, answer -> next).

        The third is what some templates write before the last answer only (an empty think block).
        """
        q0, a0, q1 = "@@question-0@@", "@@answer-0@@", "@@question-1@@"
        messages = [
            {"role": "user", "content": q0},
            {"role": "assistant", "content": a0},
            {"role": "user", "content": q1},
        ]

        def shown(count: int, add_generation_prompt: bool) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        head, _, to_answer = shown(1, True).partition(q0)
        last_answer, _, after = shown(2, False).removeprefix(head + q0 + to_answer).partition(a0)
        to_question = shown(3, True).removeprefix(head + q0 + to_answer + a0)
        to_question = to_question.removesuffix(q1 + to_answer)
        rebuilt = head + q0 + to_answer + a0 + to_question + q1 + to_answer
        starts = shown(2, False).startswith(head + q0 + to_answer)
        if rebuilt != shown(3, True) or not starts or not after.startswith(self.stop):
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not write every turn "
                f"in the same way, each answer ended by {self.stop!r}: no retrieval data with it"
            )
        return head, to_answer, last_answer, to_question.removeprefix(self.stop)


def filler_ids(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, family: Family) -> np.ndarray:
    """Text ids to hide needles in: the stop tokens between documents become line breaks."""
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    return np.where(ids == stop_id(family), np.asarray(line_break, dtype=ids.dtype), ids)


def draw_needles(rng: np.random.Generator, count: int) -> list[Needle]:
    """Needles with `count` sentences in all; all keys and all numbers differ.

    In half of the rows, up to a quarter of the keys have two numbers.
    """
    num_double = 0
    if count >= 3 and rng.random() < TWO_VALUES_SHARE:
        num_double = int(rng.integers(1, max(1, count // 4), endpoint=True))
    num_keys = count - num_double
    drawn = rng.choice(len(ADJECTIVES) * len(NOUNS), size=num_keys, replace=False)
    keys = [f"{ADJECTIVES[d // len(NOUNS)]}-{NOUNS[d % len(NOUNS)]}" for d in drawn]
    values = [str(v) for v in rng.choice(900_000, size=count, replace=False) + 100_000]
    doubles = [Needle(key, (values.pop(), values.pop())) for key in keys[:num_double]]
    return doubles + [Needle(key, (values.pop(),)) for key in keys[num_double:]]


def draw_turns(rng: np.random.Generator, needles: Sequence[Needle], count: int) -> list[list[Needle]]:
    """Which needles each turn asks for: at most `count` turns, at least one, no needle twice."""
    order = [needles[i] for i in rng.permutation(len(needles))]
    single = [n for n in order if len(n.values) == 1]
    double = [n for n in order if len(n.values) > 1]
    turns: list[list[Needle]] = []
    for _ in range(count):
        kind = rng.random()
        if double and (kind >= ONE_KEY_SHARE + MANY_KEYS_SHARE or not single):
            turns.append([double.pop()])
        elif single:
            size = 1 if kind < ONE_KEY_SHARE else int(rng.integers(2, 3, endpoint=True))
            turns.append([single.pop() for _ in range(min(size, len(single)))])
    return turns


def make_haystack(
    rng: np.random.Generator,
    filler: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    needles: Sequence[Needle],
) -> tuple[np.ndarray, list[Needle]]:
    """Exactly `length` tokens of text with the needles' sentences in it.

    A window of the text is drawn; every sentence goes to the sentence or line border nearest to its
    depth (drawn uniformly where the needle asks for none).

    Args:
        filler: (tokens,) ids of the text, from `filler_ids`; repeated when it is too short.

    Returns:
        (length,) int64 ids, and the needles with their true depths and starts.

    Raises:
        ValueError: the sentences alone are longer than `length`, or there is no text.
    """
    return _hide(rng, filler, tokenizer, length, needles, _sentence_ids(needles, tokenizer))


def _hide(
    rng: np.random.Generator,
    filler: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    needles: Sequence[Needle],
    forms: Forms,
) -> tuple[np.ndarray, list[Needle]]:
    """`make_haystack` with the sentences already tokenised."""
    if not len(filler):
        raise ValueError("no text to hide needles in")
    room = length - _most_tokens(needles, forms)
    if room < 0:
        raise ValueError(f"{len(needles)} needles do not fit in {length} tokens")
    first = int(rng.integers(0, max(1, len(filler) - length), endpoint=True))
    window = _window(filler, first, length)
    wanted = np.concatenate([np.empty(0), *(_depths(n, rng) for n in needles)]) * room
    position, is_line = _snap(window[: room + 1], wanted, tokenizer)
    sentences = [(n.key, value) for n in needles for value in n.values]
    parts: list[np.ndarray] = []
    starts = np.zeros(len(sentences), dtype=np.int64)
    used = written = 0  # tokens of the window, and of the haystack
    for s in np.argsort(position, kind="stable"):
        inline, own_line = forms[sentences[s]]
        hidden = own_line if is_line[s] else inline
        parts += [window[used : position[s]], hidden]
        starts[s] = written + position[s] - used
        written, used = int(starts[s]) + len(hidden), int(position[s])
    parts.append(window[used : used + length - written])
    placed, at = [], 0
    for needle in needles:
        own = tuple(int(start) for start in starts[at : at + len(needle.values)])
        at += len(own)
        placed.append(replace(needle, starts=own, depth=tuple(s / length for s in own)))
    return np.concatenate(parts), placed


def sentence(key: str, value: str) -> str:
    """What stands in the haystack."""
    return SENTENCE_START + SENTENCE_MIDDLE.format(key, value) + SENTENCE_END


def question(keys: Sequence[str], every: bool = False) -> str:
    """Asks for the number of each key, in order; with `every`, for all numbers of the only key."""
    if every:
        return f"What are all the special magic numbers for {keys[0]}?"
    if len(keys) == 1:
        return f"What is the special magic number for {keys[0]}?"
    return f"What are the special magic numbers for {', '.join(keys[:-1])} and {keys[-1]}?"


def answer(needles: Sequence[Needle]) -> str:
    """The numbers in the order asked; those of one key in the order of the text."""
    return ", ".join(value for needle in needles for value in needle.values)


def _ask(turn: Sequence[Needle]) -> str:
    return question([n.key for n in turn], every=len(turn[0].values) > 1)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def _sentence_ids(needles: Sequence[Needle], tokenizer: PreTrainedTokenizerBase) -> Forms:
    """Both forms of every sentence; only what differs between sentences is tokenised here."""
    inline_start, line_start, inline_end, line_end = _sentence_frame(tokenizer)
    sentences = [(n.key, value) for n in needles for value in n.values]
    middles = _encode([SENTENCE_MIDDLE.format(*said) for said in sentences], tokenizer)
    return {
        said: (
            np.concatenate([inline_start, middle, inline_end]),
            np.concatenate([line_start, middle, line_end]),
        )
        for said, middle in zip(sentences, middles, strict=True)
    }


@lru_cache(maxsize=4)
def _sentence_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, ...]:
    """Ids of a sentence's start within a line and as a line of its own, then of its ends."""
    ends = [SENTENCE_END, f"{SENTENCE_END}\n"]
    return tuple(_encode([f" {SENTENCE_START}", SENTENCE_START, *ends], tokenizer))


def _longest_needle(tokenizer: PreTrainedTokenizerBase) -> Needle:
    """A needle that takes as many tokens as any: two numbers, and the longest words for its key."""

    def longest(words: Sequence[str]) -> str:
        return max(zip(map(len, _encode(list(words), tokenizer)), words, strict=True))[1]

    return Needle(f"{longest(ADJECTIVES)}-{longest(NOUNS)}", ("594837", "607182"))


def _most_tokens(needles: Sequence[Needle], forms: Forms) -> int:
    """Tokens that the needles' sentences take at most, whichever form each is given."""
    return sum(max(map(len, forms[n.key, value])) for n in needles for value in n.values)


def _depths(needle: Needle, rng: np.random.Generator) -> np.ndarray:
    if needle.depth:
        return np.asarray(needle.depth, dtype=np.float64)
    return np.sort(rng.random(len(needle.values)))  # sorted: `values` is in the order of the text


def _window(filler: np.ndarray, first: int, length: int) -> np.ndarray:
    if first + length <= len(filler):
        return filler[first : first + length].astype(np.int64)
    return filler[np.arange(first, first + length) % len(filler)].astype(np.int64)


def _snap(window: np.ndarray, wanted: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """The border nearest to each wanted position, and whether it is a line's beginning.

    A border is before a line, or between a full stop and a space; anywhere if there is none.
    """
    ends_line, ends_sentence, starts_space = _borders(tokenizer)
    is_line = np.zeros(len(window), dtype=bool)
    is_line[1:] = ends_line[window[:-1]]
    is_border = is_line.copy()
    is_border[1:] |= ends_sentence[window[:-1]] & starts_space[window[1:]]
    borders = np.flatnonzero(is_border) if is_border.any() else np.arange(len(window))
    right = np.clip(np.searchsorted(borders, wanted), 0, len(borders) - 1)
    left = np.maximum(right - 1, 0)
    is_left = np.abs(borders[left] - wanted) < np.abs(borders[right] - wanted)
    position = borders[np.where(is_left, left, right)]
    return position, is_line[position]


@lru_cache(maxsize=4)
def _borders(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token id (bool): ends a line, ends a sentence, begins with white space."""
    texts = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    return (
        np.array([t.endswith("\n") for t in texts]),
        np.array([t.endswith((".", "!", "?")) for t in texts]),
        np.array([t[:1].isspace() for t in texts]),
    )
