"""When the prefix pass runs as the warp-specialised kernel of `hopper_kernel.py`, and with which tiles."""

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


def choose_tiles(batch_heads: int, num_rows: int, tile: int) -> tuple[int, int, int]:
    """(rows of a program, keys of a tile, stages), of those that were fastest on an H100 (docs/performance.md).

    Three computing warp groups leave registers for tiles of 64 keys alone, of which two may share a mass. They pay
    where they waste fewer rows, and where there are KV heads enough that the prefix need not be cut into many more
    parts to fill the GPU.
    """
    wasted = {rows: -num_rows % rows for rows in (128, 192)}
    if batch_heads >= 8 and wasted[192] < wasted[128]:
        return 192, 64, 3
    return (128, 64, 3) if tile == 64 else (128, 128, 2)


@cache
def _why_no_gluon() -> str | None:
    """Gluon is experimental: its names move between versions of Triton."""
    try:
        import mage_kernels.exact_attention.hopper_kernel  # noqa: F401
    except ImportError as error:
        logger.info("exact_attention: the portable kernel on a Hopper GPU, because %s", error)
        return str(error)
    return None
