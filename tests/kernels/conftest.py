"""Kernels run on a GPU where there is one, and in Triton's interpreter otherwise.

The interpreter must be chosen before Triton is first imported, which the rest of the suite does early. So without a GPU
these files are collected only in a process started with TRITON_INTERPRET=1; `test_in_interpreter.py` starts one.
"""

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not IS_INTERPRETED
ELSEWHERE = {"test_in_interpreter.py", "test_compiles_for_hopper.py"}
"""Files whose tests start processes of their own."""
collect_ignore = (
    [] if IS_INTERPRETED or HAS_GPU else [f.name for f in HERE.glob("test_*.py") if f.name not in ELSEWHERE]
)
torch.set_num_threads(1)


def patch_the_language_once() -> None:
    """Half the time of interpreted kernels went into looking through Triton's whole language at every function call.

    The interpreter puts its own operations in place for a launch, and again for every function that a kernel calls,
    where nothing is left to replace. A package is replaced whole or not at all, so that one of its names tells.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    patch, names = interpreter._patch_builtin, {}

    def patch_what_is_not(package: Any, *rest: Any) -> None:
        if package not in names:
            names[package] = next(name for name, member in inspect.getmembers(package) if is_builtin(member))
        if is_builtin(getattr(package, names[package])):
            patch(package, *rest)

    interpreter._patch_builtin = patch_what_is_not


if IS_INTERPRETED:
    patch_the_language_once()


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU every test here needs it; without one the full matrix is skipped."""
    for item in items:
        if HERE in item.path.parents:
            if HAS_GPU:
                item.add_marker("gpu")
            elif item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(params=["bfloat16", "float16"] if HAS_GPU else ["float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Tensor cores would round float32; the interpreter multiplies bf16 wrongly, and fp16 is met in other tests."""
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def floating_point_rules() -> Iterator[None]:
    """log2(0) = -inf is meant; numpy, which interprets, would warn."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, or a number out of every range, so that what a kernel leaves unwritten shows."""

    def poisoned(make):
        def wrapped(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

        return wrapped

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
