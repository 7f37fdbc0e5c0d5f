"""The record type of a family: the facts that decide training noise, loss, masks and decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How the share of masked tokens is drawn.

    A noise level t ~ U(low, high) is drawn per block or per sample; each supervised token is then replaced by the
    mask token with probability p = (1 - floor) * t + floor.
    """

    per: Literal["block", "sample"]
    low: float = 0.0
    high: float = 1.0
    floor: float = 1e-3
    all_mask_share: float = 0.0
    """Share of blocks whose level is set to 1, so that every maskable position is masked."""
    at_least_one: bool = False
    """Redraw a sample until at least one of its tokens is masked."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts of one block-diffusion family (sources: the official code of each, see the module of the record)."""

    name: str
    architecture: str | None
    """transformers class that loads its weights natively; None when the checkpoint's own config names it."""
    model_types: tuple[str, ...]
    """`model_type` values in published config.json files that identify the family."""
    block_size: int
    mask_id: int | None
    stop_ids: tuple[int, ...]
    pad_id: int | None
    token_shift: bool
    """True when the logits at position i - 1 predict the token at position i."""
    noise: Noise
    complementary_views: bool = False
    """Train on x_t and on its complement (every supervised token is masked in exactly one of the two)."""
    loss_weight: Literal["uniform", "inverse_p"] = "uniform"
    seed_token: bool = False
    """True when decoding starts a new block with one real token at its first position (AR-seeded)."""
    seed_loss_weight: float | None = None
    """Not None: the first position of a block is never masked in training; it is predicted, with this weight, from the
    clean last position of the block before, which is what decoding does. None: it is masked like any other and (with
    token shift) predicted from the noisy block before, as Fast-dLLM v2 is trained."""
    fill: Literal["mask", "pad", "stop"] = "pad"
    """Token that fills a sample up to whole blocks."""
    fill_supervised: bool = True
    sub_block: int | None = None
    """Tokens accepted left to right in groups of this size inside a block; None: the whole block."""
    threshold: float = 0.9
    """Default confidence above which a decoded token is accepted."""
    lora_targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def with_overrides(self, **facts: Any) -> Family:
        """The same family with the given facts; a fact given as None keeps the record's value."""
        return replace(self, **{name: fact for name, fact in facts.items() if fact is not None})
