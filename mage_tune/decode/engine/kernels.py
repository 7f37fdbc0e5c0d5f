"""Exact attention of a block over the whole cache, by whom: our kernel, PyTorch's, or FlashInfer's.

All see the same thing: packed query rows (batch, KV heads, R, D), the cache of one layer, whose last B valid keys are
the block's own, and how many keys each row of the batch has. They differ in what they need to know beforehand: ours
reads the lengths on the device, so that one CUDA graph is right for every context; the others are planned or sliced on
the host, so that a graph of them is right for the lengths it was captured with.
"""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mage_kernels.exact_attention import exact_attention
from mage_kernels.layout import by_token
from mage_tune.decode.engine.cache import Cache
from mage_tune.decode.engine.weights import Shape


class ExactKernel(Protocol):
    """Exact attention over the cache."""

    name: ClassVar[str]

    def plan(self, seen: list[int]) -> Hashable:
        """Prepare for rows with `seen` keys each; returns what a captured graph depends on (None: on nothing)."""

    def attend(self, layer: int, rows: Tensor, seen: Tensor) -> Tensor:
        """(batch, KV heads, R, D) and seen (batch,) int32 -> (batch * B, query heads * D)."""


class Ours:
    """`mage_kernels.exact_attention`: packed rows, split over the prefix, lengths on the device."""

    name: ClassVar[str] = "ours"

    def __init__(self, cache: Cache, shape: Shape, block_size: int, impl: str) -> None:
        self.cache, self.impl, self.block_size = cache, impl, block_size
        self.scale = shape.head_dim**-0.5

    def plan(self, seen: list[int]) -> Hashable:
        """Nothing to prepare, and a graph is right for every length."""
        return None

    def attend(self, layer: int, rows: Tensor, seen: Tensor) -> Tensor:
        """See `ExactKernel`."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return exact_attention(rows, keys, values, seen, self.scale, block=self.block_size, impl=self.impl).out


class Sdpa:
    """PyTorch's scaled_dot_product_attention on packed rows; on a GPU its flash kernel, which needs equal lengths."""

    name: ClassVar[str] = "sdpa"

    def __init__(self, cache: Cache, shape: Shape, block_size: int, impl: str) -> None:
        self.cache, self.block_size = cache, block_size
        self.scale = shape.head_dim**-0.5
        self.longest = 0
        self.mask: Tensor | None = None

    def plan(self, seen: list[int]) -> Hashable:
        """Fix the lengths; rows of different ones get a mask, which the flash kernel refuses."""
        device = self.cache.keys.device
        self.longest = max(seen)
        self.mask = None
        if len(set(seen)) > 1:
            if device.type == "cuda":
                raise ValueError("exact kernel 'sdpa': PyTorch's flash attention needs rows of equal length on a GPU")
            self.mask = (torch.arange(self.longest) < torch.tensor(seen)[:, None])[:, None, None]
        return tuple(seen)

    def attend(self, layer: int, rows: Tensor, seen: Tensor) -> Tensor:
        """See `ExactKernel`."""
        keys = self.cache.keys[layer, :, :, : self.longest]
        values = self.cache.values[layer, :, :, : self.longest]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if rows.is_cuda else SDPBackend.MATH):
            out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=self.mask, scale=self.scale)
        return by_token(out, self.block_size)


class FlashInfer:
    """FlashInfer's batched prefill over our cache, seen as pages of one block each.

    `fa2` packs the query heads of a KV head into one tile and splits long prefixes at page borders (a row that is one
    page is not split: 171 ms per forward instead of about 11, 7B at 128K); `auto` is what a user gets, which on Hopper
    is `fa3`, without either (kernels.md section 0).
    """

    name: ClassVar[str] = "flashinfer"
    backend: ClassVar[str]

    def __init__(self, cache: Cache, shape: Shape, block_size: int, impl: str) -> None:
        if not cache.keys.is_cuda:
            raise ValueError(f"exact kernel {self.name!r} needs a GPU")
        if find_spec("flashinfer") is None:
            raise ValueError(f"exact kernel {self.name!r}: flashinfer is not installed")
        flashinfer: Any = import_module("flashinfer")  # a peer to be compared with, no requirement of ours

        self.cache, self.shape, self.block_size = cache, shape, block_size
        device, batch = cache.keys.device, cache.batch
        most_pages = batch * -(-cache.capacity // block_size)
        counts = [torch.empty(n, dtype=torch.int32, device=device) for n in (batch + 1, batch + 1, most_pages, batch)]
        query_start, page_start, pages, last_page = counts
        self.wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(512 * 2**20, dtype=torch.uint8, device=device),
            kv_layout="HND",
            use_cuda_graph=True,
            qo_indptr_buf=query_start,
            paged_kv_indptr_buf=page_start,
            paged_kv_indices_buf=pages,
            paged_kv_last_page_len_buf=last_page,
            backend=self.backend,
        )

    def plan(self, seen: list[int]) -> Hashable:
        """FlashInfer's own plan, on the host."""
        shape, size, dtype = self.shape, self.block_size, self.cache.keys.dtype
        counts = [-(-n // size) for n in seen]
        pages = [page_numbers(self.cache.keys[0], size, row, count) for row, count in enumerate(counts)]
        self.wrapper.plan(
            torch.arange(len(seen) + 1, dtype=torch.int32) * size,
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            torch.cat(pages),
            torch.tensor([(n - 1) % size + 1 for n in seen], dtype=torch.int32),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            size,
            causal=False,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return tuple(seen)

    def attend(self, layer: int, rows: Tensor, seen: Tensor) -> Tensor:
        """See `ExactKernel`; FlashInfer wants its queries token by token."""
        size = self.block_size
        tokens = by_token(rows, size).unflatten(-1, (-1, rows.shape[-1]))
        out = self.wrapper.run(
            tokens, (pages_of(self.cache.keys[layer], size), pages_of(self.cache.values[layer], size))
        )
        return out.flatten(1)


def pages_of(cache: Tensor, page: int) -> Tensor:
    """(batch, KV heads, capacity, D) -> (pages, KV heads, page, D), a view; `page_numbers` says which are a row's.

    Page p begins p * page keys after the first key of the cache and takes the same stretch of every head, so pages that
    begin in other heads than a row's first one mean nothing.
    """
    batch, heads, capacity, head_dim = cache.shape
    assert capacity % page == 0 and cache.is_contiguous()
    count = ((batch - 1) * heads + 1) * capacity // page
    return cache.as_strided((count, heads, page, head_dim), (page * head_dim, capacity * head_dim, head_dim, 1))


def page_numbers(cache: Tensor, page: int, row: int, count: int) -> Tensor:
    """(count,) int32: the first pages of a row, in `pages_of`."""
    heads, capacity = cache.shape[1:3]
    return torch.arange(count, dtype=torch.int32) + row * heads * capacity // page


class FlashInferFa2(FlashInfer):
    """FlashInfer's packed, split kernel."""

    name: ClassVar[str] = "flashinfer-fa2"
    backend: ClassVar[str] = "fa2"


class FlashInferAuto(FlashInfer):
    """FlashInfer's default."""

    name: ClassVar[str] = "flashinfer-auto"
    backend: ClassVar[str] = "auto"


EXACT_KERNELS: dict[str, type[Ours] | type[Sdpa] | type[FlashInfer]] = {
    kernel.name: kernel for kernel in (Ours, Sdpa, FlashInferFa2, FlashInferAuto)
}


def make_kernel(name: str, cache: Cache, shape: Shape, block_size: int, impl: str) -> ExactKernel:
    """An exact kernel by name.

    Raises:
        ValueError: there is none, or it cannot run here.
    """
    if name not in EXACT_KERNELS:
        raise ValueError(f"unknown exact kernel {name!r} (known: {', '.join(EXACT_KERNELS)})")
    return EXACT_KERNELS[name](cache, shape, block_size, impl)
