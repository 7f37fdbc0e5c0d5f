"""mage_tune: mask-guided fine-tuning of block-diffusion language models.

    import mage_tune
    lm = mage_tune.load("models/smollm2-135m-diffusion")

Importing the package loads neither torch nor triton nor trl; `load` and `BlockDiffusionLM` load torch when first used.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM, load

__version__ = "0.1.0"
__all__ = ["BlockDiffusionLM", "__version__", "load"]

# PEFT imports bitsandbytes wherever it is installed, and that then warns of an optional CPU kernel which we never use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name in ("load", "BlockDiffusionLM"):
        from mage_tune import lm

        return getattr(lm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
