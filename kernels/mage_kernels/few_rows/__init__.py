"""Products of a few rows with a weight matrix: a denoising step of one block reads every weight for 32 rows.

Nothing but the reading of the weights costs time there, and cuBLAS reads them at 65 to 88 % of the copy rate for the
published shapes. These kernels stream them once, split the inner dimension over programs where a matrix has too few
rows of tiles to fill the GPU, and leave the sum of such parts to the operation that follows (`add_norm`,
`rope_append`).
"""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose, tensor_core_limit
from mage_kernels.few_rows import reference

MOST_ROWS = 32
"""Beyond, arithmetic begins to count and cuBLAS is at home."""


def linear(x: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """x @ weight.T.

    Args:
        x: (n, inputs), contiguous; at most 32 rows and inputs a multiple of 64 for Triton.
        weight: (outputs, inputs), contiguous, same dtype: bf16 or fp16 for Triton.
        impl: "auto", "triton" or "reference".

    Returns:
        (n, outputs) of the inputs' dtype; products are summed in float32.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if not _choose("linear", impl, x, weight):
        return reference.linear(x, weight)
    from mage_kernels.few_rows import triton

    return triton.linear(x, weight, None, parts=1)[0]


def linear_parts(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x @ weight.T + bias as parts of its sum, for `add_norm` and `rope_append` to add up.

    Args:
        x, weight, impl: as for `linear`.
        bias: (outputs,); it is in the first part.

    Returns:
        (parts, n, outputs), float32 and as many parts as suit the shape from Triton; one part of the inputs' dtype from
        the reference.

    Raises:
        ValueError: shapes that do not fit, or a tensor that is not contiguous.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if not _choose("linear_parts", impl, x, weight):
        return reference.linear(x, weight, bias)[None]
    from mage_kernels.few_rows import triton

    return triton.linear(x, weight, bias, parts=triton.best_parts(weight))


def gate_up(x: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), the first half of a SwiGLU MLP.

    Args:
        x, impl: as for `linear`.
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
    if not _choose("gate_up", impl, x, weight, limit):
        return reference.gate_up(x, weight)
    from mage_kernels.few_rows import triton

    return triton.gate_up(x, weight)


def _choose(op: str, impl: str, x: Tensor, weight: Tensor, limit: str | None = None) -> bool:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} does not fit a weight of {tuple(weight.shape)}")
    if not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"{op}: x (strides {x.stride()}) and weight (strides {weight.stride()}) have to be contiguous")
    if x.shape[0] > MOST_ROWS:
        limit = f"{x.shape[0]} rows are more than {MOST_ROWS}"
    elif x.shape[1] % 64:
        limit = f"{x.shape[1]} inputs are no multiple of 64"
    return choose(op, impl, x, weight, limit=limit or tensor_core_limit(x[..., :1], weight[..., :1]))
