"""An adapter merged into its base: a checkpoint that whoever loads the base can load in its place.

It mirrors the base file by file: the same names of files and tensors, each tensor in its own precision, the authors'
config.json (plus the family facts, for `load_backbone`), their remote code, tokenizer and licence. The official code
therefore loads it as it loads the base. The merge itself is done in float32, whatever the adapter was trained on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from mage_tune.backbone import FAMILY_FILE, family_facts, load_backbone, read_family
from mage_tune.families import Family
from mage_tune.lm import adapter_folder
from mage_tune.publish.contents import CONFIG, TOKENIZER, WEIGHTS

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
BESIDE = ("*.py", "generation_config.json", "LICENSE*", "NOTICE*", *TOKENIZER)
"""What the base's authors put beside weights and config.json; copied and never run."""

MOST_LOST = 0.5
"""Mean difference between merged and attached logits, as a share of what the adapter changes, at which to refuse."""

NOTHING = 1e-4
"""Mean change of the logits below which an adapter counts as untrained, so that there is nothing to lose in a merge."""


def merge(adapter: str | Path, out: str | Path, base: str | None = None) -> Path:
    """Merge an adapter into its base in float32 and save a checkpoint in the base's own layout and precision.

    merge.json beside the weights says how far the logits of the saved checkpoint are from the attached adapter.

    Args:
        adapter: adapter or run folder, or an adapter's Hub id.
        out: folder to write; it appears whole or not at all.
        base: base checkpoint, folder or Hub id; the adapter's own record by default.

    Raises:
        ValueError: `out` exists, the adapter does not say its family, the base is stored quantised, or rounding to the
            base's precision would lose what was trained.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another folder or remove it")
    found = adapter_folder(str(adapter))
    if found is None:
        raise ValueError(f"{adapter}: no {CONFIG} there, so it is no adapter")
    adapter, family = found, read_family(found)
    if family is None:
        raise ValueError(f"{adapter}: no {FAMILY_FILE} beside the adapter, so its family is unknown")
    recorded = json.loads((adapter / CONFIG).read_text())
    home = base_folder(base) if base else base_folder(recorded["base_model_name_or_path"], recorded.get("revision"))
    config = published_config(home, family)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}-{os.getpid()}")
    temporary.mkdir()
    try:
        probe = probe_tokens(config["vocab_size"], family)
        expected, untuned = write_merged_weights(home, adapter, family, temporary, probe)
        gc.collect()  # the float32 copy, before the saved one is loaded
        for beside in (home, adapter):  # the run's tokenizer, where it has one of its own, in place of the base's
            for file in [file for pattern in BESIDE for file in beside.glob(pattern)]:
                shutil.copy(file, temporary / file.name)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        report = {
            "merged_in": "float32",
            "saved_in": precision(temporary),
            "tokens": probe.numel(),
            **compare(temporary, probe, expected, untuned),
            "adapter_sha256": hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest(),
        }
        (temporary / "merge.json").write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def base_folder(base: str, revision: str | None = None) -> Path:
    """A base checkpoint's folder, downloaded when it is a Hub id; only files that a merge needs."""
    if Path(base).is_dir():
        return Path(base)
    return Path(
        snapshot_download(base, revision=revision, allow_patterns=["config.json", "*.safetensors", INDEX, *BESIDE])
    )


def published_config(base: Path, family: Family) -> dict[str, Any]:
    """The base's config.json as its authors wrote it, with the family facts of the adapter.

    Raises:
        ValueError: the base is stored quantised.
    """
    config, _ = PreTrainedConfig.get_config_dict(base)
    if quantised := config.get("quantization_config"):
        raise ValueError(
            f"{base}: stored quantised ({quantised.get('quant_method', 'unknown method')}), and a merge needs full "
            "precision; name the checkpoint it was made from (--base)"
        )
    plain = {key: value for key, value in config.items() if key not in ("_commit_hash", "_attn_implementation")}
    if plain.get("bd_size"):  # what the official code of Fast-dLLM v2 calls the block size
        plain["bd_size"] = family.block_size
    return plain | {"mage_tune": family_facts(family)}


def probe_tokens(vocab_size: int, family: Family) -> Tensor:
    """(1, 4 blocks) random tokens, a quarter of them masks, as the model sees them in use."""
    tokens = torch.randint(vocab_size, (1, 4 * family.block_size), generator=torch.Generator().manual_seed(0))
    assert family.mask_id is not None  # an adapter's family facts are whole
    tokens[:, ::4] = family.mask_id
    return tokens


@torch.no_grad()
def write_merged_weights(base: Path, adapter: Path, family: Family, out: Path, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Write the merged weights into `out`, file for file as in `base`.

    Returns:
        Logits of `probe` with the adapter attached, and those of the untuned base.

    Raises:
        ValueError: the base's files know a weight by another name than the model.
    """
    backbone = load_backbone(str(base), family=family, dtype="float32", device="cpu")
    untuned = backbone.model(input_ids=probe).logits
    attached = PeftModel.from_pretrained(backbone.model, str(adapter)).eval()
    expected = attached(input_ids=probe).logits
    state: dict[str, Tensor] = attached.merge_and_unload().state_dict()
    written: set[int] = set()
    for file in weight_files(base):
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no dictionary)
            metadata = stored.metadata()
        written |= {state[name].data_ptr() for name in tensors if name in state}
        merged = {name: state[name].to(t.dtype).contiguous() if name in state else t for name, t in tensors.items()}
        save_file(merged, out / file.name, metadata=metadata)
        shutil.copymode(file, out / file.name)  # safetensors lets nobody else read what it writes
    lost = [name for name, tensor in state.items() if tensor.data_ptr() not in written]  # a tied head is written once
    if lost:
        raise ValueError(
            f"{base}: its files call the weight {lost[0]} by another name, so it cannot be merged into them"
        )
    if (base / INDEX).is_file():
        shutil.copy(base / INDEX, out / INDEX)
    return expected, untuned


def weight_files(base: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by its index where it has one."""
    if not (base / INDEX).is_file():
        return [base / WHOLE]
    return [base / name for name in sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))]


def precision(folder: Path) -> str:
    """The precision that most of a checkpoint's numbers are stored in."""
    count: dict[str, int] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = stored.get_tensor(name)
                kind = str(tensor.dtype).removeprefix("torch.")
                count[kind] = count.get(kind, 0) + tensor.numel()
    return max(count, key=lambda kind: count[kind])


@torch.no_grad()
def compare(saved: Path, probe: Tensor, expected: Tensor, untuned: Tensor) -> dict[str, float]:
    """How far the logits of a saved checkpoint are from the attached adapter's, beside what the adapter itself changes.

    Raises:
        ValueError: too much of what the adapter changes is lost.
    """
    found = load_backbone(str(saved), dtype="float32", device="cpu").model(input_ids=probe).logits
    difference, effect = (found - expected).abs(), (expected - untuned).abs()
    if not difference.mean() <= max(MOST_LOST * effect.mean().item(), NOTHING):
        raise ValueError(
            f"the merged checkpoint is {difference.mean():.3g} from the attached adapter (mean over logits), which "
            f"itself changes them by {effect.mean():.3g}: rounding to the base's precision loses what was trained; "
            "publish the adapter instead"
        )
    return {
        "max_logit_difference": difference.max().item(),
        "mean_logit_difference": difference.mean().item(),
        "mean_adapter_effect": effect.mean().item(),
    }
