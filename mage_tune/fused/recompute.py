"""Layers whose backward pass makes again what they computed, from inputs that may wait in host memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Parked:
    """A tensor in host memory, page-locked where it comes from a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        self.held = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        # Later work of this stream overwrites the original only after the copy, and reads it here after `fetch`.
        self.held.copy_(tensor.detach(), non_blocking=True)

    def fetch(self) -> Tensor:
        """On its device again."""
        return self.held.to(self.device, non_blocking=True)


def offloaded_checkpoint(run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """In place of torch's `checkpoint` in transformers' layers: their input waits in host memory."""
    return recomputed(lambda x, is_again: run(x), hidden, offload=True)


def recomputed(run: Callable[[Tensor, bool], Tensor], hidden: Tensor, offload: bool) -> Tensor:
    """`run(hidden, is_again)` without what autograd would keep; made again, with is_again, in the backward pass.

    With `offload` nothing on the device refers to `hidden` after the pass: the recomputation reads it from the host.
    """
    held = _Held(hidden, offload)
    return checkpoint(lambda: run(*held.take()), use_reentrant=False)


class _Held:
    """The input of a layer: first the tensor itself, so that its graph goes on, then its values alone."""

    def __init__(self, hidden: Tensor, offload: bool) -> None:
        self.first: Tensor | None = hidden
        self.needs_gradient = hidden.requires_grad
        self.later: Parked | Tensor = Parked(hidden) if offload else hidden.detach()

    def take(self) -> tuple[Tensor, bool]:
        """(input, whether it is a recomputation)."""
        if self.first is not None:
            hidden, self.first = self.first, None
            return hidden, False
        values = self.later.fetch() if isinstance(self.later, Parked) else self.later
        return values.detach().requires_grad_(self.needs_gradient), True
