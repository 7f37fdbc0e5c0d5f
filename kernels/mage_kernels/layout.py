"""Checks of the layout that operations share (see the package's docstring); their errors name the tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` has that shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_rows(op: str, query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Raises ValueError unless query is ([layers,] batch, KV heads, R, D) and key, value have the same but n for R."""
    if query.dim() not in (4, 5):
        raise ValueError(f"{op}: query has shape {tuple(query.shape)}, expected ([layers,] batch, KV heads, R, D)")
    check_shape(op, "key", key, (*query.shape[:-2], *key.shape[-2:-1], query.shape[-1]))
    if value is not None:
        check_shape(op, "value", value, tuple(key.shape))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_last_stride(op, name, tensor)


def check_last_stride(op: str, name: str, tensor: Tensor | None) -> None:
    """Raises ValueError unless the last dimension is contiguous; kernels read whole rows."""
    if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} is not contiguous (strides {tensor.stride()})")


def check_counts(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` is int32 of that shape and contiguous."""
    check_shape(op, name, tensor, shape)
    if tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous int32, got {tensor.dtype} with strides {tensor.stride()}")


def check_log_mass(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` is contiguous float32 of that shape."""
    check_shape(op, name, tensor, shape)
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous float32, got {tensor.dtype}, strides {tensor.stride()}")


def check_block(op: str, query: Tensor, block: int | None) -> None:
    """Raises ValueError unless the packed rows are those of whole blocks."""
    if block is not None and (block < 1 or query.shape[-2] % block):
        raise ValueError(f"{op}: {query.shape[-2]} packed rows are not those of a block of {block} positions")


def by_token(rows: Tensor, block: int) -> Tensor:
    """(batch, KV heads, R, D) packed rows -> (batch * block, query heads * D), what an output projection reads."""
    return rows.unflatten(2, (-1, block)).permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)


def output_shape(query: Tensor, block: int) -> tuple[int, ...]:
    """Of attention's output: by packed row, or by token for a block of so many positions (0 for packed)."""
    batch, heads, num_rows, head_dim = query.shape
    return (batch * block, heads * num_rows // block * head_dim) if block else (batch, heads, num_rows, head_dim)


def with_layers(tensor: Tensor, dims: int) -> Tensor:
    """A view of `tensor` with a dimension of layers in front of its last `dims` ones, which may be there already."""
    return tensor.unsqueeze(0) if tensor.dim() == dims else tensor
