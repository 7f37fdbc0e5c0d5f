"""What differs between block-diffusion families, one frozen record each.

Everything else in the package is driven by these facts: which token is the mask, how long a block is, whether logits
are shifted, how training noise is drawn and weighted, and how a prompt and a stop are treated.
"""

from __future__ import annotations

from typing import Any

from mage_tune.families.converted import CONVERTED
from mage_tune.families.family import Family, Noise
from mage_tune.families.fast_dllm_v2 import FAST_DLLM_V2
from mage_tune.families.published import PUBLISHED, Published, published_at
from mage_tune.families.sdar import SDAR

__all__ = [
    "FAMILIES",
    "PUBLISHED",
    "Family",
    "Noise",
    "Published",
    "apply_config",
    "get_family",
    "guess_family",
    "published_at",
]

FAMILIES: dict[str, Family] = {f.name: f for f in (FAST_DLLM_V2, SDAR, CONVERTED)}
"""Every supported family by name. LLaDA2 joins with its own model class in a later issue."""


def guess_family(config: dict[str, Any]) -> Family:
    """The family of a checkpoint, from its config.json as a dict.

    A converted checkpoint carries `"mage_tune": {"family": ..., "block_size": ..., "mask_id": ...}`; published
    ones are known by `model_type`. Block size and mask id in the config win over the record's defaults.

    Raises:
        ValueError: nothing in the config tells the family.
    """
    ours = config.get("mage_tune") or {}
    if "family" in ours:
        family = get_family(ours["family"])
    else:
        matches = [f for f in FAMILIES.values() if config.get("model_type") in f.model_types]
        if not matches:
            raise ValueError(
                f"cannot tell the block-diffusion family from model_type {config.get('model_type')!r}: "
                f"name it (family: one of {', '.join(FAMILIES)})"
            )
        family = matches[0]
    return apply_config(family, config)


def apply_config(family: Family, config: dict[str, Any]) -> Family:
    """`family` with the facts that a checkpoint's config.json states, where it does."""
    eos = config.get("eos_token_id")
    published = family.with_overrides(
        block_size=config.get("bd_size") or config.get("block_size"),
        mask_id=config.get("mask_token_id"),
        # The converted family has no ids of its own: they are the base model's.
        stop_ids=None if family.stop_ids else (eos,) if isinstance(eos, int) else tuple(eos or ()),
        pad_id=config.get("pad_token_id") if family.pad_id is None else None,
    )
    ours = config.get("mage_tune") or {}
    stop_ids = ours.get("stop_ids")
    return published.with_overrides(
        block_size=ours.get("block_size"),
        mask_id=ours.get("mask_id"),
        stop_ids=tuple(stop_ids) if stop_ids else None,
        pad_id=ours.get("pad_id"),
    )


def get_family(name: str) -> Family:
    """The record called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}: known are {', '.join(FAMILIES)}")
    return FAMILIES[name]
