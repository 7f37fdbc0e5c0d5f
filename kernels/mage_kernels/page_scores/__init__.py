"""Quest's bounds (arXiv 2406.10774): per page of keys the channel-wise min and max, and the largest logit they allow.

A row q can see no logit in a page above sum_d max(q_d * max_d, q_d * min_d); a page scores the mean of that over the
packed rows. The same number can be had in three ways, which differ in speed alone:

    rows     as published: element by element for every row
    matrix   q+ . max + q- . min with q+ = max(q, 0), q- = min(q, 0): two matrix products, then the mean
    mean     the mean of q+ and of q- first, then one product each: the products are linear (not in the original)
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.layout import check_counts, check_rows, check_shape, with_layers
from mage_kernels.page_scores import reference

FORMS = ("mean", "matrix", "rows")


def update_pages(
    low: Tensor, high: Tensor, key: Tensor, lengths: Tensor, *, page: int, added: int, impl: str = "auto"
) -> None:
    """Recompute the bounds of the pages that the last `added` keys of each row fall into, in place.

    Args:
        low, high: ([layers,] batch, KV heads, ceil(capacity / page), D) min and max over the valid keys of a page, in
            the keys' dtype, contiguous; pages without valid keys are never touched.
        key: ([layers,] batch, KV heads, capacity, D).
        lengths: (batch,) int32 valid keys, the added ones included, on the device.
        page: keys per page, a power of two from 1 to 128.
        added: at most this many keys at the end are new; the capacity builds everything.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit.
        RuntimeError: `impl="triton"` cannot run here.
    """
    op = "update_pages"
    pages = -(-key.shape[-2] // page)
    for name, bound in (("low", low), ("high", high)):
        check_shape(op, name, bound, (*key.shape[:-2], pages, key.shape[-1]))
        if bound.dtype != key.dtype or not bound.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous {key.dtype}, got {bound.dtype} {bound.stride()}")
    check_counts(op, "lengths", lengths, (key.shape[-4],))
    _check_page(op, page)
    if added < 0:
        raise ValueError(f"{op}: added {added} is negative")
    if not choose(op, impl, low, high, key, lengths):
        reference.update_pages(low, high, key, lengths, page, added)
        return
    from mage_kernels.page_scores import triton

    triton.update_pages(with_layers(low, 4), with_layers(high, 4), with_layers(key, 4), lengths, page, added)


def page_scores(
    query: Tensor, low: Tensor, high: Tensor, lengths: Tensor, *, page: int, form: str = "mean", impl: str = "auto"
) -> Tensor:
    """Quest's score of every page, mean over the packed rows.

    Args:
        query: (batch, KV heads, R, D) packed rows.
        low, high: (batch, KV heads, pages, D), see `update_pages`.
        lengths: (batch,) int32 valid keys, on the device.
        page: keys per page.
        form: "mean", "matrix" or "rows": how it is computed, see the module.

    Returns:
        (batch, KV heads, pages) float32, unscaled; -inf for pages without valid keys.
    """
    op = "page_scores"
    check_rows(op, query, low, high)
    check_counts(op, "lengths", lengths, (query.shape[-4],))
    _check_page(op, page)
    if form not in FORMS:
        raise ValueError(f"{op}: form {form!r} is none of {', '.join(FORMS)}")
    limit = tensor_core_limit(query, low, high) if form == "matrix" else None
    if not choose(op, impl, query, low, high, lengths, limit=limit):
        return reference.page_scores(query, low, high, lengths, page, form)
    from mage_kernels.page_scores import triton

    return triton.page_scores(query, low, high, lengths, page, form)


def _check_page(op: str, page: int) -> None:
    if not 1 <= page <= 128 or page & (page - 1):
        raise ValueError(f"{op}: page {page} is not a power of two from 1 to 128")
