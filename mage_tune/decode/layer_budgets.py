"""Numbers of keys per layer as a file, as `mage-tune budgets` writes it and decoding reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

FILE = "layer_budgets.json"
"""Its name in a run folder."""


class LayerBudgets(BaseModel):
    """What decoding needs of such a file; how it was measured stands beside it."""

    model_config = ConfigDict(frozen=True, strict=False, extra="ignore")

    budget: int = Field(ge=1)
    """Keys per KV head and layer on average."""
    dense_layers: int = Field(ge=0)
    budgets: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Layer -> keys per KV head."""

    def scaled(self, budget: int) -> dict[int, int]:
        """The same shares of another budget, rounded, at least one key each."""
        return {layer: max(1, round(keys * budget / self.budget)) for layer, keys in self.budgets.items()}


def read_layer_budgets(path: str | Path) -> LayerBudgets:
    """A file of layer budgets.

    Raises:
        ValueError: no such file, no JSON, or not of this form; one line that says where.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; mage-tune budgets writes one")
    try:
        return LayerBudgets.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); mage-tune budgets writes such a file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise ValueError(f"{path}: {where}: {first['msg'].lower()}; mage-tune budgets writes such a file") from None


def rule_options(
    layer_budgets: Mapping[int, int] | str | Path | None, attention: Any, budget: int | None, dense_layers: int | None
) -> dict[str, Any]:
    """Options of the `mage` rule that layer budgets stand for; none without them.

    Args:
        layer_budgets: layer -> keys, taken as they are, or a file, whose numbers are scaled to `budget` if that is
            another than the file's.
        attention: the rule asked for.
        budget, dense_layers: as asked for; None takes the file's.

    Raises:
        ValueError: another rule, a file that cannot be read, or one of other dense layers.
    """
    if layer_budgets is None:
        return {}
    if attention != "mage":
        raise ValueError(f"layer budgets go with attention 'mage', not {attention!r}")
    if isinstance(layer_budgets, Mapping):
        return {"layer_budgets": layer_budgets}
    measured = read_layer_budgets(layer_budgets)
    if dense_layers not in (None, measured.dense_layers):
        raise ValueError(
            f"{layer_budgets}: measured with {measured.dense_layers} dense layers, not {dense_layers}; leave "
            "dense_layers out, or measure again"
        )
    budget = measured.budget if budget is None else budget
    return {"budget": budget, "dense_layers": measured.dense_layers, "layer_budgets": measured.scaled(budget)}
