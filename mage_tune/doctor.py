"""What `mage-tune doctor` looks at. Nothing here opens a network connection or prints a secret."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

RUNTIME_EXTRAS = ("gpu", "eval", "track")
LEAST_FREE_GIB = 2
"""A small run writes its adapter and two checkpoints; less than this is not enough for comfort."""


class Finding(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    is_fine: bool = True


Check = Callable[[], list[Finding]]


def examine() -> list[Finding]:
    """Every check, in the order of the table."""
    checks: list[Check] = [_python, _packages, _device, _disk, _hub, _attention]
    return [finding for check in checks for finding in run_check(check)]


def run_check(check: Check) -> list[Finding]:
    """What a check found; one that breaks is a finding too."""
    try:
        return check()
    except Exception as error:  # whatever is broken is exactly what the table should say
        return [Finding(check.__name__.strip("_"), f"{type(error).__name__}: {error}", False)]


def _python() -> list[Finding]:
    is_fine = (3, 11) <= sys.version_info[:2] < (3, 13)
    return [Finding("python", f"{platform.python_version()} on {platform.platform()}", is_fine)]


def _packages() -> list[Finding]:
    """Installed version of every package that we require, against our range; optional ones only when they are there."""
    from packaging.requirements import Requirement

    try:
        wanted = requires("mage_tune") or []
    except PackageNotFoundError:
        return [Finding("packages", "mage_tune runs from a checkout that is not installed; versions not checked")]
    findings = []
    for requirement in map(Requirement, wanted):
        is_optional = requirement.marker is not None
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in RUNTIME_EXTRAS):
            continue  # what developers and maintainers' scripts need
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            if not is_optional:
                findings.append(Finding(requirement.name, f"missing; needs {requirement.specifier}", False))
            continue
        is_fine = requirement.specifier.contains(found, prereleases=True)
        findings.append(
            Finding(requirement.name, found if is_fine else f"{found}; needs {requirement.specifier}", is_fine)
        )
    return findings


def _device() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("device", f"CPU, {torch.get_num_threads()} threads; no GPU")]
    findings = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        found = f"{facts.name}, sm_{facts.major}{facts.minor}, {free:.0f} of {total:.0f} GiB free"
        findings.append(Finding(f"GPU {index}", f"{found}, CUDA {torch.version.cuda}"))
    return findings


def _disk() -> list[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    findings = []
    for what, folder in {"disk, here": Path.cwd(), "disk, Hub cache": Path(HF_HUB_CACHE)}.items():
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        findings.append(Finding(what, f"{free:.1f} GiB free at {folder}", free >= LEAST_FREE_GIB))
    return findings


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    endpoint = urlsplit(constants.ENDPOINT)
    offline = ", offline mode" if constants.HF_HUB_OFFLINE else ""
    origin = "HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "default"
    token = "present, not shown" if get_token() else "none; needed to publish and for gated models"
    return [Finding("Hub endpoint", f"{endpoint.hostname} ({origin}){offline}"), Finding("Hub token", token)]


def _attention() -> list[Finding]:
    """A tiny random model answers, so our function is registered and this transformers calls it as we expect."""
    import torch
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from mage_tune.backbone import ATTENTION, random_backbone
    from mage_tune.lm import from_backbone
    from mage_tune.recipe import RandomWeights

    registries = (AttentionInterface(), AttentionMaskInterface())
    missing = [type(registry).__name__ for registry in registries if ATTENTION not in registry.valid_keys()]
    if missing:
        return [Finding("attention", f"'{ATTENTION}' is not registered in {', '.join(missing)}", False)]
    shape = RandomWeights(vocab_size=264, num_layers=1).model_dump()
    lm = from_backbone(random_backbone(shape, "converted", device="cpu", dtype="float32"))
    logits = lm.logits(torch.zeros(1, lm.family.block_size, dtype=torch.long))
    return [Finding("attention", f"'{ATTENTION}' registered; a tiny model answers", bool(logits.isfinite().all()))]
