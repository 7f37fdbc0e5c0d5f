"""Copy the chosen keys and values of every layer into small contiguous buffers, once per block.

After it, every sparse step is dense attention of one fixed shape (`small_attention`), whatever the context.
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.compact import reference
from mage_kernels.layout import check_counts, check_last_stride, check_shape, with_layers


def compact(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    count: Tensor,
    out_key: Tensor,
    out_value: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Write rows `index` of the cache to the front of the buffers; every other slot of them stays as it is.

    Args:
        key, value: ([layers,] batch, KV heads, capacity, D); the last dimension contiguous.
        index: ([layers,] batch, KV heads, k) int32 positions, as from `top_k`; duplicates are copied twice.
        count: ([layers,] batch, KV heads) int32: how many of them are meant, the first ones.
        out_key, out_value: ([layers,] batch, KV heads, n, D), n >= k, written in place at slots 0 to count - 1. Slots
            from n - B on are for the block's own keys and values, those from count to k - 1 are never read.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "compact"
    if key.dim() not in (4, 5):
        raise ValueError(f"{op}: key has shape {tuple(key.shape)}, expected ([layers,] batch, KV heads, capacity, D)")
    check_shape(op, "value", value, tuple(key.shape))
    check_shape(op, "out_key", out_key, (*key.shape[:-2], out_key.shape[-2], key.shape[-1]))
    check_shape(op, "out_value", out_value, tuple(out_key.shape))
    check_counts(op, "index", index, (*key.shape[:-2], index.shape[-1]))
    check_counts(op, "count", count, tuple(key.shape[:-2]))
    if index.shape[-1] > out_key.shape[-2]:
        raise ValueError(f"{op}: {index.shape[-1]} keys do not fit in buffers of {out_key.shape[-2]} slots")
    tensors = {"key": key, "value": value, "out_key": out_key, "out_value": out_value}
    for name, tensor in tensors.items():
        check_last_stride(op, name, tensor)
        if tensor.dtype != key.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, key is {key.dtype}")
    if not choose(op, impl, *tensors.values(), index, count):
        reference.compact(key, value, index, count, out_key, out_value)
        return
    from mage_kernels.compact import triton

    caches = [with_layers(x, 4) for x in (key, value)]
    buffers = [with_layers(x, 4) for x in (out_key, out_value)]
    triton.compact(*caches, with_layers(index, 3), with_layers(count, 2), *buffers)
