"""When the prefix pass runs as the warp-specialised kernel of `hopper_kernel.py`, and how it is launched."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger("mage_kernels")


def why_not(query: Tensor, key: Tensor, value: Tensor, tile: int) -> str | None:
    """Why that kernel cannot take these tensors, or None; where it cannot, the portable one runs."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] != 9:
        return "not a Hopper GPU"
    if query.shape[-1] not in (64, 128):
        return "head_dim is neither 64 nor 128"
    if query.shape[-2] <= 64:
        return "so few rows are bound by memory, and half of a program would idle"
    if tile not in (0, 64, 128):
        return "tile is neither 64 nor 128"
    if not (key.is_contiguous() and value.is_contiguous()) or (key.data_ptr() | value.data_ptr()) % 16:
        return "keys and values are not contiguous"
    return _why_no_gluon()


def rows_per_program(num_rows: int) -> int:
    """128, or 192 where that wastes fewer rows."""
    return min((128, 192), key=lambda rows: -(-num_rows // rows) * rows)


def split_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    part_out: Tensor,
    part_mass: Tensor,
    tile_mass: Tensor,
    qk_scale: float,
    block_m: int,
    block_n: int,
    num_splits: int,
    num_stages: int,
    with_tile_mass: bool,
) -> None:
    """Launch it: writes `part_out`, `part_mass` and `tile_mass` as `split_kernel` of triton.py does."""
    from mage_kernels.exact_attention.hopper_kernel import launch

    launch(
        query,
        key,
        value,
        lengths,
        part_out,
        part_mass,
        tile_mass,
        qk_scale,
        groups=block_m // 64,
        block_n=block_n,
        num_splits=num_splits,
        stages=num_stages,
        with_tile_mass=with_tile_mass,
    )


@cache
def _why_no_gluon() -> str | None:
    """Gluon is experimental: its names move between versions of Triton."""
    try:
        import mage_kernels.exact_attention.hopper_kernel  # noqa: F401
    except ImportError as error:
        logger.info("exact_attention: the portable kernel on a Hopper GPU, because %s", error)
        return str(error)
    return None
