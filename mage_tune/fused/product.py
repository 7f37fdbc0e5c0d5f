"""Linear layers that read one input, with their adapters, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
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
    if module.disable_adapters or module.merged or not module.active_adapters:
        return Frozen(module.get_base_layer(), 0.0, False), []
    (name,) = module.active_adapters
    if name not in module.lora_A:
        return Frozen(module.get_base_layer(), 0.0, False), []
    pair: list[Any] = [module.lora_A[name].weight, module.lora_B[name].weight]
    return Frozen(module.get_base_layer(), module.scaling[name], True), pair


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
    return [(id(linear.base.weight), linear.base.weight._version) for linear in linears]


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
        is_kept: the matrix is made once; `refresh` writes adapters into it. Else it is made whenever it is asked for.
    """

    def __init__(self, linears: Sequence[Frozen], adapters: Sequence[Tensor], dtype: torch.dtype, is_kept: bool):
        self.linears, self.adapters, self.dtype = linears, adapters, dtype
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
        self.inner = at
        self.made_of = versions(linears)
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None
        if is_kept:
            self._kept = self._empty_firsts(), self._frozen_matrix(), self._joined_bias()
            firsts, matrix, _ = self._kept
            self._of_a, self._of_b = self._views(firsts, matrix)

    def refresh(self) -> None:
        """Bring what is kept up to date with the adapters."""
        if self._kept is not None and self.places:
            self._write_firsts(self._of_a)
            self._write_seconds(self._of_b)

    def firsts(self) -> Tensor:
        """(inner, in): every A; rows up to the padded ranks are zeros."""
        if self._kept is not None:
            return self._kept[0]
        found = self._empty_firsts()
        self._write_firsts([found[place.inner] for place in self.places])
        return found

    def matrix(self) -> Tensor:
        """(out, in + inner); see the class."""
        if self._kept is not None:
            return self._kept[1]
        found = self._frozen_matrix()
        self._write_seconds(self._views(found, found)[1])
        return found

    def bias(self) -> Tensor | None:
        """(out,) or None."""
        return self._joined_bias() if self._kept is None else self._kept[2]

    def gradients(self, grad: Tensor, inner_grad: Tensor, x: Tensor, inner: Tensor) -> list[Tensor]:
        """Gradients of every A and B, in order, in their own dtype.

        Args:
            grad, inner_grad: (n, out), (n, inner), of outputs and inner vectors.
            x, inner: (n, in), (n, inner), the input and the inner vectors.
        """
        if not self.places:
            return []
        of_firsts = (inner_grad.T @ x).to(self.adapters[0].dtype)  # (inner, in)
        of_seconds = (grad.T @ inner).to(self.adapters[0].dtype)  # (out, inner), where blocks alone are of use
        found: list[Tensor] = []
        for place in self.places:
            found += [of_firsts[place.inner], of_seconds[place.rows, place.inner] * place.scaling]
        return found

    def _empty_firsts(self) -> Tensor:
        return self.linears[0].base.weight.new_zeros(self.inner, self.size, dtype=self.dtype)

    def _frozen_matrix(self) -> Tensor:
        found = self.linears[0].base.weight.new_empty(sum(self.outs), self.size + self.inner, dtype=self.dtype)
        found[:, self.size :] = 0
        for linear, part in zip(self.linears, found[:, : self.size].split(self.outs), strict=True):
            part.copy_(linear.weight(self.dtype))
        return found

    def _joined_bias(self) -> Tensor | None:
        found = [linear.bias(self.dtype) for linear in self.linears]
        like = next((bias for bias in found if bias is not None), None)
        if like is None or len(found) == 1:
            return like
        sizes = zip(found, self.outs, strict=True)
        return torch.cat([like.new_zeros(out) if bias is None else bias for bias, out in sizes])

    def _views(self, firsts: Tensor, matrix: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where every A lies in the one, and every B in the other."""
        seconds = matrix[:, self.size :]
        return [firsts[p.inner] for p in self.places], [seconds[p.rows, p.inner] for p in self.places]

    def _write_firsts(self, views: list[Tensor]) -> None:
        if views:
            torch._foreach_copy_(views, [place.a for place in self.places])

    def _write_seconds(self, views: list[Tensor]) -> None:
        for view, place in zip(views, self.places, strict=True):
            torch.mul(place.b, place.scaling, out=view)


class Linears:
    """Modules that read one input, PEFT's linear layers or plain ones, and their product as it is now.

    Args:
        modules: linear layers.
        keep: hold the product's matrix while adapters are on: as many bytes again as the frozen weights, and no work
            for them in a pass.
    """

    def __init__(self, modules: Sequence[nn.Module], keep: bool = False) -> None:
        self.modules, self.keep = modules, keep
        self._last: Product | None = None

    @torch.no_grad()
    def product(self, dtype: torch.dtype) -> Product:
        """With the values that the adapters have now."""
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
            last = Product(linears, adapters, dtype, self.keep and bool(adapters))
            if self.keep and adapters:
                self._last = last
        last.refresh()
        return last


def widened(x: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Room for the input of `project`, for as many rows as x has positions; and its first `in` columns."""
    rows = len(x) if x.dim() == 2 else x.shape[0] * x.shape[1]
    wide = x.new_empty(rows, product.size + product.inner, dtype=product.dtype)
    return wide, wide[:, : product.size]


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
        wide[:, product.size :] = inner
    else:
        inner = wide.new_empty(len(wide), 0)
    return wide.new_empty(0) if skip else F.linear(wide, product.matrix(), product.bias()), inner


def project_backward(grad: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """(n, in), (n, inner) gradients of the input of `project`, by all ways, and of the inner vectors."""
    wide = torch.mm(grad, product.matrix())
    own, inner = wide[:, : product.size], wide[:, product.size :]
    return own.addmm_(inner, product.firsts()) if product.places else own, inner
