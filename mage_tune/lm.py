"""The Python surface: load a block-diffusion LM, read its logits, write text with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor, nn

from mage_tune.backbone import (
    FAMILY_FILE,
    Backbone,
    hidden_states,
    load_backbone,
    output_head,
    read_family,
    resolve_device,
    resolve_dtype,
)
from mage_tune.families import Family
from mage_tune.streams import RowStreams, StreamAttention

if TYPE_CHECKING:
    from mage_tune.decode.generate import Generation

CONFIG = "adapter_config.json"
"""Its presence makes a folder or repository an adapter."""


class BlockDiffusionLM:
    """A block-diffusion language model: `model` (transformers or PEFT), `tokenizer` or None, `family`."""

    def __init__(self, model: nn.Module, tokenizer: Any | None, family: Family) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.family = family

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits of clean tokens under the block-causal mask.

        Args:
            input_ids: (batch, n) int64, n a whole number of blocks.

        Returns:
            (batch, n, vocab) as the output head gives them, without any token shift.

        Raises:
            ValueError: n is not a whole number of blocks.
        """
        input_ids = input_ids.to(self.device)
        batch, length = input_ids.shape
        streams = RowStreams(length, self.family.block_size, noisy=0)
        positions = torch.arange(length, device=self.device).expand(batch, -1)
        hidden = hidden_states(self.model, input_ids, positions, StreamAttention(streams).attend)
        return output_head(self.model)(hidden)

    def generate(self, prompt: Any, *, fast: bool = False, **options: Any) -> Generation:
        """Write a continuation block by block; see `mage_tune.decode.generate.generate` for the options.

        Args:
            prompt: ids, text, chat messages, or a batch of them.
            fast: by the decode engine (kernels and CUDA graphs; greedy; the weights are copied), the same text up to
                rounding; see `mage_tune.decode.engine.generate.generate` for its options.
            options: of one or the other.

        Raises:
            ValueError: a prompt or option that cannot work.
        """
        if fast:
            from mage_tune.decode.engine.generate import generate as generate_fast

            return generate_fast(self, prompt, **options)
        from mage_tune.decode.generate import generate

        return generate(self, prompt, **options)


def load(
    path: str | Path,
    family: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    block_size: int | None = None,
    mask_id: int | None = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
) -> BlockDiffusionLM:
    """Load a block-diffusion LM as published: a Hub-style folder or a Hub id, with or without an adapter.

    Adapters stack: when the base of an adapter is an adapter itself (a conversion, say), that one is merged into its
    own base in float32 first, in memory.

    Args:
        path: checkpoint folder or Hub id; or an adapter's (a run folder, say), whose own record then names the base.
        family: "fast_dllm_v2", "sdar" or "converted"; guessed from config.json, or from the adapter, when None.
        adapter: adapter folder or Hub id, attached unmerged.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", ...
        revision: Hub revision of what `path` names.
        block_size, mask_id, stop_ids, pad_id: facts that hub configs may omit.

    Raises:
        ValueError: the family or one of its facts cannot be told, or an adapter does not name its base.
        OSError: no such folder or repository.
    """
    if adapter is not None:
        adapter = adapter_folder(str(adapter)) or adapter
    elif (found := adapter_folder(str(path), revision)) is not None:
        adapter = found
        path, revision = base_of(found)
    facts: dict[str, Any] = dict(block_size=block_size, mask_id=mask_id, stop_ids=stop_ids, pad_id=pad_id)
    record: str | Family | None = family
    known = read_family(adapter) if adapter is not None and family is None else None
    if known is not None:
        record = known
        # What the adapter was trained with wins over the checkpoint's config, and the caller over both.
        facts = {name: getattr(known, name) if fact is None else fact for name, fact in facts.items()}
    if adapter is not None and adapter_folder(str(path), revision) is not None:
        lower = merged_in_memory(load(path, family, dtype="float32", device="cpu", revision=revision))
        target = resolve_device(device)
        lower.model.to(device=target, dtype=resolve_dtype(dtype, target))  # type: ignore[call-arg]
        backbone = Backbone(lower.model, lower.tokenizer, (known or lower.family).with_overrides(**facts))
    else:
        backbone = load_backbone(str(path), family=record, revision=revision, dtype=dtype, device=device, **facts)
    return from_backbone(backbone, adapter)


def merged_in_memory(lm: BlockDiffusionLM) -> Backbone:
    """The backbone of a model with an adapter attached, the adapter now part of its weights."""
    model: Any = lm.model
    return Backbone(model.merge_and_unload(), lm.tokenizer, lm.family)


def adapter_folder(path: str, revision: str | None = None) -> Path | None:
    """The local folder of an adapter given as a folder or Hub id; None when `path` names something else."""
    if Path(path).is_dir():
        return Path(path) if (Path(path) / CONFIG).is_file() else None
    try:
        config = hf_hub_download(path, CONFIG, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return None  # a checkpoint, or nothing at all, which loading it will say
    snapshot_download(path, revision=revision, allow_patterns=["adapter_model.safetensors", FAMILY_FILE])
    return Path(config).parent


def base_of(adapter: Path) -> tuple[str, str | None]:
    """Path or Hub id, and revision, of the base that an adapter was trained on.

    Raises:
        ValueError: the adapter does not say.
    """
    config = json.loads((adapter / CONFIG).read_text())
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"{adapter}: the adapter does not name its base model; load the base with adapter=")
    return config["base_model_name_or_path"], config.get("revision")


def from_backbone(backbone: Backbone, adapter: str | Path | None = None) -> BlockDiffusionLM:
    """Wrap a loaded backbone, with an adapter attached when one is named."""
    model: nn.Module = backbone.model
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(backbone.model, str(adapter)).eval()
    return BlockDiffusionLM(model, backbone.tokenizer, backbone.family)
