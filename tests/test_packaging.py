"""Imports and installs: names that shadow nobody, arrows that point one way, a wheel with everything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "mage_tune").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def python(code: str, *, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """Standard output of some code in a fresh process, with `path` in front of everything else."""
    front = "".join(f"sys.path.insert({i}, {str(folder)!r})\n" for i, folder in enumerate(path))
    command = [sys.executable, "-c", f"import sys\n{front}{code}"]
    return subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.PIPE, text=True, timeout=120).stdout


# --- names -------------------------------------------------------------------------------------------------------


def test_no_module_is_called_like_another() -> None:
    """Launching a file by path puts its folder first on sys.path, where its neighbours would win."""
    ours = {"mage_tune", "mage_kernels"}
    taken = (set(sys.stdlib_module_names) | set(packages_distributions())) - ours
    for folder in ("mage_tune", "scripts"):
        names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & taken, folder


@pytest.mark.parametrize("folder", ["kernels", "recipes", "scripts"])
def test_folders_that_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_a_real_package_called_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    """As Hugging Face's `kernels` must, which transformers imports."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'theirs'")
    assert python("import kernels; print(kernels.owner)", path=(ROOT, tmp_path)) == "theirs\n"


# --- imports -----------------------------------------------------------------------------------------------------


def test_import_is_light_and_needs_neither_triton_nor_trl() -> None:
    blocked = "sys.modules['triton'] = sys.modules['trl'] = None\nimport mage_tune\n"
    python(
        blocked
        + "assert mage_tune.__version__ and 'load' in dir(mage_tune)\n"
        + "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    operations = {file.parent.name for file in KERNELS if file.name == "__init__.py"} - {"mage_kernels"}
    code = [
        "assert mage_tune.load.__module__ == mage_tune.BlockDiffusionLM.__module__ == 'mage_tune.lm'",
        "from mage_tune.data import files, mixture, preview, retrieval, text, tokenizer",  # chat alone needs trl
        *(f"import mage_kernels.{name}" for name in sorted(operations)),  # their references run without it
    ]
    python(blocked + "\n".join(code))


def test_unknown_attribute() -> None:
    import mage_tune

    with pytest.raises(AttributeError, match="module 'mage_tune' has no attribute 'lode'"):
        _ = mage_tune.lode


def test_reading_a_recipe_needs_only_pydantic_and_ruamel() -> None:
    code = "from mage_tune.recipe import load_recipe\nload_recipe('recipes/debug.yaml')\n"
    python(code + "assert not {'torch', 'transformers', 'numpy', 'typer', 'rich'} & set(sys.modules)")


class Import(NamedTuple):
    """One import statement of ours."""

    file: str
    target: str
    """Absolute dotted name of what is imported."""


@cache
def imports() -> tuple[Import, ...]:
    """Every import that runs, at the top of a file or inside a function; those for type checkers alone do not run."""
    return tuple(found for file in SOURCES + KERNELS for found in imports_of(file))


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import, which breaks when a file is launched by path"
            modules = [str(node.module)]
            if node.module == "mage_tune":
                modules = [f"mage_tune.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(str(file.relative_to(ROOT)), module)


def unit(dotted: str) -> str:
    """The part of the layout a module belongs to: `data` for mage_tune.data.chat, `mage_kernels` for a kernel."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "mage_tune" and len(parts) > 1 else parts[0]


LEAVES = {
    "families",
    "selection",
    "objectives",
    "environment",
    "stability",
    "engines",
    "tracking",
}
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "mage_kernels": set(),
    "recipe_schema": {"families"},
    "recipe": {"recipe_schema"},
    "progress": {"recipe_schema"},
    "blocks": {"families"},
    "streams": {"blocks", "selection"},
    "data": {"families", "blocks", "streams", "recipe"},
    "backbone": {"families", "blocks", "streams", "data"},
    "decode": {"families", "blocks", "selection", "streams", "backbone", "mage_kernels"},
    "lm": {"families", "streams", "backbone", "decode"},
    "fused": {"backbone"},
    "stream_loss": {"recipe_schema", "objectives", "selection", "streams", "backbone"},
    "run_folder": {"environment", "families", "recipe", "backbone", "stability"},
    "callbacks": {"backbone"},
    "launcher": {"recipe"},
}
"""Design section 3, bottom first: who may import whom. Whatever is not here stands above all of it."""
ABOVE = ("trainer", "run", "evals", "bench", "publish", "plan", "doctor", "watch")
BESIDE = {"run": {"trainer"}, "publish": {"evals"}, "plan": {"run"}, "watch": {"evals", "plan"}}
"""The card speaks of results as reports do; a plan is tried with a run's own adapter and layers;
what is watched in training is recall, and utilisation as a plan counts it."""
TOP = ("cli", "train")


def test_arrows_point_one_way() -> None:
    below = set(MAY_IMPORT)
    for file, target in imports():
        if not target.startswith(("mage_tune", "mage_kernels")):
            continue
        source = unit(file.removeprefix("kernels/").removesuffix(".py").replace("/", "."))
        imported = unit(target)
        if imported == "mage_tune" or source in ("mage_tune", "__init__") or imported == source:
            continue  # the version, the lazy names of mage_tune/__init__.py, and a unit's own files
        if source in MAY_IMPORT:
            allowed = MAY_IMPORT[source]
        elif source in ABOVE:
            allowed = below | BESIDE.get(source, set())
        else:
            assert source in TOP, f"{file}: where does {source} stand? Add it to MAY_IMPORT or ABOVE"
            allowed = below | set(ABOVE) | ({"cli"} if source == "train" else set())
        assert imported in allowed, f"{file} imports {target}, but {source} may import only {sorted(allowed)}"


def test_no_cycles_between_units() -> None:
    seen: list[str] = []
    for name, allowed in MAY_IMPORT.items():  # written bottom first
        assert allowed <= set(seen), f"{name} comes before what it imports: {allowed - set(seen)}"
        seen.append(name)


def test_objectives_are_functions_of_tensors() -> None:
    known = {"__future__", "math", "typing", "collections.abc", "functools", "torch"}
    found = {target for file, target in imports() if file == "mage_tune/objectives.py"}
    assert {t for t in found if t not in known and not t.startswith("torch.")} == set()


def test_only_the_recipe_reads_yaml() -> None:
    assert {file for file, target in imports() if re.match(r"ruamel|yaml", target)} == {"mage_tune/recipe.py"}


def test_only_kernels_import_triton() -> None:
    assert {file for file, target in imports() if target.startswith("triton") and "kernels/" not in file} == set()


def test_train_defines_no_class() -> None:
    tree = ast.parse((ROOT / "mage_tune" / "train.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


EXTRAS = ("gpu", "eval", "track", "tensorboard", "wandb")


def test_every_imported_package_is_required() -> None:
    """Not merely installed because something else requires it."""
    optional = [text for extra in EXTRAS for text in PROJECT["optional-dependencies"][extra]]
    required = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"] + optional}
    owners = packages_distributions()
    for file, target in imports():
        top = target.split(".")[0].replace("pydantic_core", "pydantic")  # pydantic's own half, pinned by it
        if top in sys.stdlib_module_names or top in ("mage_tune", "mage_kernels"):
            continue
        names = {canonicalize_name(owner) for owner in owners.get(top, [top])}
        assert names & required, f"{file} imports {top}, which no dependency of pyproject.toml provides"


def test_constraints_pin_every_requirement() -> None:
    pins = {
        canonicalize_name(pin.name): pin.specifier
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#") and (pin := Requirement(line))
    }
    assert str(pins["torch"]) == "==2.13.0"
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["dev"] + extras["gguf"] + extras["corpus"]:
        wanted = Requirement(text)
        if wanted.name == "mage_tune":
            continue
        version = str(pins[canonicalize_name(wanted.name)]).removeprefix("==")
        assert wanted.specifier.contains(version), text


# --- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built with the hatchling of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


def test_wheel_holds_both_packages_and_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in SOURCES:
        assert str(file.relative_to(ROOT)) in names
    for file in KERNELS:
        assert str(file.relative_to(ROOT / "kernels")) in names
    for file in (ROOT / "recipes").rglob("*.*"):
        assert f"mage_tune/_recipes/{file.relative_to(ROOT / 'recipes')}" in names
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        assert f"mage_tune/engines/{engine}.yaml" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mage_tune", "mage_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 2**21


def test_unpacked_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import mage_tune, mage_kernels\n"
        "from mage_tune.cli import find_recipe\n"
        "from mage_tune.recipe import load_recipe\n"
        "print(mage_tune.__file__, mage_kernels.__file__, load_recipe(find_recipe('debug')).data.sources[0].path)"
    )
    for found in python(code, cwd=tmp_path, path=(tmp_path / "site",)).split():
        assert Path(found).is_relative_to(tmp_path / "site")
