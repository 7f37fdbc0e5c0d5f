"""Gathering attention: the kernel of `small_attention`, its front keys read through a list."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from mage_kernels.small_attention.triton import launch, make_plan, outputs


@torch.library.custom_op("mage_kernels::gather_attention", mutates_args=())
def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    own_key: Tensor,
    own_value: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """See `mage_kernels.gather_attention.gather_attention`."""
    batch, heads, num_rows, head_dim = query.shape
    plan = make_plan(batch * heads, num_rows, head_dim)
    return launch(plan, query, key, value, own_key, own_value, index, count, scale, block)


@gather_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    scale: float,
    own_key: Tensor,
    own_value: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    return outputs(query, block)
