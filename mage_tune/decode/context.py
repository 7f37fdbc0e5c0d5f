"""Longer contexts, on request only: rope scaling of a loaded model whose `max_position_embeddings` is too small."""

from __future__ import annotations

from typing import Literal

from torch import nn

from mage_tune.backbone import causal_lm


def extend_context(model: nn.Module, factor: float, kind: Literal["yarn", "linear"] = "yarn") -> int:
    """Stretch the rotary positions of a model by `factor`, in place, before anything is cached with it.

    Kinds that rescale with the length reached ("dynamic") are left out: keys already in a cache would be wrong.

    Args:
        model: bare or with adapters.
        factor: above 1.
        kind: "yarn" (arXiv 2309.00071) or "linear" interpolation.

    Returns:
        The new context, in tokens.

    Raises:
        ValueError: a factor or kind that cannot be, or a model that is scaled already.
    """
    lm = causal_lm(model)
    config = lm.config
    if factor <= 1.0:
        raise ValueError(f"factor {factor} does not extend the context")
    if kind not in ("yarn", "linear"):
        raise ValueError(f"unknown rope scaling {kind!r} (known: yarn, linear)")
    given = dict(config.rope_parameters)
    if given.get("rope_type", "default") != "default":
        raise ValueError(f"the model's rotary positions are scaled already ({given['rope_type']})")
    original = config.max_position_embeddings
    config.rope_parameters = given | {
        "rope_type": kind,
        "factor": float(factor),
        "original_max_position_embeddings": original,
    }
    config.max_position_embeddings = int(original * factor)
    rotary = lm.model.rotary_emb
    lm.model.rotary_emb = type(rotary)(config).to(rotary.inv_freq.device)
    return config.max_position_embeddings
