"""Sizes of a recipe's model, from its config alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedConfig

from mage_tune.families import Family, Published, apply_config, get_family, guess_family, published_at
from mage_tune.recipe import Model, RandomWeights, Recipe


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Llama or Qwen kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    qkv_bias: bool = False
    head_norms: bool = False

    @property
    def query_size(self) -> int:
        """Numbers of a token's queries, all heads."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Numbers of a token's keys, all heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one decoder layer."""
        hidden, inner, query, key = self.hidden_size, self.intermediate_size, self.query_size, self.key_size
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all decoder layers' linear layers."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def parameters(self) -> int:
        """Parameters of the model, output head included."""
        extra = 2 * self.hidden_size + 2 * self.head_dim * self.head_norms
        extra += (self.query_size + 2 * self.key_size) * self.qkv_bias
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return tables + self.linear_parameters + self.num_layers * extra + self.hidden_size


def read_model(recipe: Recipe) -> tuple[Shape, Family]:
    """Sizes and family of a recipe's model, from its config alone.

    Raises:
        ValueError, OSError: see `plan`.
    """
    model = recipe.model
    if model.random_weights is not None:
        assert model.record is not None  # the recipe asks for a family
        return _as_stated(model.random_weights), model.record
    assert model.path is not None
    shipped = shipped_sizes(model)
    if shipped is not None:
        family = get_family(model.family or shipped.family).with_overrides(block_size=model.block_size)
        return _as_stated(RandomWeights(**shipped.sizes)), family
    try:
        config, _ = PreTrainedConfig.get_config_dict(model.path, revision=model.revision)
    except OSError as error:
        why = str(error).partition("\n")[0]
        raise OSError(
            f"{model.path}: its config.json cannot be read ({why}); without network name a local folder, with "
            "model.path=FOLDER"
        ) from error
    if not config:
        raise OSError(f"{model.path}: no config.json there")
    family = guess_family(config) if model.family is None else apply_config(get_family(model.family), config)
    family = family.with_overrides(block_size=model.block_size)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        shape = Shape(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tie_embeddings=config.get("tie_word_embeddings", False),
            **_extras(family.architecture or config["model_type"]),
        )
    except KeyError as missing:
        raise ValueError(f"{model.path}: config.json does not tell {missing}") from missing
    return shape, family


def shipped_sizes(model: Model) -> Published | None:
    """The sizes of a recipe's model that come with the package, if its config.json is not on this machine.

    They are exact; asking the Hub would tell nothing more, and take half a minute of retries without network.
    """
    if model.path is None or model.revision is not None or Path(model.path).exists():
        return None
    known = published_at(model.path)
    is_cached = known is not None and isinstance(try_to_load_from_cache(model.path, "config.json"), str)
    return None if is_cached else known


def _as_stated(weights: RandomWeights) -> Shape:
    sizes = weights.model_dump(exclude={"architecture", "max_positions"})
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // sizes["num_heads"]
    return Shape(**sizes, **_extras(weights.architecture))


def _extras(architecture: str) -> dict[str, bool]:
    name = architecture.lower()
    return {"qkv_bias": "qwen2" in name, "head_norms": "qwen3" in name}
