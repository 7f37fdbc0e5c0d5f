"""Which implementation of an operation runs: asked for by name, or "auto" by what the tensors and the machine allow."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger("mage_kernels")

IMPLEMENTATIONS = ("auto", "triton", "reference")
MAX_HEAD_DIM = 256


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(*tensors: Tensor) -> str | None:
    """Why Triton cannot run on these tensors, or None when it can."""
    if any(x.requires_grad for x in tensors) and torch.is_grad_enabled():
        return "it has no backward, and an input requires a gradient"
    is_bf16 = any(x.dtype == torch.bfloat16 for x in tensors)
    return _why_not_here(tensors[0].device.type, tensors[0].device.index, is_bf16)


@torch.compiler.assume_constant_result
def _why_not_here(device: str, index: int | None, is_bf16: bool) -> str | None:
    """What the machine has to say; asked once while torch.compile traces."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if is_interpreted():
        return f"Triton's interpreter computes wrong products in {torch.bfloat16}" if is_bf16 else None
    if device != "cuda":
        return f"the tensors are on {device}"
    if index != torch.cuda.current_device():
        return f"the tensors are on cuda:{index}, but the current device is cuda:{torch.cuda.current_device()}"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


def choose(op: str, impl: str, *tensors: Tensor, limit: str | None = None) -> bool:
    """Whether to run Triton.

    Args:
        op: name of the operation, for messages.
        impl: "auto", "triton" or "reference".
        tensors: the operation's inputs, which must be on one device.
        limit: what the kernel of this operation cannot do with these inputs, if anything.

    Raises:
        ValueError: no such implementation, or tensors on several devices.
        RuntimeError: "triton" was asked for and cannot run; says why.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: impl {impl!r} is none of {', '.join(IMPLEMENTATIONS)}")
    devices = {x.device for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: tensors on several devices: {', '.join(sorted(map(str, devices)))}")
    if impl == "reference":
        return False
    reason = why_not_triton(*tensors) or limit
    if impl == "triton" and reason is not None:
        raise RuntimeError(f"{op}: impl='triton' cannot run: {reason}")
    if impl == "auto":
        _log_once(op, reason)
    return reason is None


def tensor_core_limit(*tensors: Tensor) -> str | None:
    """Why matrix products of these tensors cannot run in Triton, or None: bf16 and fp16 on a GPU, D up to 256."""
    if tensors[0].shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {tensors[0].shape[-1]} is over {MAX_HEAD_DIM}"
    dtype = tensors[0].dtype
    for other in tensors:
        if other.dtype != dtype:
            return f"query, key and value have different dtypes: {dtype} and {other.dtype}"
    if dtype not in (torch.float16, torch.bfloat16) and not (dtype == torch.float32 and _multiplies_float32()):
        return f"it computes in bf16 and fp16, not in {dtype}"  # a tensor core would round float32 to tf32
    return None


@torch.compiler.assume_constant_result
def _multiplies_float32() -> bool:
    return is_interpreted()


_logged: set[tuple[str, str | None]] = set()


def _log_once(op: str, reason: str | None) -> None:
    if torch.compiler.is_compiling() or (op, reason) in _logged:
        return
    _logged.add((op, reason))
    logger.info("%s: %s", op, "triton" if reason is None else f"reference, because {reason}")
