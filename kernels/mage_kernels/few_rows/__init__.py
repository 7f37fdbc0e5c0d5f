"""Products of a few rows with a weight matrix: a denoising step of one block reads every weight for 32 rows.

Nothing but the reading of the weights costs time there, and cuBLAS reads them at 65 to 88 % of the copy rate for the
published shapes. These kernels stream them once, split the inner dimension over programs where a matrix has too few
rows of tiles to fill the GPU, and do what would be a launch of its own before and after: `add_linear` adds its product
to the residual stream and leaves the RMSNorm that follows half done, and the products after it do the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.few_rows import reference
from mage_kernels.layout import check_shape

MOST_ROWS = 32
"""Beyond, arithmetic begins to count and cuBLAS is at home."""
MOST_TILES = 1024
"""Tiles whose parts can be waited for."""


def new_arrivals(device: torch.device) -> Tensor:
    """Counters for the parts of tiles, (1024,) int32 zeros, which every launch leaves as zeros.

    Launches on one stream may share them. Make them before a graph is captured.
    """
    return torch.zeros(MOST_TILES, dtype=torch.int32, device=device)


def linear(x: Tensor, weight: Tensor, *, squares: Tensor | None = None, eps: float = 0.0, impl: str = "auto") -> Tensor:
    """x @ weight.T.

    Args:
        x: (n, inputs), contiguous; at most 32 rows and inputs a multiple of 64 for Triton.
        weight: (outputs, inputs), contiguous, same dtype: bf16 or fp16 for Triton.
        squares: (tiles, n) float32, contiguous, from `add_linear`: each row is then divided by the root of its summed
            squares over `inputs`.
        eps: added to that mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        (n, outputs) of the inputs' dtype; products are summed in float32.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if not is_triton("linear", impl, x, weight, squares):
        return reference.linear(x, weight, None, squares, eps)
    from mage_kernels.few_rows import triton

    return triton.linear(x, weight, None, squares, eps, can_split=False)[0]


def linear_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """x @ weight.T + bias as parts of its sum, for `add_norm` and `rope_append` to add up.

    Args:
        x, weight, squares, eps, impl: as for `linear`.
        bias: (outputs,); it is in the first part.

    Returns:
        (parts, n, outputs), float32 and as many parts as suit the shape from Triton; one part of the inputs' dtype from
        the reference.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if not is_triton("linear_parts", impl, x, weight, squares):
        return reference.linear(x, weight, bias, squares, eps)[None]
    from mage_kernels.few_rows import triton

    return triton.linear(x, weight, bias, squares, eps, can_split=True)


def add_linear(
    stream: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    arrivals: Tensor,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """stream += x @ weight.T, and all of the RMSNorm that follows but the division by the root.

    Row i of that norm is values[i] * rsqrt(squares[:, i].sum() / outputs + eps); the factor commutes with the next
    product, which applies it (`linear`, `linear_parts`, `gate_up`, `project_append`). So `values` are rounded once,
    where `add_norm` rounds after the factor and after the gain.

    Args:
        stream: (n, outputs), contiguous; changed in place, rounded to its dtype.
        x, weight, impl: as for `linear`.
        gain: (outputs,), the norm's weight.
        arrivals: see `new_arrivals`.

    Returns:
        values: (n, outputs), the new stream times the gain, of the stream's dtype. In fp16 they may overflow where the
            norm itself would not.
        squares: (tiles, n) float32, as many tiles as suit the shape.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    check_shape("add_linear", "stream", stream, (x.shape[0], weight.shape[0]))
    check_shape("add_linear", "gain", gain, (weight.shape[0],))
    check_shape("add_linear", "arrivals", arrivals, (MOST_TILES,))
    if not is_triton("add_linear", impl, x, weight, None, stream, gain):
        return reference.add_linear(stream, x, weight, gain)
    from mage_kernels.few_rows import triton

    return triton.add_linear(stream, x, weight, gain, arrivals)


def gate_up(
    x: Tensor,
    weight: Tensor,
    *,
    squares: Tensor | None = None,
    eps: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), the first half of a SwiGLU MLP.

    Args:
        x, squares, eps, impl: as for `linear`.
        weight: (2 * size, inputs), contiguous: gate, then up; size a multiple of 32 for Triton.

    Returns:
        (n, size) of the inputs' dtype; nothing is rounded before the product of the two.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if weight.shape[0] % 2:
        raise ValueError(f"gate_up: weight of shape {tuple(weight.shape)}, expected (2 * size, inputs)")
    limit = "the gate has no multiple of 32 rows" if weight.shape[0] % 64 else None
    if not is_triton("gate_up", impl, x, weight, squares, limit=limit):
        return reference.gate_up(x, weight, squares, eps)
    from mage_kernels.few_rows import triton

    return triton.gate_up(x, weight, squares, eps)


def is_triton(
    op: str, impl: str, x: Tensor, weight: Tensor, squares: Tensor | None, *others: Tensor, limit: str | None = None
) -> bool:
    """Whether Triton multiplies these, for operations that are a product of a few rows and more.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"{op}: x (strides {x.stride()}) and weight (strides {weight.stride()}) have to be contiguous")
    if squares is not None:
        check_shape(op, "squares", squares, (squares.shape[0], x.shape[0]))
        others = *others, squares
    if not all(tensor.is_contiguous() for tensor in others):
        raise ValueError(f"{op}: a tensor is not contiguous")
    if x.shape[0] > MOST_ROWS:
        limit = f"{x.shape[0]} rows are more than {MOST_ROWS}"
    elif x.shape[1] % 64:
        limit = f"{x.shape[1]} inputs are no multiple of 64"
    limit = limit or tensor_core_limit(x[..., :1], weight[..., :1])
    return choose(op, impl, x, weight, *others, limit=limit)
