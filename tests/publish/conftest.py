"""A fake Hub, a process that publishes to it, and finished runs to publish."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mage_tune.backbone import load_backbone, write_family
from mage_tune.environment import environment
from mage_tune.evals.run import evaluate
from tests.publish.fake_hub import CARD, TOKEN, FakeHub

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where the tests of this folder are named on the command line, which is how maintainers use it."""
    parser.addoption("--live-hub", metavar="NAMESPACE", help="publish to the real Hub, in this namespace")


DRIVER = """
import contextlib, io, json, sys, time
time.sleep = lambda seconds: None  # the client's pauses between its own tries
from mage_tune.cli import main
from mage_tune.publish import hub
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments, hub.PATIENCE = json.loads(line)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as done:
            code = done.code or 0
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=sys.__stdout__, flush=True)
"""
"""The command over and over in one process, as importing torch takes longer than publishing a tiny run."""


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Client:
    """A process of its own, with its own home, cache, token and endpoint."""

    def __init__(self, url: str | None, home: Path, **settings: str) -> None:
        home.mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.environment = kept | {
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            **({"HF_ENDPOINT": url} if url else {}),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            **settings,
        }
        self.home = home
        self.driver: subprocess.Popen[str] | None = None

    def python(self, code: str) -> str:
        """A clean process; its standard output."""
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *arguments: str, patience: float = 60.0) -> Done:
        """The command in the client's one long-lived process; `patience`: seconds to wait for an answer."""
        if self.driver is None:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER],
                cwd=self.home,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(json.dumps([arguments, patience]) + "\n")
        self.driver.stdin.flush()
        return Done(*json.loads(self.driver.stdout.readline()))

    def close(self) -> None:
        if self.driver is not None:
            self.driver.stdin.close()
            self.driver.wait(timeout=30)
            self.driver.stdout.close()


@pytest.fixture(scope="session")
def server():
    hub = FakeHub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def secret_home(tmp_path_factory) -> Path:
    """A home whose name must never be published."""
    return tmp_path_factory.mktemp("home") / "alice-at-acme"


@pytest.fixture(scope="session")
def client(server, secret_home):
    started = Client(server.url, secret_home)
    yield started
    started.close()


@pytest.fixture
def live_client(request, secret_home):
    """A process that speaks to the real Hub, as the user of HF_TOKEN."""
    if request.config.getoption("--live-hub", default=None) is None:
        pytest.skip("needs --live-hub NAMESPACE and HF_TOKEN")
    started = Client(None, secret_home / "live", HF_TOKEN=os.environ["HF_TOKEN"], HF_HUB_DISABLE_XET="0")
    yield started
    started.close()


@pytest.fixture(scope="session")
def base(secret_home, client, tiny_backbone, converted_checkpoint) -> Path:
    """A tiny model that reads and writes bytes."""
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1024)
    return converted_checkpoint(backbone).rename(secret_home / "base")


@pytest.fixture
def hub(server, base) -> FakeHub:
    """A Hub that holds the base model and nothing else."""
    server.reset()
    server.seed("me/base", base, CARD)
    return server


RECIPE = """\
name: tiny
output: {home}/runs/tiny
model: {{path: {base}}}
data:
  length: 64
  sources:
    - {{kind: text, path: {home}/heldout.jsonl}}
    - {{kind: text, path: someone/some-text}}
eval: {{text: {home}/heldout.jsonl}}
"""
SETTINGS = ["context=768", "documents=2", "blocks=1", "budgets=[8,32]", "dense_layers=1", "needles=0"]


@pytest.fixture(scope="session")
def make_run(secret_home, tiny_adapter):
    """make_run(name, base) -> an unevaluated run folder, with what must never be published lying in it."""

    def make(name: str, base: Path, **options) -> Path:
        folder = secret_home / "runs" / name
        backbone = load_backbone(str(base), dtype="float32", device="cpu")
        tiny_adapter(backbone, **options).save_pretrained(folder)
        (folder / "README.md").unlink()
        write_family(folder, backbone.family)
        sentences = [f"This is sentence {i} of the held-out text.\n" for i in range(200)]
        (secret_home / "heldout.jsonl").write_text(json.dumps({"text": "".join(sentences)}) + "\n")
        (folder / "recipe.yaml").write_text(RECIPE.format(base=base, home=secret_home))
        (folder / "versions.json").write_text(json.dumps(environment()))
        line = {"step": 1, "loss": 3.5, "tokens_per_s": 100.0, "step_s": 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        checkpoint = folder / "checkpoints" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        for unwanted in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
            (checkpoint / unwanted).write_bytes(b"\x80pickle")
            (folder / unwanted).write_bytes(b"\x80pickle")
        return folder

    return make


@pytest.fixture(scope="session")
def unevaluated(make_run, base) -> Path:
    """A finished run that was never evaluated."""
    return make_run("unevaluated", base)


@pytest.fixture(scope="session")
def run_folder(make_run, base) -> Path:
    """A finished, evaluated run."""
    folder = make_run("tiny", base)
    evaluate(str(folder), overrides=SETTINGS)
    return folder
