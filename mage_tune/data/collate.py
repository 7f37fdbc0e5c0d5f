"""From examples to a training row: fill to whole blocks, draw noise, lay the streams side by side.

Everything random is drawn here from (seed, row), so the batch is the same on any worker, GPU or resumed run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mage_tune.blocks import (
    TILE,
    all_mask_positions,
    draw_mask,
    maskable_positions,
    noise_generator,
    num_blocks,
    round_up,
)
from mage_tune.data.example import Example
from mage_tune.families import Family
from mage_tune.streams import RowStreams

LENGTHS = 8
"""Different lengths of rows on a GPU, at most."""

NOISE_DRAW, BLOCK_DRAW, STUDENT_DRAW = 0, 1, 2
"""Numbers of the independent random draws of a row: its noise, and the blocks of attention alignment and student."""


def length_bucket(length: int) -> int:
    """What rows are padded to a multiple of, so that data of many lengths has at most eight on a GPU.

    FlexAttention tiles, and is compiled once for every length.
    """
    return round_up(math.ceil(length / LENGTHS), TILE)


@dataclass(frozen=True)
class Collator:
    """Makes batches for one family and one set of streams.

    Args:
        family: noise, fill, shift and mask facts.
        seed: the run's seed.
        exact_noisy: rows carry exact noisy streams (one, or two complementary views).
        mask_stream: rows carry the all-[MASK] stream.
        one_view: the family's first noisy view alone.
        sparse_stream: rows carry the sparse stream (a copy of the first noisy view).
        student_share: share of a row's blocks that the sparse stream holds, drawn anew for each row. What they predict
            weighs as much more, so that the expected loss is that of all blocks.
        sampled_blocks: blocks sampled per row and step for attention alignment, all where there are fewer; 0 for none.
        length_multiple: rows are padded to a multiple of this many tokens (and of the block size).
        pack_to: examples are laid side by side in rows of at most about so many tokens; None: a row each. Every term is
            the same sum; an example sees itself alone, at its own positions.
        document_multiple: packed examples begin at a multiple of this many tokens (and of the block size).
    """

    family: Family
    seed: int
    exact_noisy: bool = True
    mask_stream: bool = False
    one_view: bool = False
    sparse_stream: bool = False
    student_share: float = 1.0
    sampled_blocks: int = 0
    length_multiple: int = 1
    pack_to: int | None = None
    document_multiple: int = 1

    @property
    def views(self) -> int:
        """Noisy views of a row."""
        return (2 if self.family.complementary_views and not self.one_view else 1) * self.exact_noisy

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch.

        Returns:
            input_ids, position_ids: (batch, total) int64; streams: the `RowStreams` of every row;
            noisy_from, noisy_target, noisy_weight: (n,) flat position in the batch that predicts, token, loss weight;
            sparse_from, sparse_target, sparse_weight: the same of the sparse stream (only with one);
            teacher_from: (n_sparse,) flat position of the same prediction in a batch of [noisy ; clean] rows;
            student_blocks: (batch, slots) numbers of the blocks in the sparse stream (only if it does not hold all);
            is_counted: (views, batch, blocks) bool, blocks whose all-mask and later step differ and have a prefix;
            sampled_blocks, is_sampled: (batch, sampled) block numbers and whether they count;
            loss_items, sparse_items: scalar float32, what the batch's diffusion and sparse losses are divided by
                (the family's normaliser);
            first: (batch, blocks) int64, the first block of every block's example (only packed);
            rows: row numbers; num_tokens: data tokens before fill and streams. Both plain numbers, for the host.
        """
        size = self.family.block_size
        if self.pack_to is None:
            streams = self.streams(self._padded(max(round_up(len(e.input_ids), size) for e in examples)))
            made = [self._row(e, streams) for e in examples]
        else:
            streams, made = self._packed(examples, self.pack_to)
        length = streams.length
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.stack([r["input_ids"] for r in made])),
            "position_ids": torch.from_numpy(np.stack([r["position_ids"] for r in made])),
            "streams": streams,
            "rows": [e.row for e in examples],
            "num_tokens": sum(len(e.input_ids) for e in examples),
            "is_counted": torch.from_numpy(np.stack([r["is_counted"] for r in made], axis=1)),
        }
        for kind in ("noisy", "sparse"):
            if kind == "sparse" and not self.sparse_stream:
                continue
            batch[f"{kind}_from"] = _flat([r[f"{kind}_from"] for r in made], streams.total)
            batch[f"{kind}_target"] = torch.from_numpy(np.concatenate([r[f"{kind}_target"] for r in made]))
            batch[f"{kind}_weight"] = torch.from_numpy(np.concatenate([r[f"{kind}_weight"] for r in made]))
            batch["loss_items" if kind == "noisy" else "sparse_items"] = torch.tensor(
                sum(float(r[f"{kind}_items"]) for r in made)
            )
        if self.sparse_stream:
            batch["teacher_from"] = _flat([r["teacher_from"] for r in made], 2 * length)
        optional = ["student_blocks"] * (streams.student_blocks is not None) + ["first"] * (self.pack_to is not None)
        batch |= {name: torch.from_numpy(np.stack([r[name] for r in made])) for name in optional}
        if self.sampled_blocks:
            batch["sampled_blocks"] = torch.from_numpy(np.stack([r["sampled_blocks"] for r in made]))
            batch["is_sampled"] = torch.from_numpy(np.stack([r["is_sampled"] for r in made], axis=1))
        return batch

    def _padded(self, length: int) -> int:
        return round_up(length, int(np.lcm(self.length_multiple, self.family.block_size)))

    def _packed(self, examples: Sequence[Example], most: int) -> tuple[RowStreams, list[dict[str, np.ndarray]]]:
        """Rows of several examples: the longest first, each into the first row with room for it."""
        unit = int(np.lcm(self.document_multiple, self.family.block_size))
        lengths = {e.row: round_up(len(e.input_ids), unit) for e in examples}
        rows: list[list[Example]] = []
        for example in sorted(examples, key=lambda e: -lengths[e.row]):
            room = (row for row in rows if sum(lengths[e.row] for e in row) + lengths[example.row] <= most)
            row = next(room, None)
            if row is None:
                rows.append([example])
            else:
                row.append(example)
        longest = self._padded(max(sum(lengths[e.row] for e in row) for row in rows))
        parts = [[(self.streams(lengths[e.row]), e) for e in row] for row in rows]
        whole = self.streams(longest)
        if whole.student_blocks is not None:
            slots = max(sum(streams.student_blocks or 0 for streams, _ in row) for row in parts)
            whole = replace(whole, student_blocks=slots)
        sampled = max(sum(self._num_sampled(streams) for streams, _ in row) for row in parts)
        return whole, [self._joined(row, whole, sampled) for row in parts]

    def _joined(
        self, parts: list[tuple[RowStreams, Example]], whole: RowStreams, sampled: int
    ) -> dict[str, np.ndarray]:
        """One row of the `whole` streams from examples that are rows by themselves; what is left over is padding."""
        size, blocks = whole.block_size, whole.length // whole.block_size
        pad = self.family.pad_id
        assert pad is not None  # backbone.check_facts
        row: dict[str, np.ndarray] = {
            "input_ids": np.full(whole.total, pad, dtype=np.int64),
            "position_ids": np.zeros(whole.total, dtype=np.int64),
            "is_counted": np.zeros((max(self.views, 1), blocks), dtype=bool),
            "first": np.zeros(blocks, dtype=np.int64),
            "student_blocks": np.zeros(whole.student_blocks or 0, dtype=np.int64),
            "sampled_blocks": np.zeros(sampled, dtype=np.int64),
            "is_sampled": np.zeros((max(self.views, 1), sampled), dtype=bool),
        }
        lists: dict[str, list[np.ndarray]] = defaultdict(list)
        at = slot = draw = 0
        for streams, example in parts:
            made = self._row(example, streams)
            place = _moved(streams, whole, at, slot * size)
            for name in ("input_ids", "position_ids"):
                row[name][place] = made[name]
            own = slice(at // size, (at + streams.length) // size)
            row["is_counted"][:, own], row["first"][own] = made["is_counted"], own.start
            for kind in ("noisy", "sparse")[: 1 + self.sparse_stream]:
                lists[f"{kind}_from"].append(place[made[f"{kind}_from"]])
                for name in (f"{kind}_target", f"{kind}_weight", f"{kind}_items"):
                    lists[name].append(made[name])
            if self.sparse_stream:
                lists["teacher_from"].append(made["teacher_from"] + at)
            if streams.student_blocks is not None:
                row["student_blocks"][slot : slot + streams.student_blocks] = made["student_blocks"] + own.start
                slot += streams.student_blocks
            if self.sampled_blocks:
                drawn = slice(draw, draw + len(made["sampled_blocks"]))
                row["sampled_blocks"][drawn] = made["sampled_blocks"] + own.start
                row["is_sampled"][:, drawn] = made["is_sampled"]
                draw = drawn.stop
            at += streams.length
        row["first"][at // size :] = at // size
        joined = {name: np.concatenate(values) for name, values in lists.items() if not name.endswith("_items")}
        return row | joined | {name: np.sum(lists[name]) for name in lists if name.endswith("_items")}

    def _num_sampled(self, streams: RowStreams) -> int:
        return min(self.sampled_blocks, streams.length // streams.block_size)

    def streams(self, length: int) -> RowStreams:
        """The streams of rows of `length` tokens, a whole number of blocks."""
        size = self.family.block_size
        some = self.sparse_stream and self.student_share < 1
        return RowStreams(
            length,
            size,
            sparse=self.sparse_stream,
            mask=self.mask_stream,
            noisy=self.views,
            student_blocks=_share_of(length // size, self.student_share) if some else None,
        )

    def _row(self, example: Example, streams: RowStreams) -> dict[str, np.ndarray]:
        family, size = self.family, self.family.block_size
        tokens, weight = self._filled(example, streams.length)
        own = round_up(len(example.input_ids), size)  # noise must not depend on how far the batch is padded
        is_masked, probability = draw_mask(
            maskable_positions(weight[:own], family),
            family.noise,
            size,
            noise_generator(self.seed, example.row, NOISE_DRAW),
        )
        is_masked = np.pad(is_masked, (0, streams.length - own))
        probability = np.pad(probability, (0, streams.length - own), constant_values=1.0)
        supervised_but_masked = [is_masked]
        if family.complementary_views:
            supervised_but_masked.append(maskable_positions(weight, family) & ~is_masked)
        at_start = all_mask_positions(weight, family)
        assert family.mask_id is not None  # backbone.check_facts
        noisy = [np.where(m, family.mask_id, tokens) for m in supervised_but_masked]
        start = np.where(at_start, family.mask_id, tokens)
        pieces = [start] * self.mask_stream + noisy[: self.views] + [tokens]
        places = [np.arange(streams.length)] * len(pieces)
        row: dict[str, np.ndarray] = {}
        if self.sparse_stream:
            part = self._predictions(tokens, weight, is_masked, probability, 0, None)
            row["sparse_items"] = self._items(weight, part[2])
            place = places[0]
            if streams.student_blocks is None:
                row |= _named("sparse", [part]) | {"teacher_from": part[0]}
            else:
                row |= self._student(part, own // size, streams, example.row)
                place = (row["student_blocks"][:, None] * size + np.arange(size)).ravel()
            pieces, places = [noisy[0][place], *pieces], [place, *places]
        row |= {"input_ids": np.concatenate(pieces).astype(np.int64), "position_ids": np.concatenate(places)}
        clean = streams.offset("clean")
        noisy_parts = [
            self._predictions(tokens, weight, masked, probability, streams.offset("noisy", view), clean)
            for view, masked in enumerate(supervised_but_masked[: self.views])
        ]
        row |= _named("noisy", noisy_parts)
        row["noisy_items"] = self._items(weight, row["noisy_weight"])
        row["is_counted"] = np.stack(
            [_differing_blocks(start, x, size) for x in noisy[: max(self.views, 1)]]
        )  # (views, blocks)
        if self.sampled_blocks:
            row |= self._sample_blocks(row["is_counted"], example.row)
        return row

    def _filled(self, example: Example, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights up to `length`: the family's fill to the end of the last block, then padding.

        Fill tokens weigh as much as the last token of the sample where the family trains them, else nothing.
        """
        family = self.family
        num_tokens = len(example.input_ids)
        block_end = num_blocks(num_tokens, family.block_size) * family.block_size
        fill = {"mask": family.mask_id, "pad": family.pad_id, "stop": family.stop_ids[0]}[family.fill]
        assert fill is not None and family.pad_id is not None  # backbone.check_facts
        tokens = np.full(length, family.pad_id, dtype=np.int64)
        weight = np.zeros(length, dtype=np.float32)
        tokens[:num_tokens], weight[:num_tokens] = example.input_ids, example.loss_weight
        tokens[num_tokens:block_end] = fill
        if family.fill_supervised:
            weight[num_tokens:block_end] = example.loss_weight[-1]
        return tokens, weight

    def _predictions(
        self,
        tokens: np.ndarray,
        weight: np.ndarray,
        is_masked: np.ndarray,
        probability: np.ndarray,
        offset: int,
        clean: int | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row positions that predict, target tokens, loss weights) of one noisy stream at row position `offset`.

        With token shift, position i is predicted from i - 1; position 0 of the row never is. `clean` is the row
        position of the clean stream when the family predicts each block's first token from the clean token before.
        """
        family = self.family
        position = np.flatnonzero(is_masked)
        if family.token_shift:
            position = position[position > 0]
        loss = weight[position].astype(np.float64)
        if family.loss_weight == "inverse_p":
            loss = loss / probability[position]
        source = offset + position - int(family.token_shift)
        if family.seed_loss_weight is not None and clean is not None:
            first = np.arange(family.block_size, len(tokens), family.block_size)
            first = first[weight[first] > 0]
            source = np.concatenate([source, clean + first - 1])
            position = np.concatenate([position, first])
            loss = np.concatenate([loss, family.seed_loss_weight * weight[first]])
        return source, tokens[position], loss.astype(np.float32)

    def _items(self, weight: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """What a loss is divided by, from the weights of all tokens and of all predictions.

        SDAR divides its 1/p-weighted sum by all supervised tokens; a uniform loss is a mean over predicted ones.
        """
        return (weight if self.family.loss_weight == "inverse_p" else losses).sum(dtype=np.float64)

    def _student(
        self, part: tuple[np.ndarray, np.ndarray, np.ndarray], own_blocks: int, streams: RowStreams, row: int
    ) -> dict[str, np.ndarray]:
        """The blocks of a row that its sparse stream holds, and what they predict.

        Every block is as likely as any other, and weighs as much more as there are blocks to one that is drawn. The
        draw does not see padding; slots that padding leaves over hold block 0 and predict nothing.
        """
        assert streams.student_blocks is not None
        size = streams.block_size
        count = _share_of(own_blocks, self.student_share)
        drawn = np.sort(noise_generator(self.seed, row, STUDENT_DRAW).permutation(own_blocks)[:count])
        blocks = np.zeros(streams.student_blocks, dtype=np.int64)
        blocks[:count] = drawn
        slot = np.full(streams.length // size, -1)
        slot[drawn] = np.arange(count)
        source, target, loss = part
        is_held = slot[source // size] >= 0
        source = source[is_held]
        return {
            "student_blocks": blocks,
            "teacher_from": source,
            "sparse_from": slot[source // size] * size + source % size,
            "sparse_target": target[is_held],
            "sparse_weight": (loss[is_held] * (own_blocks / count)).astype(np.float32),
        }

    def _sample_blocks(self, is_counted: np.ndarray, row: int) -> dict[str, np.ndarray]:
        """Blocks of this step's attention alignment, without repetition; fewer where fewer count."""
        generator = noise_generator(self.seed, row, BLOCK_DRAW)
        count = min(self.sampled_blocks, is_counted.shape[1])  # as `_num_sampled`
        chosen = generator.permutation(np.flatnonzero(is_counted.any(axis=0)))[:count]
        blocks = np.zeros(count, dtype=np.int64)  # block 0 fills up: it has no prefix and never counts
        blocks[: len(chosen)] = chosen
        return {"sampled_blocks": blocks, "is_sampled": is_counted[:, blocks]}


def _moved(streams: RowStreams, whole: RowStreams, at: int, student_at: int) -> np.ndarray:
    """(streams.total,) position in a row of `whole` streams of every position of an example's own row.

    The example begins at `at` in each stream; in a sparse stream that holds some blocks, at `student_at`.
    """
    places = []
    if streams.sparse:
        places.append(np.arange(streams.sparse_length) + (at if streams.student_blocks is None else student_at))
    others = np.arange(streams.exact.total // streams.length) * whole.length + whole.sparse_length + at
    return np.concatenate([*places, (others[:, None] + np.arange(streams.length)).ravel()])


def _share_of(blocks: int, share: float) -> int:
    """Blocks that make up a share of so many, at least one; a hair less than whole counts as whole."""
    return max(math.ceil(share * blocks - 1e-9), 1)


def _differing_blocks(start: np.ndarray, later: np.ndarray, block_size: int) -> np.ndarray:
    """(blocks,) bool: blocks after the first whose later step differs from their all-[MASK] step."""
    differs = (start != later).reshape(-1, block_size).any(axis=1)
    differs[0] = False  # the first block has no prefix to choose from
    return differs


def _named(kind: str, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    names = (f"{kind}_from", f"{kind}_target", f"{kind}_weight")
    if not parts:
        return dict(zip(names, (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)), strict=True))
    return {name: np.concatenate([p[i] for p in parts]) for i, name in enumerate(names)}


def _flat(positions: list[np.ndarray], total: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([p + i * total for i, p in enumerate(positions)]).astype(np.int64))
