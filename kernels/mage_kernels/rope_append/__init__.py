"""From a merged projection to attention's inputs: head norms, rotary positions, keys and values into their cache."""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.layout import check_last_stride, check_shape


def rope_append(
    qkv: Tensor,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Rotate queries and keys, write keys and values of B consecutive tokens per row, return packed query rows.

    Args:
        qkv: (batch * B, (query heads + 2 * KV heads) * D), or (parts, batch * B, ...) whose sum it is
            (`few_rows.linear_parts`), contiguous: queries, keys, values.
        cosine, sine: (positions, D / 2) float32.
        positions: (batch,) integer position of each row's first token.
        keys, values: (batch, KV heads, slots, D), any strides with D contiguous; written in place.
        slots: (batch,) integer slot of each row's first token; B slots from there on are written.
        query_norm, key_norm: (D,), RMSNorm of every head before it is rotated; both or neither.
        eps: of these norms.
        rows: where to put the query rows, contiguous; a new tensor by default.
        impl: "auto", "triton" or "reference".

    Returns:
        (batch, KV heads, R, D) with R = group * B rows ordered by query head, then token.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: "triton" was asked for and cannot run.
    """
    batch, kv_heads, _, head_dim = keys.shape
    check_shape("rope_append", "values", values, tuple(keys.shape))
    check_shape("rope_append", "positions", positions, (batch,))
    check_shape("rope_append", "slots", slots, (batch,))
    check_shape("rope_append", "sine", sine, (cosine.shape[0], head_dim // 2))
    check_last_stride("rope_append", "keys", keys)
    check_last_stride("rope_append", "values", values)
    if qkv.dim() == 2:
        qkv = qkv[None]
    if qkv.dim() != 3 or qkv.shape[1] % batch or qkv.shape[2] % head_dim:
        raise ValueError(f"rope_append: qkv of shape {tuple(qkv.shape)} does not fit {batch} rows of heads {head_dim}")
    if (query_norm is None) != (key_norm is None):
        raise ValueError("rope_append: give both head norms or neither")
    group = qkv.shape[2] // head_dim // kv_heads - 2
    shape = (batch, kv_heads, group * (qkv.shape[1] // batch), head_dim)
    if rows is None:
        rows = keys.new_empty(shape)
    check_shape("rope_append", "rows", rows, shape)
    limit = None if qkv.is_contiguous() and rows.is_contiguous() else "qkv or rows is not contiguous"
    if choose("rope_append", impl, qkv, cosine, sine, positions, keys, values, slots, limit=limit):
        from mage_kernels.rope_append import triton as chosen
    else:
        from mage_kernels.rope_append import reference as chosen  # type: ignore[no-redef]
    chosen.rope_append(qkv, cosine, sine, positions, keys, values, slots, query_norm, key_norm, eps, rows)
    return rows
