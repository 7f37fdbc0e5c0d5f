"""Every setting of a generation, checked before anything runs and written into its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mage_tune.decode.rules import Rule
from mage_tune.decode.sampler import Acceptance, Sampling, schedule
from mage_tune.decode.steps import Levers
from mage_tune.families import Family


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a generation, checked.

    Raises:
        ValueError: settings that contradict each other.
    """

    family: Family
    rule: Rule
    levers: Levers
    sampling: Sampling
    acceptance: Acceptance
    window: int
    """Tokens of a sub-block; the block size when there are none."""
    block_cache: bool
    steps: int | None
    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    prefill_chunk: int
    seed: int | tuple[int, ...]
    """Of every row, or of each."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk {self.prefill_chunk} must be at least 1")
        block = self.family.block_size
        if self.steps is not None and not block // self.window <= self.steps <= block:
            raise ValueError(
                f"steps {self.steps} must be between {block // self.window} (one per sub-block of {self.window}) "
                f"and the block size {block}"
            )
        if self.block_cache and self.window == block:
            raise ValueError("block_cache recomputes one sub-block at a time: give a sub_block smaller than the block")
        if self.block_cache and self.levers.residual:
            raise ValueError("block_cache and residual exclude each other: a residual belongs to whole blocks")
        if self.levers.is_used and self.rule.chooses != "once":
            raise ValueError(
                f"refresh, reselect_at and residual need a rule that chooses once per block, not {self.rule.name!r}"
            )

    def quota(self, step: int) -> int:
        """Tokens that a window's step (from 0) accepts at least."""
        steps = self.window if self.steps is None else self.steps * self.window // self.family.block_size
        quotas = schedule(self.window, steps)
        return max(1, quotas[min(step, steps - 1)])

    def row_seed(self, row: int) -> int:
        """The seed of one row."""
        return self.seed if isinstance(self.seed, int) else self.seed[row]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "family": self.family.name,
            "block_size": self.family.block_size,
            "sub_block": self.window,
            "block_cache": self.block_cache,
            "steps": self.steps,
            "max_new_tokens": self.max_new_tokens,
            "stop_ids": sorted(self.stop_ids),
            "stop_strings": list(self.stop_strings),
            "attention": self.rule.settings() | self.levers.settings(),
            "acceptance": asdict(self.acceptance),
            "sampling": asdict(self.sampling) | {"seed": self.seed},
        }


def window_size(family: Family, sub_block: int | None) -> int:
    """Sub-block size: as asked, the family's where it fits, or the whole block."""
    size = family.block_size
    if sub_block is None:
        return family.sub_block if family.sub_block is not None and size % family.sub_block == 0 else size
    if sub_block < 1 or size % sub_block:
        raise ValueError(f"sub_block {sub_block} does not divide the block size {size}")
    return sub_block
