"""Every way a recipe can be wrong gives one line with place, key and fix; every shipped recipe loads."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.families import FAMILIES, PUBLISHED
from mage_tune.recipe import (
    Eval,
    RandomWeights,
    Recipe,
    RecipeError,
    TextSource,
    json_schema,
    load_recipe,
    override_section,
    resolved_yaml,
)
from mage_tune.recipe_schema import Section

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

# Line numbers matter: `model` is line 2, `data` line 9, the source's `kind` line 12.
GOOD = """\
name: good
model:
  family: converted
  mask_id: 3
  stop_ids: [1]
  random_weights:
    num_layers: 4
    num_heads: 4
data:
  length: 64
  sources:
    - kind: text
      path: corpus.txt
"""
LAST = GOOD.count("\n")


def load(text: str | bytes, *overrides: str, folder: Path) -> Recipe:
    file = folder / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(file, overrides)


@pytest.fixture
def fails(tmp_path: Path):
    """The error line of a recipe, with its file called r.yaml."""

    def message(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, folder=tmp_path)
        line = str(caught.value).replace(str(tmp_path / "r.yaml"), "r.yaml")
        assert "\n" not in line
        return line

    return message


def test_good_recipe_loads(tmp_path: Path) -> None:
    recipe = load(GOOD, folder=tmp_path)
    assert recipe.train.steps == 200
    source = recipe.data.sources[0]
    assert isinstance(source, TextSource)
    assert source.path == "corpus.txt"


# --- the file itself ---------------------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "debug.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"debgu\.yaml: no such recipe; did you mean '.*debug\.yaml'\?$"):
        load_recipe(tmp_path / "debgu.yaml")
    with pytest.raises(
        RecipeError, match=r"x/y\.yaml: no such recipe; `mage-tune recipes list` shows the shipped ones$"
    ):
        load_recipe(tmp_path / "x" / "y.yaml")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r": a folder; name the \.yaml file inside it$"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yaml: empty; start from a shipped one, `mage-tune recipes copy debug`"),
        ("# only words\n", "r.yaml: empty; start from a shipped one, `mage-tune recipes copy debug`"),
        ("- name: x\n", f"r.yaml:1: a list at the top; a recipe is keys there: {', '.join(Recipe.model_fields)}"),
        ("hello\n", f"r.yaml:1: a single value at the top; a recipe is keys there: {', '.join(Recipe.model_fields)}"),
        (b"name: x\nseed: \xff\n", "r.yaml:2: not UTF-8 text; save the file as UTF-8"),
        ("name: x\x01\n", "r.yaml:1: not valid YAML: a control character; remove it"),
        (
            "data:\n\tlength: 3\n",
            "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
        ),
        (
            "name: x\n seed: 1\n",
            "r.yaml:2: not valid YAML: mapping values are not allowed here; "
            "check indentation, colons, brackets and quotes here",
        ),
        (
            "name: 'x\nseed: 1\n",
            "r.yaml:2: not valid YAML: found unexpected end of stream; "
            "check indentation, colons, brackets and quotes here",
        ),
        (
            "name: *x\n",
            "r.yaml:1: not valid YAML: found undefined alias 'x'; a value that begins with * or & needs quotes",
        ),
        ("[" * 600 + "]" * 600, "r.yaml:1: nested too deeply; a recipe has four levels"),
        (
            "name: !new x\n",
            "r.yaml:1: key 'name': '!new' is not a value a recipe can hold; write text, a number, true, false or null",
        ),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a word, not a list or section; quote it or rename it"),
        ("name: x\nname: y\n", "r.yaml:2: key 'name': duplicate key, first at line 1; remove one of the two"),
        (
            "train:\n  steps: 1\n  rows: 1\n  steps: 2\n",
            "r.yaml:4: key 'train.steps': duplicate key, first at line 2; remove one of the two",
        ),
        (
            GOOD + "      kind: chat\n",
            f"r.yaml:{LAST + 1}: key 'data.sources[0].kind': duplicate key, first at line 12; remove one of the two",
        ),
    ],
)
def test_unreadable(fails, text: str | bytes, line: str) -> None:
    assert fails(text) == line


def test_self_reference_ends(fails) -> None:
    assert fails("name: &a [*a]\n").endswith("nested too deeply; a recipe has four levels")


# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ("train:\n  lr: 1e-4\n", "2: key 'train.lr': unknown key; did you mean 'train.learning_rate'? Rename or remove it"),
        ("trian:\n  steps: 1\n", "1: key 'trian': unknown key; did you mean 'train'? Rename or remove it"),
        ("learning_rate: 1\n", "1: key 'learning_rate': unknown key; did you mean 'train.learning_rate'? Rename or remove it"),
        ("train: {rank: 1}\n", "1: key 'train.rank': unknown key; did you mean 'adapter.rank'? Rename or remove it"),
        ("adapter: {lora_alpha: 1}\n", "1: key 'adapter.lora_alpha': unknown key; did you mean 'adapter.alpha'? Rename or remove it"),
        ("batch_size: 1\n", "1: key 'batch_size': unknown key; did you mean 'train.rows'? Rename or remove it"),
        ("      shrae: 1\n", "1: key 'data.sources[0].shrae': unknown key; did you mean 'data.sources[0].share'? Rename or remove it"),
        (
            "objective: {query_alignment: {wieght: 1}}\n",
            "1: key 'objective.query_alignment.wieght': unknown key; "
            "did you mean 'objective.query_alignment.weight'? Rename or remove it",
        ),
        ("zzz: 1\n", f"1: key 'zzz': unknown key; valid here: {', '.join(Recipe.model_fields)}"),
        ("train.steps: 1\n", "1: key 'train.steps': unknown key; dots are for --set; in a file write a key inside its section"),
        ("3: 1\n", f"1: key '3': unknown key; valid here: {', '.join(Recipe.model_fields)}"),
        ("<<: {name: x}\n", f"1: key '<<': unknown key; valid here: {', '.join(Recipe.model_fields)}"),
    ],
)  # fmt: skip
def test_unknown_key(fails, extra: str, line: str) -> None:
    number, rest = line.split(":", 1)
    assert fails(GOOD + extra) == f"r.yaml:{LAST + int(number)}:{rest}"


def test_a_key_of_another_kind_of_source_is_unknown(fails) -> None:
    assert fails(GOOD + "      overlong: drop\n").startswith(
        f"r.yaml:{LAST + 1}: key 'data.sources[0].overlong': unknown"
    )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: good\n", "", "r.yaml:1: key 'name': required key is missing; add it (Name of the run: letters, digits, '.', '_', '+' and '-', as in a file name)"),
        (GOOD[GOOD.index("data:") :], "", "r.yaml:1: key 'data': required key is missing; add it (The data)"),
        ("      path: corpus.txt\n", "", "r.yaml:12: key 'data.sources[0].path': required key is missing; add it (JSONL, Parquet or .txt file, a glob of them, an .npy file of token ids, or a Hub id)"),
        ("kind: text\n      ", "", "r.yaml:12: key 'data.sources[0].kind': required key is missing; add it (text, chat or retrieval)"),
        ("kind: text", "kid: text", "r.yaml:12: key 'data.sources[0].kid': unknown key; did you mean 'data.sources[0].kind'? Rename or remove it"),
        ("kind: text", "kind: txet", "r.yaml:12: key 'data.sources[0].kind': unknown value 'txet'; did you mean 'text'? Write one of text, chat, retrieval"),
        ("kind: text", "kind: 3", "r.yaml:12: key 'data.sources[0].kind': unknown value '3'; Write one of text, chat, retrieval"),
    ],
)  # fmt: skip
def test_missing_and_discriminator(fails, old: str, new: str, line: str) -> None:
    assert old in GOOD
    assert fails(GOOD.replace(old, new)) == line


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("train: {steps: many}", "'train.steps': wrong type: got 'many'; write a whole number"),
        ("train: {steps: 1.5}", "'train.steps': wrong type: got 1.5; write a whole number"),
        ("train: {steps: true}", "'train.steps': wrong type: got true; write a whole number"),
        ("train: {steps: 0}", "'train.steps': got 0; it should be greater than or equal to 1"),
        ("train: {learning_rate: '1e-4'}", "'train.learning_rate': wrong type: got '1e-4'; write a number"),
        ("train: {learning_rate: .inf}", "'train.learning_rate': wrong type: got inf; write a finite number"),
        ("train: {schedule: cosin}", "'train.schedule': unknown value 'cosin'; did you mean 'cosine'? Write one of cosine, linear, constant"),
        ("train: {betas: [0.9]}", "'train.betas': got 1 value; write two"),
        ("train: {betas: 0.9}", "'train.betas': wrong type: got 0.9; write a list"),
        ("train: {betas: [0.9, 1]}", "'train.betas[1]': got 1; it should be less than 1"),
        ("train:", "'train': wrong type: got nothing; write a section of keys"),
        ("train: [1]", "'train': wrong type: got a list; write a section of keys"),
        ("adapter: {dora: yes}", "'adapter.dora': wrong type: got 'yes'; write true or false"),
        ("adapter: {targets: q_proj}", "'adapter.targets': wrong type: got 'q_proj'; write a list"),
        ("output: 3", "'output': wrong type: got 3; write text, in quotes"),
        ("eval: {budgets: [0]}", "'eval.budgets[0]': got 0; it should be greater than or equal to 1"),
    ],
)  # fmt: skip
def test_wrong_value(fails, extra: str, problem: str) -> None:
    assert fails(GOOD + extra + "\n") == f"r.yaml:{LAST + 1}: key {problem}"


def test_a_source_that_is_no_section(fails) -> None:
    assert fails(GOOD + "    - corpus.txt\n") == (
        f"r.yaml:{LAST + 1}: key 'data.sources[1]': wrong type: got 'corpus.txt'; write a section of keys"
    )


def test_name_becomes_a_folder(fails) -> None:
    assert fails(GOOD.replace("name: good", "name: ../x")).startswith("r.yaml:1: key 'name': got '../x'; write another")


def test_numbers_and_dates(tmp_path: Path) -> None:
    recipe = load(GOOD + "train: {learning_rate: 1e-4, weight_decay: 1}\n", folder=tmp_path)
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.weight_decay == 1.0
    assert load(GOOD.replace("name: good", "name: 2026-11-22"), folder=tmp_path).name == "2026-11-22"


# --- contradictions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["objective.sparse_distillation.weight=0.5"],
         "'objective.sparse_distillation.budget': needed, as the weight is 0.5; add the keys kept per KV head"),
        (["objective.sparse_distillation={weight: 1, budget: 64}"],
         "'objective.sparse_distillation.budget': 64 keys of at most 64 (data.length) is not sparse; write less"),
        (["objective.query_alignment.weight=1", "train.checkpointing=reentrant"],
         "'train.checkpointing': 'reentrant' silently loses the gradient of query_alignment; write 'non_reentrant'"),
        (["objective={attention_alignment: {weight: 1}, sparse_distillation: {weight: 1, budget: 8}}", "train.checkpointing=reentrant"],
         "'train.checkpointing': 'reentrant' silently loses the gradient of attention_alignment and sparse_distillation; write 'non_reentrant'"),
        (["train.kernels=fused", "adapter.dora=true"],
         "'adapter.dora': fused layers know plain LoRA only; write false, or train.kernels: plain"),
        (["train.kernels=fused", "adapter.dropout=0.1"],
         "'adapter.dropout': fused layers know plain LoRA only; write 0, or train.kernels: plain"),
        (["data.length=100"], "'data.length': 100 is no whole number of blocks of 32 tokens; write 96"),
        (["model.block_size=48"], "'data.length': 64 is no whole number of blocks of 48 tokens; write 48"),
        (["model.family=sdar", "model.random_weights.vocab_size=264", "data.length=66"], "'data.length': 66 is no whole number of blocks of 4 tokens; write 64"),
        (["model.pad_id=1"], "'model.pad_id': 1 is a stop id too, so stopping would not be learnt; choose an unused token"),
        (["model.mask_id=1"], "'model.mask_id': 1 is a stop id too; choose an unused token"),
        (["model.path=x"], "'model.path': given together with random_weights; remove one of the two"),
        (["model.random_weights=null"], "'model.path': no model; add a folder or Hub id, or random_weights"),
        (["model.family=null"],
         "'model.family': random weights have no config to guess it from; add one of fast_dllm_v2, sdar, converted"),
        (["model.mask_id=null"], "'model.mask_id': needed, as family 'converted' has no mask token of its own; add it"),
        (["model.mask_id=256"], "'model.mask_id': token 256 is outside random_weights.vocab_size, 256; choose an id below it"),
        (["model.stop_ids=[1, 999]"], "'model.stop_ids': token 999 is outside random_weights.vocab_size, 256; choose an id below it"),
        (["model.pad_id=999"], "'model.pad_id': token 999 is outside random_weights.vocab_size, 256; choose an id below it"),
        (["model.family=sdar", "model.mask_id=null"],
         "'model.mask_id': token 151669 is outside random_weights.vocab_size, 256; choose an id below it"),
        (["model.random_weights.num_kv_heads=3"],
         "'model.random_weights.num_kv_heads': 3 does not divide num_heads, 4; choose a divisor"),
        (["model.random_weights.hidden_size=66"],
         "'model.random_weights.num_heads': 4 does not divide hidden_size, 66; add head_dim"),
        (["model.random_weights.head_dim=3"],
         "'model.random_weights.head_dim': heads are of odd size, which rotary positions cannot be; make it even"),
        (["eval.budgets=[64, 16, 16]"], "'eval.budgets': not ascending; write [16, 64]"),
        (["data.sources.0={kind: retrieval, path: x, needles: [5, 2]}"],
         "'data.sources[0].needles': fewest, 5, is more than most, 2; write [2, 5]"),
        (["data.sources.0={kind: retrieval, path: x, questions: [5, 2]}"],
         "'data.sources[0].questions': fewest, 5, is more than most, 2; write [2, 5]"),
        (["objective.diffusion.weight=0"],
         "'objective.diffusion.weight': every term has weight 0, so nothing would be learnt; raise one"),
        (["objective.query_alignment={weight: 1, skip_layers: 4}"],
         "'objective.query_alignment.skip_layers': 4 leaves none of the model's 4 layers; write less than 4"),
        (["objective.attention_alignment={weight: 1, skip_layers: 9}"],
         "'objective.attention_alignment.skip_layers': 9 leaves none of the model's 4 layers; write less than 4"),
        (["objective.sparse_distillation={weight: 1, budget: 8, dense_layers: 4}"],
         "'objective.sparse_distillation.dense_layers': 4 leaves none of the model's 4 layers; write less than 4"),
        (["eval.dense_layers=4"], "'eval.dense_layers': 4 leaves none of the model's 4 layers; write less than 4"),
    ],
)  # fmt: skip
def test_contradiction(fails, overrides: list[str], problem: str) -> None:
    assert fails(GOOD, *overrides).split("key ", 1)[1] == problem


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_goes_by_its_name(name: str, tmp_path: Path) -> None:
    recipe = load(GOOD, f"model={{random_weights: {name}}}", folder=tmp_path)
    assert recipe.model.random_weights == RandomWeights(**PUBLISHED[name].sizes)
    assert recipe.model.family == PUBLISHED[name].family
    (tmp_path / "again.yaml").write_text(resolved_yaml(recipe))  # whole, so that it says what was trained
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert load(GOOD, f"model={{family: sdar, random_weights: {name}}}", folder=tmp_path).model.family == "sdar"


def test_a_shape_of_another_name_is_refused(fails) -> None:
    line = fails(GOOD, "model={random_weights: 7c}")
    known = "7b, 1.5b, sdar-8b, sdar-1.7b, smollm2-135m"
    assert line.endswith(f"key 'model.random_weights': unknown value '7c'; Write one of {known}")
    options = json_schema()["$defs"]["Model"]["properties"]["random_weights"]["anyOf"]
    assert {"enum": list(PUBLISHED), "type": "string"} in options


def test_contradiction_names_the_line(fails) -> None:
    text = GOOD + "train:\n  checkpointing: reentrant\nobjective: {query_alignment: {weight: 1}}\n"
    assert fails(text).startswith(f"r.yaml:{LAST + 2}: key 'train.checkpointing'")
    assert fails(GOOD.replace("length: 64", "length: 65")).startswith("r.yaml:10: key 'data.length'")


def test_what_only_looks_contradictory_is_allowed(tmp_path: Path) -> None:
    for overrides in (
        ["train.checkpointing=reentrant"],  # the diffusion loss alone loses nothing
        ["objective.query_alignment.skip_layers=9"],  # the term is off
        ["objective.sparse_distillation.budget=999"],
        ["model.random_weights.vocab_size=264", "model.mask_id=null", "model.stop_ids=null"],  # the byte tokenizer's
        ["model.random_weights=null", "model.path=some/model", "model.mask_id=null"],  # its config may tell
        [
            "model.family=sdar",
            "model.random_weights=null",
            "model.path=x/y",
            "model.stop_ids=null",
            "model.pad_id=151643",
        ],
    ):
        load(GOOD, *overrides, folder=tmp_path)


# --- overrides ---------------------------------------------------------------------------------------------------


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        GOOD,
        "train.learning_rate=1e-5",
        "train.betas=[0.8, 0.9]",
        "data.sources.0.path=a=b.txt",
        "data.sources[0].share=2.0",
        "objective.query_alignment.weight=1",
        "seed=1",
        "seed=2",
        folder=tmp_path,
    )
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.betas == (0.8, 0.9)
    assert recipe.data.sources[0].path == "a=b.txt"
    assert recipe.data.sources[0].share == 2.0
    assert recipe.objective.query_alignment.weight == 1.0
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=1", "--set train.lr=1: key 'train.lr': unknown key; did you mean 'train.learning_rate'? Rename or remove it"),
        ("trian.steps=1", "--set trian.steps=1: key 'trian': unknown key; did you mean 'train'? Rename or remove it"),
        ("train.steps", "--set train.steps: not of the form KEY=VALUE; write for example train.steps=100"),
        ("=1", "--set =1: not of the form KEY=VALUE; write for example train.steps=100"),
        ("a..b=1", "--set a..b=1: not of the form KEY=VALUE; write for example train.steps=100"),
        ("train.steps=", "--set train.steps=: key 'train.steps': wrong type: got nothing; write a whole number"),
        ("train.steps=[1", "--set train.steps=[1: not valid YAML: expected ',' or ']', but got '<stream end>'; "
         "check indentation, colons, brackets and quotes here"),
        ("name.x=1", "--set name.x=1: key 'name': holds no keys; name the key itself"),
        ("data.sources.1.path=x", "--set data.sources.1.path=x: key 'data.sources[1]': a list of 1; its items are 0 to 0"),
        ("data.sources.path=x", "--set data.sources.path=x: key 'data.sources.path': a list of 1; its items are 0 to 0"),
        ("train.steps=x", "--set train.steps=x: key 'train.steps': wrong type: got 'x'; write a whole number"),
    ],
)  # fmt: skip
def test_bad_override(fails, override: str, line: str) -> None:
    assert fails(GOOD, override) == line


def test_override_section() -> None:
    assert override_section(Eval(), ["budgets=[4, 8]", "eval.context=64"]) == Eval(budgets=[4, 8], context=64)
    with pytest.raises(RecipeError, match=r"^--set budget=3: key 'budget': unknown key; did you mean 'budgets'\?"):
        override_section(Eval(), ["budget=3"])
    with pytest.raises(RecipeError, match=r"^--set budgets=\[8, 4\]: key 'budgets': not ascending; write \[4, 8\]$"):
        override_section(Eval(), ["budgets=[8, 4]"])


# --- paths -------------------------------------------------------------------------------------------------------


def test_paths_inside_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "recipes", tmp_path / "here"
    for file in (home / "both.txt", here / "both.txt", here / "only.txt"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    monkeypatch.chdir(here)

    def path(value: str, *overrides: str) -> str:
        return load(GOOD.replace("corpus.txt", value), *overrides, folder=home).data.sources[0].path

    assert path("both.txt") == str(home / "both.txt")
    assert path("only.txt") == str(here / "only.txt")
    assert path("'*.txt'") == str(home / "*.txt")
    assert path("owner/name") == "owner/name"
    assert path("./new.txt") == str(home / "new.txt")
    assert path("../here/only.txt") == str(here / "only.txt")
    assert path(str(here / "only.txt")) == str(here / "only.txt")
    assert path("x", "data.sources.0.path=both.txt") == str(here / "both.txt")
    assert path("x", "data.sources.0.path=./new.txt") == str(here / "new.txt")


def test_every_path_of_a_recipe_is_resolved(tmp_path: Path) -> None:
    for name in ("m", "a", "t.txt", "corpus.txt"):
        (tmp_path / name).touch()
    recipe = load(
        GOOD + "adapter: {init_from: a}\neval: {text: t.txt}\noutput: a\n",
        folder=tmp_path,
    )
    assert recipe.adapter.init_from == str(tmp_path / "a")
    assert recipe.eval.text == str(tmp_path / "t.txt")
    assert recipe.data.sources[0].path == str(tmp_path / "corpus.txt")
    assert recipe.output == "a"  # against the current directory, by whoever writes there


# --- writing, schema, shipped recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_load_and_round_trip(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert load(resolved_yaml(recipe), folder=tmp_path) == recipe


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_say_how_to_run_them(file: Path) -> None:
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"recipes/{file.name}" in header
    for fact in ("Hardware: ", "Time: "):
        assert fact in header
    assert file.stem == "debug" or "Result: " in header


@given(
    rate=st.floats(1e-300, 1e300),
    name=st.text(string.ascii_letters + string.digits, min_size=1),
    path=st.text(min_size=1),
)
def test_any_value_round_trips(tmp_path_factory: pytest.TempPathFactory, rate: float, name: str, path: str) -> None:
    plain = load(GOOD, folder=tmp_path_factory.getbasetemp()).model_dump()
    plain["train"]["learning_rate"], plain["name"], plain["model"]["revision"] = rate, name, path
    recipe = Recipe.model_validate(plain)
    try:
        again = load(resolved_yaml(recipe), folder=tmp_path_factory.getbasetemp())
    except UnicodeEncodeError:  # a lone surrogate, which no file can hold
        return
    assert again == recipe


def dotted_keys(schema: type[Section] = Recipe, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every key of a recipe with text source, for the typo test."""
    found: list[tuple[str | int, ...]] = []
    for name, field in schema.model_fields.items():
        found.append((*prefix, name))
        if name == "sources":
            found += dotted_keys(TextSource, (*prefix, name, 0))
            continue
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                found += dotted_keys(part, (*prefix, name))
    return found


@st.composite
def typos(draw: st.DrawFn) -> tuple[tuple[str | int, ...], str]:
    """A valid key and the same with one letter added, left out or replaced."""
    path = draw(st.sampled_from(dotted_keys()))
    key = str(path[-1])
    at = draw(st.integers(0, len(key)))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    wrong = draw(
        st.sampled_from([key[:at] + letter + key[at:], key[:at] + key[at + 1 :], key[:at] + letter + key[at + 1 :]])
    )
    return path, wrong


@given(typos())
def test_any_typo_names_the_right_key(tmp_path_factory: pytest.TempPathFactory, typo: tuple[Any, str]) -> None:
    path, wrong = typo
    folder = tmp_path_factory.getbasetemp()
    plain = load(GOOD, folder=folder).model_dump()
    section: Any = plain
    for part in path[:-1]:
        if section[part] is None:
            section[part] = {}
        section = section[part]
    if not wrong or wrong in section:
        return
    section[wrong] = section.pop(path[-1])
    file = folder / "typo.yaml"
    file.write_text(json.dumps(plain))  # JSON is YAML
    right = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert f"unknown key; did you mean '{right}'? Rename or remove it" in str(caught.value)


def test_every_field_has_a_sentence_in_the_schema() -> None:
    schema = json_schema()
    json.dumps(schema)
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        for key, field in section["properties"].items():
            # (pydantic leaves out a description that repeats the section's own)
            assert key == "kind" or "$ref" in field or field["description"].endswith("."), f"{name}.{key}"


def test_families_are_those_of_the_package() -> None:
    choices = json_schema()["$defs"]["Model"]["properties"]["family"]["anyOf"]
    assert set(choices[0]["enum"]) == set(FAMILIES)


def test_errors_do_not_hide_behind_each_other(fails) -> None:
    """An unknown key is reported before the required one it should have been."""
    assert (
        fails(GOOD.replace("data:", "dta:"))
        == "r.yaml:9: key 'dta': unknown key; did you mean 'data'? Rename or remove it"
    )
