"""The command line: quick help, one-line errors with exit code 2, verbs that call what they should."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mage_tune.cli import describe_error, find_recipe, main, shipped_recipes
from mage_tune.recipe import Recipe, RecipeError, load_recipe

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The real command in a fresh process."""
    command = [sys.executable, "-m", "mage_tune.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=120, check=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """The command in this process: (exit code, stdout, stderr)."""

    def run_here(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run_here


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """fake("mage_tune.run", train=...) stands in for a heavy module."""

    def replace(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return replace


@pytest.mark.parametrize("verb", [[], ["train"], ["eval"], ["generate"], ["merge"], ["recipes"], ["doctor"]])
def test_help(call, verb: list[str]) -> None:
    code, out, _ = call(*verb, "--help")
    assert code == 0
    assert "Usage: mage-tune" in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom mage_tune.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60)


def test_dry_run_imports_nothing_heavy_and_prints_a_recipe_that_loads(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom mage_tune.cli import main\n"
        "try: main(['train', 'debug', '--dry-run', '--set', 'train.steps=3'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60
    )
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = load_recipe(tmp_path / "again.yaml")
    assert again.train.steps == 3
    assert again == load_recipe(ROOT / "recipes" / "debug.yaml", ["train.steps=3"])


def test_version(call) -> None:
    code, out, _ = call("--version")
    assert code == 0
    assert out.strip().count(".") == 2


# --- errors ------------------------------------------------------------------------------------------------------


def test_recipe_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\ntrain:\n  lr: 1e-4\n")
    done = run("train", "bad.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: bad.yaml:3: key 'train.lr': unknown key; did you mean 'train.learning_rate'? Rename or remove it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["train", "nope"], "error: nope: no such file or shipped recipe; shipped are 1.5b, 7b, debug, "),
        (["train", "recipes/debgu.yaml"], "error: recipes/debgu.yaml: no such recipe; did you mean"),
        (["train", "debug", "--dry-run", "--set", "train.stesp=1"], "error: --set train.stesp=1: key 'train.stesp': "),
        (["recipes", "show", "nope"], "error: nope: no such file or shipped recipe"),
    ],
)
def test_errors_for_people(call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], start: str) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(start)
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["train"], ["train", "debug", "--nope"], ["nope"], ["merge", "x"]])
def test_wrong_usage_is_exit_code_2(call, arguments: list[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Usage: mage-tune" in err


def test_debug_shows_the_traceback(fake) -> None:
    def train(recipe: Recipe, **given: Any) -> Path:
        raise ValueError("from inside")

    fake("mage_tune.watch", Samples=None, ideal_step_s=lambda recipe: None)
    fake("mage_tune.run", train=train)
    with pytest.raises(ValueError, match="from inside"):
        main(["train", "debug", "--debug"])


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (RecipeError("r.yaml:1: bad"), "r.yaml:1: bad", 2),
        (ValueError("two\n  lines"), "two lines", 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "[Errno 2] No such file: 'x'", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full ([Errno 28] No space left on device); "
         "free some space and run the same command again", 2),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full (I/O error: No space left "
         "on device (os error 28)); free some space and run the same command again", 2),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"),
         "out of GPU memory; lower train.rows or data.length, or set train.checkpointing=non_reentrant", 2),
        (TypeError("oops"), "unexpected TypeError: oops (--debug shows where; please report it)", 1),
    ],
)  # fmt: skip
def test_describe_error(error: Exception, line: str, code: int) -> None:
    assert describe_error(error) == (line, code)


def test_interrupt(call, fake) -> None:
    def train(recipe: Recipe, **given: Any) -> Path:
        raise KeyboardInterrupt

    fake("mage_tune.watch", Samples=None, ideal_step_s=lambda recipe: None)
    fake("mage_tune.run", train=train)
    code, out, err = call("train", "debug")
    assert (code, out) == (130, "")
    assert err == "interrupted\n"


def test_one_of_several_processes_says_which_it_is(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("train", "nosuch.yaml")[2].startswith("\nrank 1 of 2: error: nosuch.yaml: no such recipe")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call("train", "nosuch.yaml")[2].startswith("error: nosuch.yaml")


# --- verbs -------------------------------------------------------------------------------------------------------


def test_train(call, fake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    fake("mage_tune.watch", Samples=None, ideal_step_s=lambda recipe: None)
    fake("mage_tune.run", train=lambda recipe, **given: seen.append(recipe) or Path("runs/x"))
    code, out, _ = call("train", "smollm2-135m", "--set", "train.steps=3", "--set", "seed=9")
    assert code == 0
    assert out == "adapter written to runs/x; prove it with: mage-tune eval runs/x\n"
    assert (seen[0].train.steps, seen[0].seed) == (3, 9)
    assert call("train", "debug")[1].startswith("adapter of RANDOM WEIGHTS written to runs/x: ")  # and no advice
    monkeypatch.setenv("RANK", "1")  # one of several processes of a launcher
    assert call("train", "debug")[1] == ""


def test_eval(call, fake) -> None:
    seen: dict[str, Any] = {}
    fake("mage_tune.evals.run", evaluate=lambda target, **options: seen.update(options, target=target) or {})
    assert call("eval", "some/model", "--adapter", "a", "--set", "questions=2")[0] == 0
    assert seen == {"target": "some/model", "adapter": "a", "overrides": ["questions=2"], "suite": None}
    assert call("eval", "some/model", "--suite", "quick")[0] == 0
    assert seen["suite"] == "quick"
    code, _, err = call("eval")
    assert (code, err.count("\n")) == (2, 1) and "name a run folder or model" in err


def test_suites_are_listed_and_printed(call) -> None:
    code, out, _ = call("eval", "--list-suites")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["quick", "standard", "full"]
    assert call("eval", "--print-suite", "quick")[1].startswith("# A few minutes")
    code, _, err = call("eval", "--print-suite", "quik")
    assert code == 2 and "did you mean 'quick'" in err
    code, _, err = call("eval", "--compare", "nowhere", "elsewhere")
    assert code == 2 and "nowhere: no results there" in err


def test_merge(call, fake, tmp_path: Path) -> None:
    seen = []
    fake("mage_tune.publish.merge", merge=lambda *arguments: seen.append(arguments) or arguments[1])
    code, out, _ = call("merge", "run", "--out", str(tmp_path / "new"), "--base", "b")
    assert (code, out) == (0, f"merged checkpoint written to {tmp_path / 'new'}\n")
    assert seen == [("run", tmp_path / "new", "b")]
    code, _, err = call("merge", "run", "--out", str(tmp_path))
    assert (code, err) == (2, f"error: {tmp_path}: exists already; choose another folder or remove it\n")


def test_generate(call, fake, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[Any] = []
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")

    def write(prompt: Any, **options: Any) -> SimpleNamespace:
        prompts.append(prompt)
        forwards = {"prefill": 1, "exact": 5, "sparse": 0, "commit": 2}
        return SimpleNamespace(text="hello", tokens=[1] * 40, blocks=2, forwards=forwards)

    lm = SimpleNamespace(tokenizer=tokenizer, generate=write)
    fake("mage_tune.lm", load=lambda path, **options: lm)
    code, out, err = call("generate", "m", "hi")
    assert (code, out) == (0, "hello\n")
    assert err == "40 tokens in 2 blocks; forwards: 1 prefill, 5 exact, 2 commit\n"
    call("generate", "m", "hi", "--raw")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: "from a pipe"))
    call("generate", "m", "-")
    assert prompts == [[{"role": "user", "content": "hi"}], "hi", [{"role": "user", "content": "from a pipe"}]]
    assert call("generate", "m", "")[2] == "error: empty prompt; say something\n"
    lm.tokenizer = None
    assert call("generate", "m", "hi")[2] == "error: m: comes without a tokenizer, so it cannot read text\n"


def test_recipes_list_and_show(call) -> None:
    _, out, _ = call("recipes", "list")
    for file in shipped_recipes():
        assert file.stem in out
    assert call("recipes", "show", "debug")[1] == (ROOT / "recipes" / "debug.yaml").read_text()


def test_recipes_schema() -> None:
    done = run("recipes", "schema")
    schema = json.loads(done.stdout)
    assert schema["properties"]["train"]["$ref"] == "#/$defs/Train"
    assert done.returncode == 0


def test_recipes_schema_into_a_closed_pipe() -> None:
    command = f"{sys.executable} -m mage_tune.cli recipes schema | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


def test_recipes_copy_brings_the_data(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("recipes", "copy", "debug", str(tmp_path))
    assert code == 0
    assert out.splitlines() == [
        str(tmp_path / name) for name in ("debug.yaml", "data/debug-chat.jsonl", "data/debug-text.txt")
    ]
    monkeypatch.chdir("/")
    copied = load_recipe(tmp_path / "debug.yaml")
    assert [Path(source.path).is_relative_to(tmp_path) for source in copied.data.sources] == [True, True]
    code, _, err = call("recipes", "copy", "debug", str(tmp_path))
    assert (code, err) == (2, f"error: {tmp_path / 'debug.yaml'}: exists already; choose another folder or remove it\n")


def test_find_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("debug") == ROOT / "recipes" / "debug.yaml"
    (tmp_path / "debug").touch()  # a file of that name wins
    assert find_recipe("debug") == Path("debug")


def test_doctor() -> None:
    environment = os.environ | {
        "HF_TOKEN": "hf_secret",
        "HF_ENDPOINT": "http://user:secret@hub.invalid",
        "COLUMNS": "120",
    }
    command = [sys.executable, "-m", "mage_tune.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False)
    for what in ("python", "torch", "transformers", "disk, here", "Hub endpoint", "attention", "a tiny model answers"):
        assert what in done.stdout
    assert "hub.invalid (HF_ENDPOINT)" in done.stdout
    assert "present, not shown" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr


def test_doctor_reports_what_is_broken(call, fake) -> None:
    def broken() -> list[Any]:
        raise OSError("torn apart")

    from mage_tune import doctor

    found = doctor.run_check(broken)
    assert found == [doctor.Finding("broken", "OSError: torn apart", False)]
    fake("mage_tune.doctor", examine=lambda: found)
    code, out, err = call("doctor")
    assert (code, err) == (2, "error: not fit for use: broken\n")
    assert "torn apart" in out
