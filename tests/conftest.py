"""What several tests share: tiny models, the official checkpoints of tests/fixtures, hypothesis settings.

pytest-xdist loads this file once more, in the process that hands out the tests, and starts its workers when that is
done; so what takes long to import is imported where it is used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; must be set before transformers is imported

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

    from mage_tune.backbone import Backbone
    from mage_tune.data.example import Example
    from mage_tune.lm import BlockDiffusionLM

FIXTURES = Path(__file__).parent / "fixtures"
MODEL_TYPES = {"fast_dllm_v2": "Fast_dLLM_Qwen", "sdar": "sdar"}

settings.register_profile("mage_tune", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("mage_tune")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, except for what other packages say to each other."""
    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
    hands_out_tests = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out_tests:
        import torch

        torch.set_num_threads(1)  # tiny models: threads only cost


@dataclass(frozen=True)
class Published:
    """A fixture checkpoint in the format its authors publish, with the official outputs."""

    folder: Path
    facts: dict
    data: dict[str, Tensor]

    def load(self, **options) -> BlockDiffusionLM:
        from mage_tune.lm import load

        given = {"mask_id": self.facts["mask_id"], "stop_ids": (self.facts.get("stop_id", 3),), "pad_id": 0}
        return load(self.folder, **given | options)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """published(name) -> Published; the folder is written once."""
    from safetensors.torch import load_file, save_file

    made: dict[str, Published] = {}

    def get(name: str) -> Published:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            facts = json.loads((FIXTURES / f"{name}.json").read_text())
            tensors = load_file(FIXTURES / f"{name}.safetensors")
            config = facts["config"] | {"model_type": MODEL_TYPES[name], "rms_norm_eps": 1e-6}
            (folder / "config.json").write_text(json.dumps(config))
            parts = {"weights.": {}, "data.": {}}
            for key, value in tensors.items():
                prefix = next(p for p in parts if key.startswith(p))
                parts[prefix][key.removeprefix(prefix)] = value
            save_file(parts["weights."], folder / "model.safetensors", metadata={"format": "pt"})
            made[name] = Published(folder, facts, parts["data."])
        return made[name]

    return get


TINY = {
    "architecture": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "tie_embeddings": True,
    "max_positions": 512,
}


def make_backbone(family: str = "converted", *, block_size: int = 4, seed: int = 0, **shape) -> Backbone:
    """A tiny float32 model whose weights are large enough for attention to have favourites."""
    import torch

    from mage_tune.backbone import random_backbone

    sizes = TINY | shape
    facts = {"block_size": block_size, "mask_id": sizes["vocab_size"] - 1, "stop_ids": (1,), "pad_id": 0}
    backbone = random_backbone(sizes, family, seed=seed, dtype="float32", device="cpu", **facts)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return backbone


@pytest.fixture(scope="session")
def tiny_backbone():
    """tiny_backbone(family, block_size=, seed=, **shape) -> Backbone."""
    return make_backbone


@pytest.fixture(scope="session")
def converted_checkpoint(tmp_path_factory):
    """converted_checkpoint(backbone) -> a new folder: weights, family facts in config.json, tokenizer if any."""
    from mage_tune.backbone import family_facts

    def save(backbone: Backbone) -> Path:
        folder = tmp_path_factory.mktemp("converted")
        backbone.model.config.mage_tune = family_facts(backbone.family)
        backbone.model.save_pretrained(folder)
        if backbone.tokenizer is not None:
            backbone.tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_adapter():
    """tiny_adapter(backbone, **options) -> PeftModel whose update is not zero."""
    import torch

    from mage_tune.backbone import attach_adapter

    def attach(backbone: Backbone, **options):
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            model = attach_adapter(backbone, **{"rank": 4, "alpha": 8.0} | options)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return attach


@pytest.fixture(scope="session")
def make_examples():
    """make_examples((length, prompt), ...) -> examples with random tokens, the first `prompt` not supervised."""
    import numpy as np

    from mage_tune.data.example import Example

    def make(*shapes: tuple[int, int], seed: int = 0, vocab: int = 60) -> list[Example]:
        rng = np.random.default_rng(seed)
        examples = []
        for row, (length, prompt) in enumerate(shapes):
            weight = np.ones(length, dtype=np.float32)
            weight[:prompt] = 0.0
            examples.append(Example(row, rng.integers(4, vocab, length), weight))
        return examples

    return make
