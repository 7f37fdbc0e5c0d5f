"""The recipe: what one run does, as data. This is the only reader of YAML; recipe_schema.py says what it may hold.

A key that is not in the schema, a duplicate key, a wrong type or a contradiction stops the run before anything is
loaded, with one line that names file, line, key and the fix.

    recipe = load_recipe("recipes/debug.yaml", ["train.steps=20", "data.sources.0.path=my.jsonl"])

Relative paths inside a recipe (model.path, data.sources[].path, eval.text, adapter.init_from) mean a file beside the
recipe if there is one, else one in the current directory; anything else is kept as given, as it may be a Hub id, except
that ./ and ../ always mean a path. In an override they mean the current directory alone, as on any command line, and so
does `output` everywhere.
"""

from __future__ import annotations

import difflib
import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from mage_tune.recipe_schema import (
    PATH,
    Adapter,
    ChatSource,
    Data,
    Eval,
    Model,
    Objective,
    RandomWeights,
    Recipe,
    RetrievalSource,
    Section,
    Suite,
    TextSource,
    Train,
)

__all__ = [
    "Adapter",
    "ChatSource",
    "Data",
    "Eval",
    "Model",
    "Objective",
    "RandomWeights",
    "Recipe",
    "RecipeError",
    "RetrievalSource",
    "Suite",
    "TextSource",
    "Train",
    "json_schema",
    "load_recipe",
    "load_suite",
    "override_section",
    "resolved_yaml",
]


class RecipeError(ValueError):
    """What is wrong with a recipe, in one line for the person who wrote it."""


KeyPath = tuple[str | int, ...]
SomeSection = TypeVar("SomeSection", bound=Section)


class _Parsed(NamedTuple):
    """A recipe as plain dicts and lists, and where each of its keys was written (`FILE:LINE` or `--set KEY=VALUE`)."""

    tree: dict[str, Any]
    places: dict[KeyPath, str]

    def place(self, path: KeyPath) -> str:
        """Where `path`, or the section that lacks it, was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def error(self, path: KeyPath, problem: str) -> RecipeError:
        """The one line for the person."""
        return RecipeError(f"{self.place(path)}: key '{_dotted(path)}': {problem}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: `a.b=c`, applied in order before anything is checked; c is YAML, list items go by index
            (`data.sources.0.path=x.jsonl`).

    Raises:
        RecipeError: one line with file, line, key, what is wrong and the fix.
    """
    parsed = _parse(_read_text(Path(path)), str(path))
    for override in overrides:
        _apply(parsed, override)
    return _validate(Recipe, parsed, Path(path).resolve().parent)


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and check a suite of evaluation tasks; `overrides` as in `load_recipe`.

    Raises:
        RecipeError: as `load_recipe` does.
    """
    parsed = _parse(_read_text(Path(path)), str(path))
    for override in overrides:
        _apply(parsed, override.removeprefix("eval."))
    return _validate(Suite, parsed, Path(path).resolve().parent)


def override_section(section: SomeSection, overrides: Sequence[str]) -> SomeSection:
    """A section that is already there (a run's `eval`, say) with `key=value` or `eval.key=value` overrides.

    Raises:
        RecipeError: as `load_recipe` does.
    """
    parsed = _Parsed(section.model_dump(), {(): f"[{type(section).__name__.lower()}]"})
    for override in overrides:
        _apply(parsed, override.removeprefix(f"{type(section).__name__.lower()}."))
    return _validate(type(section), parsed, Path.cwd())


def _validate(schema: type[SomeSection], parsed: _Parsed, folder: Path) -> SomeSection:
    _check_keys(parsed, schema)
    _resolve_paths(parsed, schema, folder)
    try:
        return schema.model_validate(parsed.tree)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], parsed, schema) from None


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; it loads again to an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors and other tools."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        siblings = [p.name for p in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, siblings, n=1, cutoff=0.5)
        hint = f"did you mean '{file.parent / near[0]}'?" if near else "`mage-tune recipes list` shows the shipped ones"
        raise RecipeError(f"{file}: no such recipe; {hint}") from None
    except IsADirectoryError:
        raise RecipeError(f"{file}: a folder; name the .yaml file inside it") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _parse(text: str, file: str) -> _Parsed:
    places: dict[KeyPath, str] = {(): f"{file}:1"}
    node = _compose(text, lambda line: f"{file}:{line}")
    if node is None:
        raise RecipeError(f"{file}: empty; start from a shipped one, `mage-tune recipes copy debug`")
    tree = _plain(node, (), places, file)
    if not isinstance(tree, dict):
        got = "a list" if isinstance(tree, list) else "a single value"
        raise RecipeError(f"{file}:1: {got} at the top; a recipe is keys there: {', '.join(Recipe.model_fields)}")
    return _Parsed(tree, places)


def _compose(text: str, place: Callable[[int], str]) -> Node | None:
    """The YAML node tree of `text`; `place` turns a line number into the place an error names."""
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        lines = text.splitlines()
        line = min(error.problem_mark.line, len(lines) - 1) if error.problem_mark else 0
        indent = re.match(r"\s*", lines[line])
        fix = "check indentation, colons, brackets and quotes here"
        if indent and "\t" in indent[0]:
            fix = "indent with spaces, not tabs"
        problem = error.problem or error.context
        if "alias" in str(problem):  # a glob, most likely
            fix = "a value that begins with * or & needs quotes"
        raise RecipeError(f"{place(line + 1)}: not valid YAML: {problem}; {fix}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{place(line)}: not valid YAML: a control character; remove it") from None
    except RecursionError:
        raise RecipeError(f"{place(1)}: nested too deeply; a recipe has four levels") from None


def _plain(node: Node, path: KeyPath, places: dict[KeyPath, str], file: str) -> Any:
    """The value of a YAML node as plain Python; notes in `places` where every key stands."""

    def error(at: Node, problem: str) -> RecipeError:
        where = f"key '{_dotted(path)}': " if path else ""
        return RecipeError(f"{file}:{at.start_mark.line + 1}: {where}{problem}")

    if len(path) > 8:
        raise error(node, "nested too deeply; a recipe has four levels")
    if isinstance(node, ScalarNode):
        return _scalar(node, error)
    if not isinstance(node, MappingNode):
        for index, item in enumerate(node.value):
            places[*path, index] = f"{file}:{item.start_mark.line + 1}"
        return [_plain(item, (*path, index), places, file) for index, item in enumerate(node.value)]
    tree: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            raise error(key_node, "a key must be a word, not a list or section; quote it or rename it")
        key = str(key_node.value)
        inner = (*path, key)
        if key in tree:
            raise RecipeError(
                f"{file}:{key_node.start_mark.line + 1}: key '{_dotted(inner)}': duplicate key, "
                f"first at line {places[inner].rpartition(':')[2]}; remove one of the two"
            )
        places[inner] = f"{file}:{key_node.start_mark.line + 1}"
        tree[key] = _plain(value_node, inner, places, file)
    return tree


def _scalar(node: ScalarNode, error: Callable[[Node, str], RecipeError]) -> Any:
    kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
    if kind == "timestamp":  # nothing in a recipe is a date; a name may look like one
        return str(node.value)
    try:
        return YAML(typ="safe", pure=True).constructor.construct_object(node)
    except (YAMLError, ValueError):
        raise error(
            node, f"'{kind}' is not a value a recipe can hold; write text, a number, true, false or null"
        ) from None


def _apply(parsed: _Parsed, override: str) -> None:
    """Set one `a.b=c` in the tree.

    Raises:
        RecipeError: it cannot be read, or points into something that is no section.
    """
    place = f"--set {override}"
    dotted, equals, text = override.partition("=")
    keys: list[str | int] = [int(k) if k.isdecimal() else k for k in re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")]
    if not equals or "" in keys:
        raise RecipeError(f"{place}: not of the form KEY=VALUE; write for example train.steps=100")
    node = _compose(text, lambda line: place)
    value = None if node is None else _plain(node, (), {}, place)
    here: Any = parsed.tree
    for depth, key in enumerate(keys):
        path = tuple(keys[: depth + 1])
        if isinstance(here, list):
            if not isinstance(key, int) or key >= len(here):
                raise RecipeError(
                    f"{place}: key '{_dotted(path)}': a list of {len(here)}; its items are 0 to {len(here) - 1}"
                )
        elif not isinstance(here, dict) or not isinstance(key, str):
            raise RecipeError(f"{place}: key '{_dotted(path[:-1])}': holds no keys; name the key itself")
        elif depth < len(keys) - 1 and here.get(key) is None:
            here[key] = {}
            parsed.places[path] = place
        if depth < len(keys) - 1:
            here = here[key]
    here[keys[-1]] = value
    inside = tuple(keys)
    for path in [p for p in parsed.places if p[: len(inside)] == inside]:
        del parsed.places[path]
    parsed.places[inside] = place


class _Found(NamedTuple):
    """One key of a recipe as written, and the field it stands for (None: there is no such field)."""

    section: dict[str, Any]
    path: KeyPath
    field: FieldInfo | None
    siblings: list[str]


def _walk(sections: Sequence[type[Section]], tree: Any, path: KeyPath = ()) -> Iterator[_Found]:
    """Every key of a parsed recipe in the order of the file, whether valid or not."""
    if not isinstance(tree, dict):
        return
    sections = _of_kind(sections, tree)
    fields = {name: field for section in sections for name, field in section.model_fields.items()}
    for key, value in list(tree.items()):
        field = fields.get(key)
        yield _Found(tree, (*path, key), field, list(fields))
        inner = _sections(field.annotation) if field else []
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from _walk(inner, item, (*path, key, index))
        elif inner:
            yield from _walk(inner, value, (*path, key))


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type mentions: one, the kinds of a source, or none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _of_kind(sections: Sequence[type[Section]], tree: dict[str, Any]) -> Sequence[type[Section]]:
    """Of the kinds of a source, the one that `kind` names; all of them when it names none."""
    named = [
        s
        for s in sections
        if "kind" in s.model_fields and tree.get("kind") in get_args(s.model_fields["kind"].annotation)
    ]
    return named or sections


def _all_keys(sections: Sequence[type[Section]] = (), prefix: str = "") -> Iterator[str]:
    """Every valid dotted key, list items as `[0]`."""
    for section in sections or (Recipe,):
        for name, field in section.model_fields.items():
            yield prefix + name
            inner = _sections(field.annotation)
            if inner:
                yield from _all_keys(inner, f"{prefix}{name}{'[0]' if len(inner) > 1 else ''}.")


def _check_keys(parsed: _Parsed, schema: type[Section]) -> None:
    """Refuse unknown keys, naming the nearest valid one.

    Raises:
        RecipeError: see above.
    """
    for found in _walk([schema], parsed.tree):
        if found.field is None:
            near = _nearest(found.path, found.siblings)
            hint = f"did you mean '{near}'? Rename or remove it" if near else f"valid here: {', '.join(found.siblings)}"
            if "." in str(found.path[-1]):
                hint = "dots are for --set; in a file write a key inside its section"
            raise parsed.error(found.path, f"unknown key; {hint}")


_ELSEWHERE = {
    "lr": "train.learning_rate",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "batch_size": "train.rows",
    "per_device_train_batch_size": "train.rows",
    "micro_batch_size": "train.rows",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "train.checkpointing",
    "lr_scheduler_type": "train.schedule",
    "warmup": "train.warmup_steps",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "logging_steps": "train.log_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "resume_from_checkpoint": "train.resume",
    "lora": "adapter",
    "peft": "adapter",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target": "adapter.targets",
    "max_length": "data.length",
    "max_seq_length": "data.length",
    "sequence_len": "data.length",
    "cutoff_len": "data.length",
    "dataset": "data.sources",
    "datasets": "data.sources",
    "output_dir": "output",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "torch_dtype": "model.dtype",
}
"""What people used to other toolkits write, and what it is called here."""


def _nearest(path: KeyPath, siblings: list[str]) -> str | None:
    """The dotted key that was probably meant by the unknown one at `path`."""
    wrong = str(path[-1])
    beside = [key for key in siblings if _is_one_edit_apart(wrong, key)]
    if not beside and wrong in _ELSEWHERE:
        return _ELSEWHERE[wrong]
    beside = beside or difflib.get_close_matches(wrong, siblings, n=1)
    if beside:
        return _dotted((*path[:-1], beside[0]))
    names: dict[str, list[str]] = {}
    for key in _all_keys():
        names.setdefault(key.rpartition(".")[2], []).append(key)
    elsewhere = difflib.get_close_matches(wrong, names, n=1, cutoff=0.8)
    return max(names[elsewhere[0]], key=lambda key: _likeness(key, _dotted(path))) if elsewhere else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _is_one_edit_apart(one: str, other: str) -> bool:
    """Whether a single letter added, left out or replaced makes one the other."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    rest, goal = one[same:], other[same:]
    return rest[1:] == goal or rest == goal[1:] or rest[1:] == goal[1:]


def _resolve_paths(parsed: _Parsed, schema: type[Section], folder: Path) -> None:
    """Make local paths absolute by the rule in the module's docstring."""
    for found in _walk([schema], parsed.tree):
        key = str(found.path[-1])
        value = found.section[key]
        if found.field is not None and found.field.json_schema_extra == PATH and isinstance(value, str) and value:
            is_typed = parsed.place(found.path).startswith("--set ")
            found.section[key] = _local(value, [Path.cwd()] if is_typed else [folder, Path.cwd()])


def _local(value: str, folders: list[Path]) -> str:
    """`value` as an absolute path if it is there in one of the folders, or can only be a path; else as given."""
    value = os.path.expanduser(value)
    places = [os.path.normpath(folder / value) for folder in folders]
    for place in places:
        if os.path.exists(place) or (glob.has_magic(place) and any(glob.iglob(place, recursive=True))):
            return place
    return places[0] if value.startswith(("./", "../")) else value


_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text, in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}


def _explain(error: ErrorDetails, parsed: _Parsed, schema: type[Section]) -> RecipeError:
    """The one line for a pydantic error."""
    kind, context = error["type"], error.get("ctx", {})
    path = _written_path(error["loc"])
    if kind == "contradiction":
        return parsed.error((*path, *context["key"].split(".")), context["reason"])
    if kind == "union_tag_not_found":
        kinds = "text, chat or retrieval" if schema is Recipe else "text, needles, copy, ...: docs/evaluation.md"
        return parsed.error((*path, "kind"), f"required key is missing; add it ({kinds})")
    if kind == "union_tag_invalid":
        path, context, got = (*path, "kind"), {"expected": context["expected_tags"]}, context["tag"]
    elif kind == "missing":
        if isinstance(path[-1], int):
            return parsed.error(path[:-1], f"got {len(error['input'])} value; write two")
        return parsed.error(path, f"required key is missing; add it ({_description(path, parsed.tree, schema)})")
    else:
        got = error["input"]
    if "expected" in context:
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(got), choices, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return parsed.error(path, f"unknown value {_show(got)}; {hint}Write one of {', '.join(choices)}")
    if kind in _WANTED:
        return parsed.error(path, f"wrong type: got {_show(got)}; write {_WANTED[kind]}")
    if kind == "string_pattern_mismatch":
        return parsed.error(path, f"got {_show(got)}; write another ({_description(path, parsed.tree, schema)})")
    message = error["msg"].replace("Input should", "it should").replace("String should", "it should")
    return parsed.error(path, f"got {_show(got)}; {message[0].lower()}{message[1:]}")


def _written_path(loc: tuple[str | int, ...]) -> KeyPath:
    """A pydantic location without the tag it inserts after the index of a source."""
    return tuple(
        part
        for i, part in enumerate(loc)
        if i == 0 or not (isinstance(part, str) and loc[i - 2 : i - 1] in (("sources",), ("tasks",)))
    )


def _description(path: KeyPath, tree: dict[str, Any], schema: type[Section]) -> str:
    """The schema's sentence about a missing key."""
    sections: Sequence[type[Section]] = [schema]
    here: Any = tree
    for part in path[:-1]:
        here = here[part]
        if isinstance(part, str):
            sections = [s for section in sections for s in _sections(section.model_fields[part].annotation)]
        if isinstance(here, dict):
            sections = _of_kind(sections, here)
    fields = [section.model_fields[str(path[-1])] for section in sections if path[-1] in section.model_fields]
    return (fields[0].description or "").rstrip(".")


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _show(value: Any) -> str:
    """A value as short as an error line wants it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a section" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
