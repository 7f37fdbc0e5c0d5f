"""Conversations: only the assistant's answers, each with its stop token, are supervised.

Chat templates rarely mark the assistant's part, so it is found by rendering prefixes. For answer i

    before = render(messages[:i], add_generation_prompt=True)      what the model is given
    after  = render(messages[:i + 1])                              what it should have made of it

`after` must begin with `before`; the rest, up to and with the stop token, is the answer. The pieces
are tokenised apart, because that is what happens in decoding: the prompt's ids are fixed before the
answer's first token exists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_convert_to_chatml

from mage_tune.data.files import Record, read_records
from mage_tune.data.text import Row, stop_id
from mage_tune.families import Family

log = logging.getLogger(__name__)

Message = dict[str, Any]
Overlong = Literal["drop", "truncate", "error"]

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Role names of data sets with {from, value} messages, which TRL renames but for the roles."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    is_answer: bool


class ChatRows:
    """Conversations as rows, tokenised once.

    Args:
        path, split: as in `read_records`; every record has `messages` or `prompt` and `completion`.
        tokenizer: its chat template renders messages; prompt/completion strings need none.
        length: most tokens of a row.
        overlong: what happens to a longer conversation.

    Raises:
        ValueError: a bad record (names file and line), no chat template, a template whose answers
            cannot be told from prompts, or nothing supervised in the whole source.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        length: int,
        split: str = "train",
        overlong: Overlong = "drop",
    ) -> None:
        placed = list(chat_rows(read_records(path, split), path, tokenizer, family, length, overlong))
        self.places, rows = [place for place, _ in placed], [row for _, row in placed]
        # Flat arrays: a million small ones would cost more than the ids in them.
        self.ids = np.concatenate([ids.astype(np.uint32) for ids, _ in rows])
        self.is_supervised = np.concatenate([weight > 0 for _, weight in rows])
        self.ends = np.cumsum([len(ids) for ids, _ in rows])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        span = slice(self.ends[i - 1] if i else 0, self.ends[i])
        return self.ids[span].astype(np.int64), self.is_supervised[span].astype(np.float32)

    def place(self, i: int) -> str:
        """The record that row i was made of, for messages."""
        return f"record {self.places[i]}"


class ChatStream:
    """The rows of `ChatRows`, in order, read anew on each pass."""

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        family: Family,
        length: int,
        split: str = "train",
        overlong: Overlong = "drop",
    ) -> None:
        self.path, self.split, self.overlong = path, split, overlong
        self.tokenizer, self.family, self.length = tokenizer, family, length

    def __iter__(self) -> Iterator[Row]:
        records = read_records(self.path, self.split, streaming=True)
        rows = chat_rows(records, self.path, self.tokenizer, self.family, self.length, self.overlong)
        yield from (row for _, row in rows)


def chat_rows(
    records: Iterator[Record],
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    length: int,
    overlong: Overlong,
) -> Iterator[tuple[str, Row]]:
    """Place and row of every usable conversation; says at the end what was left out.

    Raises:
        ValueError: as `ChatRows`; "nothing supervised" when the records end without a row.
    """
    stop = stop_id(family)
    kept = num_unsupervised = num_overlong = 0
    for record in records:
        pieces = conversation_pieces(record, tokenizer, stop)
        row = _row(pieces, record.place, tokenizer, family)
        if row is None:
            num_unsupervised += 1
            continue
        ids, weight = row
        if len(ids) > length:
            num_overlong += 1
            if overlong == "error":
                raise ValueError(
                    f"{record.place}: {len(ids)} tokens, more than data.length {length} "
                    "(overlong: drop or truncate would let it pass)"
                )
            if overlong == "drop" or not weight[:length].any():
                continue
        kept += 1
        yield record.place, (ids[:length], weight[:length])
    left_out = f"{num_unsupervised} without an answer, {num_overlong} longer than {length} tokens"
    if not kept:
        raise ValueError(f"{path}: zero supervised tokens; of its conversations {left_out}")
    if num_unsupervised or num_overlong:
        log.warning("%s: %d conversations used; %s (%s)", path, kept, left_out, overlong)


def conversation_pieces(record: Record, tokenizer: PreTrainedTokenizerBase, stop: int) -> list[Piece]:
    """Prompts and answers of one record, in order, ending with the last answer's stop token.

    Empty when there is no answer in it.
    """
    fields = _as_messages(record)
    if "messages" in fields:
        return message_pieces(fields["messages"], tokenizer, stop, record.place)
    if "prompt" not in fields or "completion" not in fields:
        known = ", ".join(map(repr, fields)) or "none"
        raise ValueError(
            f"{record.place}: neither 'messages' nor 'prompt' and 'completion' (the record's fields: {known})"
        )
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
        return message_pieces(messages, tokenizer, stop, record.place, first=len(prompt))
    for name in ("prompt", "completion"):
        record.text(name)  # a string and a list of messages cannot go together
    if not completion:
        return []
    return [Piece(prompt, False), Piece(completion + _stop_text(tokenizer, stop), True)]


def message_pieces(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    stop: int,
    place: str,
    first: int = 0,
) -> list[Piece]:
    """Prompts and answers of a list of messages, rendered by the tokenizer's chat template.

    Args:
        first: answers before this message are part of the prompt.

    Raises:
        ValueError: bad messages, no template, or a template that does not render answers as a
            continuation of their prompts, or does not end them with the stop token.
    """
    messages = [_message(m, i, place) for i, m in enumerate(messages)]
    stop_text = _stop_text(tokenizer, stop)
    pieces: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i < first:
            continue
        if i == 0:
            raise ValueError(f"{place}: the conversation begins with an answer")
        before = render(messages[:i], tokenizer, place, add_generation_prompt=True)
        after = render(messages[: i + 1], tokenizer, place)
        if not (before.startswith(done) and after.startswith(before)):
            raise ValueError(
                f"{place}: the chat template of {_name(tokenizer)} does not render message {i} as "
                "a continuation of what comes before it, so the answer cannot be told from the "
                "prompt; keep one answer per record, as its last message"
            )
        # Some templates write a line break after the stop token: it belongs to the next turn.
        answer, found, _ = after[len(before) :].rpartition(stop_text)
        if not found:
            raise ValueError(
                f"{place}: the chat template of {_name(tokenizer)} does not end an answer with the "
                f"stop token {stop_text!r}; set model.stop_ids to the id it does end with"
            )
        pieces += [Piece(before[len(done) :], False), Piece(answer + stop_text, True)]
        done = before + answer + stop_text
    return pieces


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    place: str,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the tokenizer's chat template writes it.

    Raises:
        ValueError: there is no template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{place}: the tokenizer {_name(tokenizer)} has no chat template; put a "
            "chat_template.jinja beside it, or give `prompt` and `completion` as strings"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError) as error:  # TypeError: e.g. "..." + None in a template
        raise ValueError(
            f"{place}: the chat template of {_name(tokenizer)} refuses this conversation: {error}"
        ) from error
    return str(text)


def _row(pieces: Sequence[Piece], place: str, tokenizer: PreTrainedTokenizerBase, family: Family) -> Row | None:
    """Ids and weights of the pieces; None when there are none."""
    if not pieces:
        return None
    encoded = tokenizer(
        [piece.text for piece in pieces],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    ids = np.concatenate([np.asarray(e, dtype=np.int64) for e in encoded])
    if family.mask_id is not None and (ids == family.mask_id).any():
        raise ValueError(f"{place}: the conversation spells the mask token (id {family.mask_id})")
    weight = np.zeros(len(ids), dtype=np.float32)
    ends = np.cumsum([0, *map(len, encoded)])
    for piece, (start, end) in zip(pieces, pairwise(ends), strict=True):
        weight[start:end] = piece.is_answer
    return ids, weight


def _as_messages(record: Record) -> dict[str, Any]:
    """The record, {from, value} turned into {role, content}, lists checked to be messages."""
    fields = maybe_convert_to_chatml(record.fields)
    names = ("messages",) if "messages" in fields else ("prompt", "completion")
    for name in names:
        found = fields.get(name)
        # TRL looks at the first message only, and into an empty list; the rest is checked later.
        if name == "messages" and not isinstance(found, list):
            raise ValueError(f"{record.place}: 'messages' is not a list of messages")
        if isinstance(found, list) and (not found or not is_conversational({name: found})):
            raise ValueError(f"{record.place}: {name!r} is not a list of {{role, content}} messages")
    return fields


def _message(message: Any, i: int, place: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{place}: message {i} is not an object with a role and a content")
    has_text = isinstance(message.get("content"), str)
    if not has_text and not (message.get("content") is None and message.get("tool_calls")):
        raise ValueError(f"{place}: message {i} ({message['role']}) has no text as its content")
    # Tables fill the keys that a message lacks with nulls; templates take them for there.
    given: Message = {"content": "", **{k: v for k, v in message.items() if v is not None}}
    return given | {"role": SHAREGPT_ROLES.get(given["role"], given["role"])}


def _stop_text(tokenizer: PreTrainedTokenizerBase, stop: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(stop))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)
