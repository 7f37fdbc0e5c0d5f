"""Configs of accelerate for training on several GPUs, one per engine, chosen by name.

accelerate launch --config_file $(mage-tune engine fsdp2) --num_processes 4 mage_tune/train.py recipes/7b.yaml
"""

from __future__ import annotations

from pathlib import Path

ENGINES = tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.yaml")))
"""ddp, fsdp2, zero2, zero3."""


def config_file(engine: str) -> Path:
    """The config of an engine.

    Raises:
        ValueError: there is none of that name.
    """
    if engine not in ENGINES:
        raise ValueError(f"{engine}: no such engine; known are {', '.join(ENGINES)}")
    return Path(__file__).parent / f"{engine}.yaml"
