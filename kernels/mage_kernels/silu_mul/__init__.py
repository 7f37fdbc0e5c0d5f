"""The gate of a SwiGLU MLP: silu(gate) * up, from one merged projection."""

from __future__ import annotations

from torch import Tensor

from mage_kernels.choice import choose


def silu_mul(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: (n, 2 * size), contiguous: gate, then up.
        impl: "auto", "triton" or "reference".

    Returns:
        (n, size).

    Raises:
        ValueError: an odd number of columns.
        RuntimeError: "triton" was asked for and cannot run.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"silu_mul: gate_up has shape {tuple(gate_up.shape)}, expected (n, 2 * size)")
    limit = None if gate_up.is_contiguous() else "gate_up is not contiguous"
    if choose("silu_mul", impl, gate_up, limit=limit):
        from mage_kernels.silu_mul import triton as chosen
    else:
        from mage_kernels.silu_mul import reference as chosen  # type: ignore[no-redef]
    return chosen.silu_mul(gate_up)
