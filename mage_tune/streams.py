"""Attention of a training row: exact streams, the sparse stream, and what the alignment terms see of each layer.

The row is [sparse? ; mask? ; noisy ... ; clean], every stream `length` tokens long:

- the *mask* stream x_m is the all-[MASK] step of every block at once;
- *noisy* streams x_t are later steps with exact attention;
- the *sparse* stream is x_t again, or some of its blocks; each of them sees only the keys that the mask stream's
  attention chose in the same layer. That is what decoding does, so one forward pass gives exact step, sparse step and
  clean cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mage_tune.blocks import StreamLayout
from mage_tune.selection import choose_keys, gather_keys, packed_rows, prefix_visible, unpacked_rows

MOST_SHAPES = 128
"""Shapes that FlexAttention may be compiled for in one process."""


@dataclass(frozen=True)
class RowStreams:
    """Which streams a row holds, in order; `length` tokens each on a grid of `block_size`.

    With `student_blocks`, the sparse stream holds so many blocks of its row instead of all; which ones is told apart.
    """

    length: int
    block_size: int
    sparse: bool = False
    mask: bool = False
    noisy: int = 1
    student_blocks: int | None = None

    @property
    def exact(self) -> StreamLayout:
        """Layout of the row without its sparse stream."""
        return StreamLayout(self.noisy + self.mask, self.length, self.block_size)

    @property
    def sparse_length(self) -> int:
        """Tokens of the sparse stream; 0 without one."""
        whole = self.length if self.student_blocks is None else self.student_blocks * self.block_size
        return whole * self.sparse

    @property
    def total(self) -> int:
        """Tokens of the whole row."""
        return self.exact.total + self.sparse_length

    def offset(self, name: str, view: int = 0) -> int:
        """First row position of a stream: "sparse", "mask", "noisy" (with its view) or "clean"."""
        if name == "sparse":
            return 0
        before = {"mask": 0, "noisy": self.mask + view, "clean": self.mask + self.noisy}
        return self.sparse_length + before[name] * self.length


@dataclass(frozen=True)
class LayerView:
    """What one layer shows to an alignment term."""

    mask_rows: Tensor
    """(batch, KV heads, blocks, R, D) post-RoPE queries of the mask stream."""
    later_rows: tuple[Tensor, ...]
    """The same of each noisy stream."""
    clean_key: Tensor
    """(batch, KV heads, N, D)."""
    scaling: float


Observer = Callable[[LayerView], Tensor]


@dataclass
class StreamAttention:
    """One forward pass of a row: give its `attend` to the model (see `mage_tune.backbone`).

    `observers` maps a term's name to (first layer it sees, function of a LayerView); results are kept per layer in
    `observed`. Under checkpointing a layer runs twice and is counted once. `student`, (batch, blocks) int64, says which
    blocks the sparse stream holds where it does not hold all; it sees `budget` keys of the prefix, in the layers that
    `layer_budgets` names so many as that says. `first`, (batch, blocks) int64, is the first block of
    every block's document in rows of several documents, which do not see each other.
    """

    streams: RowStreams
    budget: int = 0
    layer_budgets: Mapping[int, int] = field(default_factory=dict)
    student: Tensor | None = None
    first: Tensor | None = None
    dense_layers: int = 0
    observers: Mapping[str, tuple[int, Observer]] = field(default_factory=dict)
    observed: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    needs_gradient: bool = field(default_factory=torch.is_grad_enabled)
    """Whether the pass is meant to train; layers are checked, as re-entrant checkpointing hides gradients."""
    _documents: dict[StreamLayout, Documents] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(batch, heads, total, D) post-RoPE q, k, v -> (batch, query heads, total, D).

        Raises:
            RuntimeError: an alignment term would get no gradient from these queries.
        """
        row = self.streams
        if not row.sparse and not self.observers:
            return exact_attention(query, key, value, row.exact, scaling, self._document_mask(row.exact))
        queries, keys, values = (cut(x, row) for x in (query, key, value))
        if self.observers and row.mask:
            self._observe(layer, queries, keys, scaling)
        if layer < self.dense_layers and self.student is None and row.sparse:
            layout = StreamLayout(row.noisy + row.mask + 1, row.length, row.block_size)
            return exact_attention(query, key, value, layout, scaling, self._document_mask(layout))
        documents = self._document_mask(row.exact)
        exact = exact_attention(queries["exact"], keys["exact"], values["exact"], row.exact, scaling, documents)
        if not row.sparse:
            return exact
        if layer < self.dense_layers:
            assert self.student is not None
            since = None if self.first is None else self.first.gather(1, self.student)
            student = blocks_attention(query, key, value, row, self.student, scaling, since)
        else:
            budget = self.layer_budgets.get(layer, self.budget)
            student = self._sparse(queries, keys, values, scaling, budget)
        return torch.cat([student, exact], dim=2)

    def mean_over_layers(self, name: str) -> Tensor:
        """The observed term averaged over the layers that saw it.

        Raises:
            ValueError: none did.
        """
        if not self.observed[name]:
            raise ValueError(f"{name}: skip_layers leaves out every layer of the model; choose a smaller number")
        return torch.stack(list(self.observed[name].values())).mean()

    def _document_mask(self, layout: StreamLayout) -> Documents | None:
        """What keeps the documents of a row apart, made once for all layers."""
        if self.first is None:
            return None
        if layout not in self._documents:
            self._documents[layout] = Documents(self.first, layout)
        return self._documents[layout]

    def _observe(self, layer: int, queries: Streams, keys: Streams, scaling: float) -> None:
        due = {name: observer for name, (first_layer, observer) in self.observers.items() if layer >= first_layer}
        if not due:
            return
        if self.needs_gradient and not queries["mask"].requires_grad:
            raise RuntimeError(
                f"layer {layer}: queries carry no gradient, so alignment terms would train nothing "
                "(re-entrant checkpointing, or no adapter at or before this layer's q_proj)"
            )
        heads, size = keys["clean"].shape[1], self.streams.block_size
        view = LayerView(
            packed_rows(queries["mask"], heads, size),
            tuple(packed_rows(queries[f"noisy {i}"], heads, size) for i in range(self.streams.noisy)),
            keys["clean"],
            scaling,
        )
        for name, observer in due.items():
            value = observer(view)  # also in the recomputation, which must repeat the same operations
            self.observed[name].setdefault(layer, value)

    def _sparse(self, queries: Streams, keys: Streams, values: Streams, scaling: float, budget: int) -> Tensor:
        row, key, value = self.streams, keys["clean"], values["clean"]
        heads, size = key.shape[1], row.block_size
        with torch.no_grad():
            blocks = torch.arange(row.length // size, device=key.device)
            mask_rows = packed_rows(queries["mask"], heads, size)
            if self.student is not None:
                blocks = self.student
                at = blocks[:, None, :, None, None].expand(-1, heads, -1, *mask_rows.shape[3:])
                mask_rows = mask_rows.gather(2, at)
            since = self.first if self.first is None or self.student is None else self.first.gather(1, self.student)
            index, kept = choose_keys(mask_rows, key, blocks, size, budget, scaling, first=since)
        out = sparse_block_attention(
            packed_rows(queries["sparse"], heads, size),
            gather_keys(key, index),
            gather_keys(value, index),
            kept,
            packed_rows(keys["sparse"], heads, size),
            packed_rows(values["sparse"], heads, size),
            scaling,
        )
        return unpacked_rows(out, queries["sparse"].shape[1], size)


Streams = dict[str, Tensor]
"""(batch, heads, n, D) parts of a row by name: "exact" (all but the sparse one), and every stream alone."""


def cut(x: Tensor, row: RowStreams) -> Streams:
    """The streams of (batch, heads, total, D), noisy ones as "noisy 0" and so on."""
    begins = {"mask": row.offset("mask")} if row.mask else {}
    begins |= {f"noisy {view}": row.offset("noisy", view) for view in range(row.noisy)} | {"clean": row.offset("clean")}
    spans = {"exact": (row.sparse_length, row.total)}
    spans |= {name: (start, start + row.length) for name, start in begins.items()}
    if row.sparse:
        spans["sparse"] = (0, row.sparse_length)
    return dict(zip(spans, Parts.apply(x, *spans.values()), strict=True))


class Parts(torch.autograd.Function):
    """x[:, :, start:end] for some (start, end).

    Their gradients are added up in one buffer. Slices would each fill a buffer of their own, to be added afterwards.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *spans: tuple[int, int]) -> tuple[Tensor, ...]:
        """The parts."""
        ctx.set_materialize_grads(False)
        ctx.spans, ctx.layout = spans, (x.shape, x.stride())
        return tuple(x[:, :, start:end] for start, end in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Their sum; the first part in use, the longest, is copied."""
        total = None
        for (start, end), grad in zip(ctx.spans, grads, strict=True):
            if grad is None:
                continue
            if total is None:
                total = grad.new_empty_strided(*ctx.layout)
                total[:, :, :start] = 0
                total[:, :, start:end] = grad
                total[:, :, end:] = 0
            else:
                total[:, :, start:end] += grad
        return total, *(None for _ in ctx.spans)


def sparse_block_attention(
    rows: Tensor, key: Tensor, value: Tensor, kept: Tensor, own_key: Tensor, own_value: Tensor, scaling: float
) -> Tensor:
    """Attention of packed block rows over their chosen keys and their own block, with gradient.

    Args:
        rows: (batch, KV heads, blocks, R, D).
        key, value: (batch, KV heads, blocks, k, D) chosen from the prefix.
        kept: (batch, KV heads, blocks, k) bool, slots in use.
        own_key, own_value: (batch, KV heads, blocks, B, D).

    Returns:
        (batch, KV heads, blocks, R, D).
    """
    batch, heads, blocks = rows.shape[:3]

    def one_head(x: Tensor) -> Tensor:  # every (row, KV head, block) is an attention problem of its own
        return x.reshape(batch * heads * blocks, 1, *x.shape[3:])

    is_visible = torch.cat([kept, kept.new_ones(own_key.shape[:4])], dim=-1)
    out = F.scaled_dot_product_attention(
        one_head(rows),
        one_head(torch.cat([key, own_key], dim=3)),
        one_head(torch.cat([value, own_value], dim=3)),
        attn_mask=one_head(is_visible).unsqueeze(-2),
        scale=scaling,
    )
    return out.reshape(rows.shape)


def blocks_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowStreams,
    student: Tensor,
    scaling: float,
    first: Tensor | None = None,
) -> Tensor:
    """Exact attention of a sparse stream that holds some blocks: each sees itself and the clean blocks before its own.

    The mask takes sparse length x (sparse length + length) bytes a row; only dense layers come here.

    Args:
        query, key, value: of the whole row.
        student: (batch, blocks) numbers of the blocks.
        first: (batch, blocks) first block of each one's document, where rows hold several.

    Returns:
        (batch, query heads, sparse length, D).
    """
    own, clean, group = row.sparse_length, row.offset("clean"), query.shape[1] // key.shape[1]
    slot = torch.arange(own, device=query.device) // row.block_size
    before = prefix_visible(student, row.length, row.block_size, first)[:, slot]
    visible = torch.cat([(slot[:, None] == slot).expand(len(student), -1, -1), before], dim=-1)

    def seen(x: Tensor) -> Tensor:  # repeated for the group: SDPA's kernels take grouped heads or a mask, not both
        return torch.cat([x[:, :, :own], x[:, :, clean:]], dim=2).repeat_interleave(group, dim=1)

    return F.scaled_dot_product_attention(
        query[:, :, :own], seen(key), seen(value), attn_mask=visible[:, None], scale=scaling
    )


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed rows begin: `first` as in `StreamAttention`."""

    first: Tensor
    layout: StreamLayout

    @cached_property
    def block_mask(self) -> BlockMask:
        """For FlexAttention; documents begin at tiles."""
        return self.layout.packed_block_mask(self.first)

    def together(self) -> Tensor:
        """(batch, 1, length, length) bool: positions of one stream that are of one document."""
        since = self.first.repeat_interleave(self.layout.block_size, dim=1)
        return (since[:, :, None] == since[:, None, :])[:, None]


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: StreamLayout,
    scaling: float,
    documents: Documents | None = None,
) -> Tensor:
    """Attention of a row under its layout, with gradient.

    FlexAttention on a GPU for lengths it can tile (training rows are padded to them), else one masked SDPA per stream,
    whose masks take length x 2 length bytes.
    """
    if query.is_cuda and layout.is_tiled:
        mask = layout.block_mask(query.device) if documents is None else documents.block_mask
        options = flex_options(query)
        return _compiled_flex()(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options
        )
    return _attention_per_stream(query, key, value, layout, scaling, documents)


_SQUARE = {"bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_num_stages": 2, "bwd_num_warps": 4}
FLEX_OPTIONS: dict[int, dict[str, Any]] = {64: {"fwd_BLOCK_N": 64, "fwd_num_stages": 4} | _SQUARE, 128: _SQUARE}
"""Head dimension -> tiles of FlexAttention, where others than PyTorch's were faster on an H100 (docs/training.md)."""


def flex_options(query: Tensor) -> dict[str, Any] | None:
    """FLEX_OPTIONS where they were measured: 16 bits, Hopper. Elsewhere such tiles may not fit, and PyTorch decides."""
    is_hopper = torch.cuda.get_device_capability(query.device)[0] == 9
    return FLEX_OPTIONS.get(query.shape[-1]) if is_hopper and query.element_size() == 2 else None


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled anew for every shape; rows are bucketed so that these are few.

    Past torch's limit it would silently run uncompiled, with all scores in memory. A run has a shape for each bucket
    of lengths, each layout (row, teacher's row, dense layers) and each grad mode: more than torch's eight.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    return torch.compile(flex_attention, dynamic=False)


def _attention_per_stream(
    query: Tensor, key: Tensor, value: Tensor, layout: StreamLayout, scaling: float, documents: Documents | None = None
) -> Tensor:
    length = layout.length
    clean_mask, noisy_mask = layout.clean_mask(query.device), layout.noisy_mask(query.device)
    if documents is not None:
        together = documents.together()
        clean_mask, noisy_mask = clean_mask & together, noisy_mask & torch.cat([together, together], dim=-1)
    clean = slice(layout.num_noisy * length, layout.total)
    outputs = []
    for stream in range(layout.num_noisy + 1):
        own = slice(stream * length, (stream + 1) * length)
        is_clean = stream == layout.num_noisy
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                key[:, :, clean] if is_clean else torch.cat([key[:, :, own], key[:, :, clean]], dim=2),
                value[:, :, clean] if is_clean else torch.cat([value[:, :, own], value[:, :, clean]], dim=2),
                attn_mask=clean_mask if is_clean else noisy_mask,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2)
