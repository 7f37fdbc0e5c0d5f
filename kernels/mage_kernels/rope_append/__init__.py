"""From a merged projection to attention's inputs: head norms, rotary positions, keys and values into their cache."""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose
from mage_kernels.few_rows import MOST_TILES, is_triton
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
    if qkv.dim() == 2:
        qkv = qkv[None]
    if (query_norm is None) != (key_norm is None):
        raise ValueError("rope_append: give both head norms or neither")
    if qkv.dim() != 3:
        raise ValueError(f"rope_append: qkv of shape {tuple(qkv.shape)}, expected (parts, batch * B, heads * D)")
    rows = _check("rope_append", (qkv.shape[1], qkv.shape[2]), cosine, sine, positions, keys, values, slots, rows)
    limit = None if qkv.is_contiguous() and rows.is_contiguous() else "qkv or rows is not contiguous"
    if choose("rope_append", impl, qkv, cosine, sine, positions, keys, values, slots, limit=limit):
        from mage_kernels.rope_append import triton as chosen
    else:
        from mage_kernels.rope_append import reference as chosen  # type: ignore[no-redef]
    chosen.rope_append(qkv, cosine, sine, positions, keys, values, slots, query_norm, key_norm, eps, rows)
    return rows


def project_append(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    arrivals: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`rope_append` of x @ weight.T + bias, without head norms, in one launch that reads the weights once.

    Args:
        x, squares, eps: see `few_rows.linear`; at most 32 rows for Triton.
        weight: ((query heads + 2 * KV heads) * D, inputs), contiguous; D a multiple of 32 for Triton.
        bias: (outputs,).
        cosine, sine, positions, keys, values, slots, rows, impl: see `rope_append`.
        arrivals: see `few_rows.new_arrivals`.

    Returns:
        (batch, KV heads, R, D), as from `rope_append`.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: "triton" was asked for and cannot run.
    """
    op = "project_append"
    check_shape(op, "arrivals", arrivals, (MOST_TILES,))
    rows = _check(op, (x.shape[0], weight.shape[0]), cosine, sine, positions, keys, values, slots, rows)
    limit = f"a head of {keys.shape[-1]} is no multiple of 32" if keys.shape[-1] % 32 else None
    others = [tensor for tensor in (bias, cosine, sine, positions, slots, rows) if tensor is not None]
    if is_triton(op, impl, x, weight, squares, *others, limit=limit):
        from mage_kernels.rope_append import triton as chosen
    else:
        from mage_kernels.rope_append import reference as chosen  # type: ignore[no-redef]
    chosen.project_append(x, weight, bias, squares, eps, cosine, sine, positions, keys, values, slots, rows, arrivals)
    return rows


def _check(
    op: str,
    projected: tuple[int, int],
    cosine: Tensor,
    sine: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Where the query rows of a projection of that shape go.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, kv_heads, _, head_dim = keys.shape
    check_shape(op, "values", values, tuple(keys.shape))
    check_shape(op, "positions", positions, (batch,))
    check_shape(op, "slots", slots, (batch,))
    check_shape(op, "sine", sine, (cosine.shape[0], head_dim // 2))
    check_last_stride(op, "keys", keys)
    check_last_stride(op, "values", values)
    if projected[0] % batch or projected[1] % head_dim:
        raise ValueError(f"{op}: a projection of shape {projected} does not fit {batch} rows of heads {head_dim}")
    group = projected[1] // head_dim // kv_heads - 2
    shape = (batch, kv_heads, group * (projected[0] // batch), head_dim)
    if rows is None:
        rows = keys.new_empty(shape)
    check_shape(op, "rows", rows, shape)
    return rows
