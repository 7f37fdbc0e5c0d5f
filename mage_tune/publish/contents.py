"""What goes up: an allow-list of a run's files, and what has to be rewritten so that strangers may read it.

Nothing is published because it lies in the run folder; it is published because it is named here. Checkpoints,
optimizer states and pickles are not. Local paths become their last part, and the base model its Hub id.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mage_tune.decode.layer_budgets import FILE as LAYER_BUDGETS
from mage_tune.decode.layer_budgets import read_layer_budgets
from mage_tune.recipe import Recipe, load_recipe, resolved_yaml

CONFIG, WEIGHTS, FAMILY = "adapter_config.json", "adapter_model.safetensors", "mage_tune.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
RECORDS = ("versions.json", "metrics.jsonl")
MERGED = (
    "config.json",
    "generation_config.json",
    "merge.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "LICENSE*",
    "NOTICE*",
)
"""Of a merged checkpoint; `*.py` beside it is the official remote code, which its config.json names."""

Content = bytes | Path
"""A file to publish: rewritten here, or as it lies on the disk."""


@dataclass(frozen=True)
class Run:
    """What a finished run folder says."""

    folder: Path
    recipe: Recipe
    adapter: dict[str, Any]
    family: dict[str, Any]
    versions: dict[str, Any]
    training: list[dict[str, Any]]
    """Lines of metrics.jsonl."""
    results: dict[str, Any] | None
    """eval/results.json, or None when the run was never evaluated."""
    layer_budgets: dict[str, Any] | None
    """layer_budgets.json, or None when they were not measured."""


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        ValueError: a file that every finished run has is missing or broken, or the run trained random weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    for name in (WEIGHTS, CONFIG, FAMILY, "recipe.yaml", "versions.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; only a finished run can be published")
    recipe = load_recipe(folder / "recipe.yaml")
    if recipe.model.random_weights is not None:
        raise ValueError(f"{folder}: this run trained random weights; there is no base model to publish it for")
    metrics, results = folder / "metrics.jsonl", folder / "eval" / "results.json"
    budgets = folder / LAYER_BUDGETS
    if budgets.is_file():
        read_layer_budgets(budgets)  # nothing goes up that decoding would refuse
    return Run(
        folder=folder,
        recipe=recipe,
        adapter=read_json(folder / CONFIG),
        family=read_json(folder / FAMILY),
        versions=read_json(folder / "versions.json"),
        training=[json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else [],
        results=read_json(results) if results.is_file() else None,
        layer_budgets=read_json(budgets) if budgets.is_file() else None,
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from None


def base_of(run: Run, mapped: str | None) -> str:
    """The Hub id of the base model: the one given, else what the run was trained on, if that is a Hub id.

    Raises:
        ValueError: it was trained on a local folder and no id was given, or the id is not one.
    """
    if mapped is not None:
        return checked_repo_id(mapped, "--base-id")
    trained_on = run.recipe.model.path or run.adapter["base_model_name_or_path"]
    if is_hub_id(trained_on):
        return trained_on
    recorded = run.adapter["base_model_name_or_path"]
    if is_hub_id(recorded):  # an adapter shipped with its base's id in place of its maker's path
        return recorded
    raise ValueError(f"{trained_on}: the base model is a local folder; give its Hub id (--base-id NAMESPACE/NAME)")


def is_hub_id(text: str | None) -> bool:
    """Whether a model or data set named in a recipe is one of the Hub rather than a file or folder."""
    if not text or text.count("/") != 1 or is_local(text) or Path(text).exists():
        return False
    if PurePath(text).suffix in (".json", ".jsonl", ".parquet", ".txt", ".npy"):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def checked_repo_id(text: str, option: str) -> str:
    """`text` if it is a repository's full id.

    Raises:
        ValueError: it is not.
    """
    if text.count("/") != 1:
        raise ValueError(f"{option} {text}: give it in full, as NAMESPACE/NAME")
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise ValueError(f"{option} {text}: not a valid repository id: {error}") from None
    return text


def is_local(text: str) -> bool:
    """Whether a value can only be a path on this machine."""
    return text.startswith(("/", "~", "..")) or bool(PureWindowsPath(text).drive)


def without_paths(value: Any) -> Any:
    """The same data with every local path cut down to its last part, so that no folder or user is named."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and is_local(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def published_recipe(recipe: Recipe, base_id: str) -> Recipe:
    """The resolved recipe as strangers may read it: the base by its Hub id, other files by their names."""
    tree = without_paths(recipe.model_dump(mode="json"))
    tree["model"]["path"] = base_id
    return Recipe.model_validate(tree)


def collect(run: Run, base_id: str, merged: Path | None) -> dict[str, Content]:
    """Everything but the card: path in the repository -> content.

    Args:
        run: the run.
        base_id: Hub id of its base model.
        merged: folder of the merged checkpoint, which then takes the adapter's place.
    """
    files: dict[str, Content] = {}
    if merged is None:
        facts = {"base_model_name_or_path": base_id, "revision": run.recipe.model.revision}
        files[CONFIG] = to_json(without_paths(run.adapter | facts))
        files |= {name: run.folder / name for name in (WEIGHTS, FAMILY)}
        home = run.folder
    else:
        files |= {file.name: file for pattern in (*MERGED, "*.py") for file in merged.glob(pattern)}
        home = merged
    files |= {name: home / name for name in TOKENIZER if (home / name).is_file()}
    files["recipe.yaml"] = resolved_yaml(published_recipe(run.recipe, base_id)).encode()
    files |= {name: run.folder / name for name in RECORDS if (run.folder / name).is_file()}
    if run.layer_budgets is not None:
        files[LAYER_BUDGETS] = to_json(without_paths(run.layer_budgets))
    if run.results is not None:
        for file in sorted((run.folder / "eval").glob("*.json")):
            found = read_json(file)
            if "settings" in found:
                found["settings"] = without_paths(found["settings"])
            files[f"eval/{file.name}"] = to_json(found)
        files |= {f"eval/{plot.name}": plot for plot in sorted((run.folder / "eval").glob("*.png"))}
    return files


def to_json(data: dict[str, Any]) -> bytes:
    """As our own writers format it."""
    return (json.dumps(data, indent=1) + "\n").encode()


def to_bytes(content: Content) -> bytes:
    """The whole of a file."""
    return content if isinstance(content, bytes) else content.read_bytes()


def size_of(content: Content) -> int:
    """Bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def refuse_leaks(files: dict[str, Content], run: Path, token: str | None) -> None:
    """The last look before anything leaves this machine.

    Raises:
        ValueError: a file holds the token, or a path of this machine that rewriting should have removed.
    """
    places = {str(folder) for folder in (Path.home(), Path.cwd(), run.resolve()) if folder != Path(folder.anchor)}
    private = [re.escape(place) + r"(?![\w.-])" for place in places] + ([re.escape(token)] if token else [])
    pattern = re.compile("|".join(private).encode())
    for name, content in files.items():
        if found := pattern.search(readable(name, content)):
            what = "your token" if token and found[0].decode() == token else f"the path {found[0].decode()}"
            raise ValueError(f"{name}: holds {what}, which must not be published; remove it and publish again")


def readable(name: str, content: Content) -> bytes:
    """The part of a file that can hold words: of weights, their header alone."""
    if name in ("tokenizer.json", "vocab.json", "merges.txt"):
        return b""  # a vocabulary knows the names of common folders
    if isinstance(content, Path) and content.suffix == ".safetensors":
        with content.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little"))
    return to_bytes(content)


def write_folder(files: dict[str, Content], out: Path) -> None:
    """The repository as it would be, as a folder; big files are linked where the file system can."""
    for name, content in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
            continue
        try:
            os.link(content, target)
        except OSError:  # another file system, or one without links
            target.write_bytes(content.read_bytes())
