"""Linear layers that read one input, with their adapters, as one product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class Frozen:
    """A linear layer whose weight is not trained: its module, and the scale of the adapter beside it."""

    base: Any
    scaling: float
    has_adapter: bool

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in) in the dtype of computation; 4-bit weights are unpacked anew."""
        stored = self.base.weight
        state = getattr(stored, "quant_state", None)
        if state is None:
            return stored.detach().to(dtype)
        from bitsandbytes.functional import dequantize_4bit  # (an extra; whoever has such weights has it)

        return dequantize_4bit(stored.data, state).to(dtype)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(out,) or None."""
        found = getattr(self.base, "bias", None)
        return None if found is None else found.detach().to(dtype)


def opened(module: nn.Module) -> tuple[Frozen, list[Tensor]]:
    """A linear layer, and the A (rank, in) and B (out, rank) of its adapter where one is active."""
    if not isinstance(module, LoraLayer):
        return Frozen(module, 0.0, False), []
    base: Any = module.base_layer
    base = module.get_base_layer() if isinstance(base, BaseTunerLayer) else base
    names, of_a = module.active_adapters, module.lora_A
    if module.disable_adapters or module.merged or not names:
        return Frozen(base, 0.0, False), []
    (name,) = names
    if name not in of_a:
        return Frozen(base, 0.0, False), []
    pair: list[Any] = [of_a[name].weight, module.lora_B[name].weight]
    return Frozen(base, module.scaling[name], True), pair


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def padded(rank: int) -> int:
    """Columns that an adapter's inner vectors take: rows of 16-bit numbers must be multiples of 16 bytes."""
    return -(-rank // 8) * 8


@dataclass(frozen=True)
class Place:
    """An adapter in the product of its layers: A (rank, in), B (out, rank), and where B lies in the matrix."""

    a: Tensor
    b: Tensor
    scaling: float
    rows: slice
    """Of the layer's outputs."""
    inner: slice
    """Of the adapter's inner vector."""


def versions(linears: Sequence[Frozen]) -> list[tuple[int, int]]:
    """What changes when a weight is another tensor, or has been written to."""
    weights = [linear.base.weight for linear in linears]
    return [(id(weight), weight._version) for weight in weights]


@dataclass(frozen=True)
class Kept:
    """Matrices of a product that outlive a pass; `firsts` are rows of `stacked` where there is one."""

    matrix: Tensor
    firsts: Tensor
    stacked: Tensor | None
    bias: Tensor | None


class Product:
    """Linear layers that read one input, side by side: one product makes all of their outputs.

    Its matrix for q, k and v, whose input is [x, A_q x, A_k x, A_v x]:

        [ W_q  s B_q   0      0   ]
        [ W_k   0     s B_k   0   ]
        [ W_v   0      0    s B_v ]

    Args:
        linears: the layers.
        adapters: A and B of those that have an adapter, in order.
        dtype: of computation.
        is_kept: matrices are made once; `refresh` writes adapters into them. Else they are made whenever they are asked
            for.
        is_stacked: the gradient of the input is one product, with [W; A]; see `gradient_of_input`.
    """

    def __init__(
        self,
        linears: Sequence[Frozen],
        adapters: Sequence[Tensor],
        dtype: torch.dtype,
        is_kept: bool = False,
        is_stacked: bool = False,
    ) -> None:
        self.linears, self.adapters, self.dtype, self.is_stacked = linears, adapters, dtype, is_stacked
        self.size = linears[0].base.in_features
        self.outs = [linear.base.out_features for linear in linears]
        self.places: list[Place] = []
        row = at = 0
        pairs = iter(zip(adapters[::2], adapters[1::2], strict=True))
        for linear, out in zip(linears, self.outs, strict=True):
            if linear.has_adapter:
                a, b = next(pairs)
                self.places.append(Place(a, b, linear.scaling, slice(row, row + out), slice(at, at + len(a))))
                at += padded(len(a))
            row += out
        self.out, self.inner = row, at
        self.made_of = versions(linears)
        self._kept: Kept | None = None
        if is_kept:
            stacked = self._frozen_stacked() if is_stacked else None
            firsts = self._empty_firsts() if stacked is None else stacked[self.out :]
            self._kept = Kept(self._frozen_matrix(), firsts, stacked, self._joined_bias())
            self.of_a, self.of_b = self._places_of_a(firsts), self._places_of_b(self._kept.matrix[:, self.size :])

    def firsts(self) -> Tensor:
        """(inner, in): every A; rows up to the padded ranks are zeros."""
        if self._kept is not None:
            return self._kept.firsts
        found = self._empty_firsts()
        write_firsts(self._places_of_a(found), self.places)
        return found

    def seconds(self) -> Tensor:
        """(out, inner): every s B, the last columns of `matrix`."""
        if self._kept is not None:
            return self._kept.matrix[:, self.size :]
        found = self.linears[0].base.weight.new_zeros(self.out, self.inner, dtype=self.dtype)
        write_seconds(self._places_of_b(found), self.places)
        return found

    def matrix(self) -> Tensor:
        """(out, in + inner); see the class."""
        if self._kept is not None:
            return self._kept.matrix
        found = self._frozen_matrix()
        write_seconds(self._places_of_b(found[:, self.size :]), self.places)
        return found

    def stacked(self) -> Tensor:
        """(out + inner, in): every W, then `firsts`."""
        if self._kept is not None and self._kept.stacked is not None:
            return self._kept.stacked
        found = self._frozen_stacked()
        write_firsts(self._places_of_a(found[self.out :]), self.places)
        return found

    def bias(self) -> Tensor | None:
        """(out,) or None."""
        return self._joined_bias() if self._kept is None else self._kept.bias

    @property
    def is_kept(self) -> bool:
        """See the class."""
        return self._kept is not None

    def gradients(self, grad: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor) -> list[Tensor]:
        """Gradients of every A and B, in order, in their own dtype.

        Args:
            grad, inner_grad: (n, out), (n, inner), of outputs and inner vectors.
            x, inner: (n, in), (n, inner), the input and the inner vectors.
        """
        if not self.places:
            return []
        dtype = self.adapters[0].dtype
        of_firsts = multiplied(inner_grad.T, x, dtype)  # (inner, in)
        of_seconds = multiplied(grad.T, inner, dtype)  # (out, inner), where blocks alone are of use
        scaled = torch._foreach_mul(self._places_of_b(of_seconds), [place.scaling for place in self.places])
        pairs = zip(self._places_of_a(of_firsts), scaled, strict=True)
        return [gradient for pair in pairs for gradient in pair]

    def _empty_firsts(self) -> Tensor:
        return self.linears[0].base.weight.new_zeros(self.inner, self.size, dtype=self.dtype)

    def _frozen_matrix(self) -> Tensor:
        found = self.linears[0].base.weight.new_empty(self.out, self.size + self.inner, dtype=self.dtype)
        found[:, self.size :] = 0
        self._write_frozen(found[:, : self.size])
        return found

    def _frozen_stacked(self) -> Tensor:
        found = self.linears[0].base.weight.new_empty(self.out + self.inner, self.size, dtype=self.dtype)
        found[self.out :] = 0
        self._write_frozen(found[: self.out])
        return found

    def _write_frozen(self, out: Tensor) -> None:
        for linear, part in zip(self.linears, out.split(self.outs), strict=True):
            part.copy_(linear.weight(self.dtype))

    def _joined_bias(self) -> Tensor | None:
        found = [linear.bias(self.dtype) for linear in self.linears]
        like = next((bias for bias in found if bias is not None), None)
        if like is None or len(found) == 1:
            return like
        sizes = zip(found, self.outs, strict=True)
        return torch.cat([like.new_zeros(out) if bias is None else bias for bias, out in sizes])

    def _places_of_a(self, firsts: Tensor) -> list[Tensor]:
        return [firsts[place.inner] for place in self.places]

    def _places_of_b(self, seconds: Tensor) -> list[Tensor]:
        return [seconds[place.rows, place.inner] for place in self.places]


def write_firsts(views: list[Tensor], places: Sequence[Place]) -> None:
    """Every A to where it belongs."""
    if views:
        torch._foreach_copy_(views, [place.a for place in places])


def write_seconds(views: list[Tensor], places: Sequence[Place]) -> None:
    """Every s B to where it belongs."""
    if views:
        scaled = torch._foreach_mul([place.b for place in places], [place.scaling for place in places])
        torch._foreach_copy_(views, scaled)


def refresh(products: Iterable[Product]) -> None:
    """Bring what products keep up to date with their adapters, by few calls: small models wait for the host."""
    kept = [product for product in products if product.is_kept]
    places = [place for product in kept for place in product.places]
    write_firsts([view for product in kept for view in product.of_a], places)
    write_seconds([view for product in kept for view in product.of_b], places)


class Linears:
    """Modules that read one input, PEFT's linear layers or plain ones, and their product as it is now.

    Args:
        modules: linear layers.
        keep: hold the product's matrices while adapters are on: as many bytes again as the frozen weights, twice as
            many where `stack` is on, and no work for them in a pass.
        stack: see `is_stacked` of `Product`.
    """

    def __init__(self, modules: Sequence[nn.Module], keep: bool = False, stack: bool = False) -> None:
        self.modules, self.keep, self.stack = modules, keep, stack
        self._last: Product | None = None

    def product(self, dtype: torch.dtype) -> Product:
        """Of these modules with their adapters; what it keeps may lag behind them until `refresh`."""
        found = [opened(module) for module in self.modules]
        linears, adapters = [linear for linear, _ in found], [tensor for _, pair in found for tensor in pair]
        last = self._last
        if last is None or not (
            last.dtype == dtype
            and last.linears == linears
            and last.made_of == versions(linears)
            and len(last.adapters) == len(adapters)
            and all(old is new for old, new in zip(last.adapters, adapters, strict=True))
        ):
            last = Product(linears, adapters, dtype, self.keep and bool(adapters), self.stack)
            if last.is_kept:
                self._last = last
        return last


def multiplied(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of matrices, in `dtype`, which on a GPU the sums of a 16-bit product have anyway."""
    if a.is_cuda and dtype == torch.float32 and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def widened(x: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Room for the input of `project`, for as many rows as x has positions; and its first `in` columns."""
    rows = len(x) if x.dim() == 2 else x.shape[0] * x.shape[1]
    wide = x.new_empty(rows, product.size + product.inner, dtype=product.dtype)
    return wide, wide[:, : product.size]


WIDEST = torch.complex128
"""The dtype of most bytes."""


def copy_rows(out: Tensor, x: Tensor) -> None:
    """`x`, written to `out`, of the same (n, width) and dtype, whose rows may lie apart.

    Between different strides torch copies a number at a time: where rows are whole 16 bytes, they are copied as numbers
    of so many.
    """
    begins = out.stride(0) | x.stride(0) | int(out.storage_offset()) | int(x.storage_offset()) | x.shape[1]
    if begins * x.element_size() % WIDEST.itemsize == 0:  # of the sizes joined bit by bit, and so of each
        out, x = out.view(WIDEST), x.view(WIDEST)
    out.copy_(x)


def project(wide: Tensor, product: Product, skip: bool = False) -> tuple[Tensor, Tensor]:
    """The product, without gradient.

    Args:
        wide: (n, in + inner): the input, and room for the adapters' inner vectors, which are written there.
        skip: make the inner vectors alone; the outputs are empty.

    Returns:
        (n, out), and (n, inner), the input times every A.
    """
    if product.places:
        inner = wide[:, : product.size] @ product.firsts().T
        copy_rows(wide[:, product.size :], inner)
    else:
        inner = wide.new_empty(len(wide), 0)
    return wide.new_empty(0) if skip else F.linear(wide, product.matrix(), product.bias()), inner


def room_for_gradient(like: Tensor, rows: int, product: Product) -> tuple[Tensor, Tensor]:
    """Room for the gradient that `gradient_of_input` reads, and its first `out` columns, where that belongs."""
    wide = like.new_empty(rows, product.out + product.inner * product.is_stacked, dtype=product.dtype)
    return wide, wide[:, : product.out]


def gradient_of_input(wide: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Gradients of what `project` read.

    Two ways to the same: with [W, s B], after which A adds the part of the inner vectors, in a pass over memory; or,
    where the product is stacked, those first, beside the gradient of the outputs, and then one product with [W; A].
    The latter pays for q, k, v and for down (for SmolLM2 on an H100 0.59 and 0.61 of the time, for 7B 0.94 and 0.86),
    not where outputs are many, or as many as inputs.

    Args:
        wide: (n, out), gradient of the outputs; where the product is stacked (n, out + inner), with room beside it.

    Returns:
        (n, in), (n, inner) gradients of the input, by all ways, and of the inner vectors.
    """
    if product.is_stacked:
        inner = wide[:, product.out :]
        if product.places:
            torch.mm(wide[:, : product.out], product.seconds(), out=inner)
        return torch.mm(wide, product.stacked()), inner
    both = torch.mm(wide, product.matrix())
    own, inner = both[:, : product.size], both[:, product.size :]
    return own.addmm_(inner, product.firsts()) if product.places else own, inner
