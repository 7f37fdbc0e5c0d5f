"""What a generation gives back: per prompt, over all of them, and step by step for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "stop_string", "length"]
FORWARDS = ("prefill", "exact", "sparse", "commit")
"""Kinds of forward passes that are counted."""


@dataclass(frozen=True)
class Progress:
    """State of one row after a step, for live display."""

    row: int
    step: int
    """Steps of this block so far; 0 when it is laid out."""
    written: tuple[int, ...]
    """New tokens before this block."""
    block: tuple[int, ...]
    """New tokens of this block, the mask token where undecided."""
    is_sparse: bool
    is_finished: bool
    """Whether the block is."""


@dataclass(frozen=True)
class RowResult:
    """What one prompt gave."""

    tokens: list[int]
    """The continuation alone, cut after the stop token or the token that completed a stop string."""
    text: str | None
    """Without special tokens and without the stop string; None without a tokenizer."""
    finish: Finish
    blocks: int
    """Blocks that took at least one forward."""
    forwards: dict[str, int]
    """Forward passes: prefill, exact, sparse, commit."""
    sparse_blocks: int
    """Blocks with at least one sparse step."""
    keys_kept: float | None
    """Prefix keys per KV head in sparse steps, averaged over them; None when there were none."""


@dataclass(frozen=True)
class Generation:
    """The result of `generate`, with everything needed to run it again."""

    rows: list[RowResult]
    is_batch: bool
    settings: dict[str, Any]

    @property
    def tokens(self) -> Any:
        """Continuation of a single prompt, list[int]; one such list per prompt for a batch."""
        return self._each([row.tokens for row in self.rows])

    @property
    def text(self) -> Any:
        """Text of the continuation (None without a tokenizer); a list for a batch."""
        return self._each([row.text for row in self.rows])

    @property
    def forwards(self) -> dict[str, int]:
        """Forward passes summed over rows, each counted for the rows that needed it."""
        return {kind: sum(row.forwards[kind] for row in self.rows) for kind in FORWARDS}

    @property
    def blocks(self) -> int:
        """Blocks that took at least one forward, summed over rows."""
        return sum(row.blocks for row in self.rows)

    @property
    def forwards_per_block(self) -> float:
        """Denoising steps (exact and sparse, without commits) per block."""
        forwards = self.forwards
        return (forwards["exact"] + forwards["sparse"]) / max(1, self.blocks)

    @property
    def sparse_share(self) -> float:
        """Share of the blocks that had a sparse step."""
        return sum(row.sparse_blocks for row in self.rows) / max(1, self.blocks)

    @property
    def keys_kept(self) -> float | None:
        """Prefix keys per KV head in sparse steps, averaged over all of them; None when there were none."""
        sparse = [(row.keys_kept, row.forwards["sparse"]) for row in self.rows if row.keys_kept is not None]
        return sum(kept * n for kept, n in sparse) / sum(n for _, n in sparse) if sparse else None

    def _each(self, values: list[Any]) -> Any:
        return values if self.is_batch else values[0]
