"""Sizes of the models that shipped recipes name: they are planned and imitated without the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """A model as its config.json describes it."""

    path: str | None
    """Hub id; None for one that is made here."""
    family: str
    sizes: dict[str, Any]
    """Fields of a recipe's model.random_weights."""


PUBLISHED = {
    "7b": Published("Efficient-Large-Model/Fast_dLLM_v2_7B", "fast_dllm_v2", dict(
        architecture="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28,
        num_heads=28, num_kv_heads=4, head_dim=128, tie_embeddings=False, max_positions=131072,
    )),
    "1.5b": Published("Efficient-Large-Model/Fast_dLLM_v2_1.5B", "fast_dllm_v2", dict(
        architecture="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28,
        num_heads=12, num_kv_heads=2, head_dim=128, tie_embeddings=True, max_positions=131072,
    )),
    "sdar-8b": Published("JetLM/SDAR-8B-Chat", "sdar", dict(
        architecture="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36,
        num_heads=32, num_kv_heads=8, head_dim=128, tie_embeddings=False, max_positions=32768,
    )),
    "sdar-1.7b": Published("JetLM/SDAR-1.7B-Chat", "sdar", dict(
        architecture="qwen3", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_layers=28,
        num_heads=16, num_kv_heads=8, head_dim=128, tie_embeddings=False, max_positions=32768,
    )),
    "smollm2-135m": Published(None, "converted", dict(
        architecture="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
        num_heads=9, num_kv_heads=3, head_dim=64, tie_embeddings=True, max_positions=8192,
    )),
}  # fmt: skip
"""By the names of their recipes."""


def published_at(path: str) -> Published | None:
    """The model of a Hub id, or None."""
    return next((model for model in PUBLISHED.values() if model.path == path), None)
