"""What a result was made with: package versions, device and commit. Every number we write carries it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mage_tune


def environment() -> dict[str, Any]:
    """Versions of Python and of every package that matters, the device, and the toolkit's commit."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "triton")
    versions: dict[str, Any] = {"python": platform.python_version(), "mage_tune": mage_tune.__version__}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    on_gpu = torch.cuda.is_available()
    versions["device"] = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions["commit"] = _commit()
    return versions


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or a copy without its history
    return found.stdout.strip()
