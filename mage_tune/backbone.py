"""From a checkpoint to a native transformers model with our attention hook, and the adapter on it.

The hook is one function registered with transformers' attention registry. Whoever calls the model decides what
attention means for that call by passing `attend`, a function (layer, q, k, v, scaling) -> output that sees post-RoPE
queries: training rows pass `StreamAttention.attend`, decoding a cache's. Without it the model is an ordinary causal LM.
No remote code is ever run: published checkpoints load into the native class of the same architecture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mage_tune.families import Family, apply_config, get_family, guess_family

ATTENTION = "mage"
"""Name of our attention function in transformers' registry."""

FAMILY_FILE = "mage_tune.json"
"""The family facts beside an adapter, so that it can be loaded and merged without a recipe."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (batch, heads, n, D) in, (batch, n, heads, D) out."""
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(module.layer_idx, query, key, value, scaling)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without an entry transformers would pass no mask at all


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
    """One forward pass whose attention is `attend`.

    Args:
        model: what `load_backbone` returned, bare, with adapters or inside a distributed wrapper.
        input_ids, position_ids: (batch, n) int64.
        attend: see the module's docstring.

    Returns:
        (batch, n, hidden) after the final norm; `output_head(model)` turns chosen rows into logits.
    """
    return model(input_ids=input_ids, position_ids=position_ids, attend=attend)


def output_head(model: nn.Module) -> nn.Module:
    """The output projection of a model, bare or with adapters."""
    return causal_lm(model).get_output_embeddings()


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside adapters and distributed wrappers."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if isinstance(model, PeftModel) else getattr(model, "module", None)
        if inner is None:
            raise TypeError(f"no transformers model inside {type(model).__name__}")
        model = inner
    return model


def _install_hook(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model(..., attend=...)` return hidden states instead of logits; everything else stays as it was.

    It has to be the model's own forward, because distributed wrappers only synchronise what runs inside it.
    """
    plain_forward = model.forward

    def forward(self: PreTrainedModel, *args: Any, attend: Attend | None = None, **kwargs: Any) -> Any:
        if attend is None:
            return plain_forward(*args, **kwargs)
        given = {name: value for name, value in kwargs.items() if value is not None}  # PEFT adds Nones of its own
        # A 4-D mask passes through transformers untouched, so no mask of row x row size is ever built.
        untouched = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        out = self.model(*args, attention_mask=untouched, attend=attend, use_cache=False, **given)
        return out.last_hidden_state

    model.forward = MethodType(forward, model)
    return model


@dataclass(frozen=True)
class Backbone:
    """A loaded checkpoint."""

    model: PreTrainedModel
    tokenizer: Any | None
    family: Family


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """A dtype by name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, name)


def resolve_device(name: str) -> torch.device:
    """A device by name; "auto" is the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def load_backbone(
    path: str,
    *,
    family: str | Family | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    quantise: str = "none",
    **facts: Any,
) -> Backbone:
    """Load a published or converted checkpoint (folder or Hub id) into its native transformers class.

    Args:
        path: folder or Hub id.
        family: a family's name or record; guessed from config.json when None.
        revision: Hub revision.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", ...
        quantise: "none", or "nf4": see `hold_in_nf4`.
        facts: overrides of family facts: block_size, mask_id, stop_ids, pad_id. None keeps the checkpoint's.

    Raises:
        ValueError: the family cannot be told, a fact is missing, the checkpoint does not match the architecture, or
            bitsandbytes is missing.
        OSError: no such folder or repository.
    """
    config_dict, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    if family is None:
        record = guess_family(config_dict)
    else:
        record = apply_config(get_family(family) if isinstance(family, str) else family, config_dict)
    device = resolve_device(str(device))
    architecture = record.architecture or _ARCHITECTURES.get(config_dict.get("model_type", ""))
    if architecture is None:
        raise ValueError(
            f"{path}: cannot load model_type {config_dict.get('model_type')!r} as family {record.name!r}: "
            f"supported architectures are {', '.join(_ARCHITECTURES)}"
        )
    model_class = getattr(transformers, architecture)
    config = model_class.config_class.from_dict(
        {k: v for k, v in config_dict.items() if k not in ("auto_map", "model_type", "architectures")}
    )
    config.architectures = [architecture]
    model, info = model_class.from_pretrained(
        path,
        config=config,
        revision=revision,
        dtype=resolve_dtype(dtype, device),
        attn_implementation=ATTENTION,
        use_safetensors=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = sorted(info["missing_keys"])[:3] or sorted(str(k) for k in info["mismatched_keys"])[:3]
        raise ValueError(f"{path}: weights do not fit {architecture}: missing or mismatched {', '.join(lost)} ...")
    tokenizer = load_tokenizer(path, config, revision)
    record = check_facts(record.with_overrides(**facts), config.vocab_size, path)
    if quantise == "nf4":
        hold_in_nf4(model, device)
    return Backbone(_install_hook(model.to(device).eval()), tokenizer, record)


def load_tokenizer(path: str, config: PreTrainedConfig, revision: str | None = None) -> Any | None:
    """The tokenizer saved with a checkpoint, or None when it has none.

    Raises:
        ValueError: there is one, and it does not load.
    """
    is_folder = Path(path).is_dir()
    if is_folder and not any(Path(path).glob("tokenizer*")):
        return None  # transformers would make an empty one up
    try:
        return AutoTokenizer.from_pretrained(path, config=config, revision=revision)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not is_folder:
            return None  # a repository without tokenizer files
        raise ValueError(f"{path}: its tokenizer does not load: {error}") from error


def random_backbone(
    shape: dict[str, Any],
    family: str | Family,
    *,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    quantise: str = "none",
    **facts: Any,
) -> Backbone:
    """A randomly initialised model: `shape` holds the fields of `recipe.RandomWeights`. Tokenizer: bytes.

    The weights of a seed are the same in every precision on a CPU; on a GPU they are drawn there, in their precision.

    Raises:
        ValueError: a family fact (mask id, stop id) is missing or outside the vocabulary, or bitsandbytes is missing.
    """
    target = resolve_device(device)
    architecture = _ARCHITECTURES[shape["architecture"]]
    model_class = getattr(transformers, architecture)
    heads = shape["num_heads"]
    config = model_class.config_class(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"] or shape["hidden_size"] // heads,
        max_position_embeddings=shape["max_positions"],
        tie_word_embeddings=shape["tie_embeddings"],
        attn_implementation=ATTENTION,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    record = get_family(family) if isinstance(family, str) else family
    tokenizer = None
    if shape["vocab_size"] >= 264:  # bytes and eight special tokens
        from mage_tune.data.tokenizer import byte_tokenizer

        tokenizer = byte_tokenizer()
        facts = {
            "mask_id": tokenizer.mask_token_id,
            "stop_ids": (tokenizer.eos_token_id,),
            "pad_id": tokenizer.pad_token_id,
        } | {name: fact for name, fact in facts.items() if fact is not None}
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        torch.manual_seed(seed)
        if target.type == "cpu":
            model = model_class(config).to(resolve_dtype(dtype, target))
        else:
            with target:
                model = model_class._from_config(config, dtype=resolve_dtype(dtype, target))
    record = check_facts(record.with_overrides(**facts), config.vocab_size, "random weights")
    if quantise == "nf4":
        hold_in_nf4(model, target)
    return Backbone(_install_hook(model.to(target).eval()), tokenizer, record)


def hold_in_nf4(model: PreTrainedModel, device: torch.device) -> None:
    """Hold the linear layers of every decoder layer in 4 bits (QLoRA: NF4, its scales quantised too).

    Layers go to the device one by one, so it never holds the model in its own precision.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError("model.quantise: nf4 needs bitsandbytes; pip install 'mage_tune[gpu]'") from error
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if type(linear) is not nn.Linear:
                continue
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            held = bnb.nn.Linear4bit(*sizes, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
            held.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=held
            )
            held.bias = linear.bias
            layer.set_submodule(name, held.to(device))
    # What PEFT asks before it puts adapters on such layers.
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def check_facts(family: Family, vocab_size: int, where: str) -> Family:
    """The family, if its ids are there and inside the vocabulary.

    Raises:
        ValueError: they are not; the message says which and what to do.
    """
    if family.mask_id is None:
        raise ValueError(f"{where}: the mask token's id is unknown: give mask_id")
    if not family.stop_ids:
        raise ValueError(f"{where}: no stop token is known: give stop_ids")
    if family.pad_id is None:
        family = family.with_overrides(pad_id=family.stop_ids[0])
    for name, token in [("mask_id", family.mask_id), *(("stop_ids", stop) for stop in family.stop_ids)]:
        if token not in range(vocab_size):
            raise ValueError(f"{where}: {name} {token} is outside the vocabulary of {vocab_size}")
    return family


def attach_adapter(
    backbone: Backbone,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    rslora: bool = False,
    dora: bool = False,
    train_mask_embedding: bool = False,
    init_from: str | None = None,
) -> PeftModel:
    """Freeze the model and put a trainable LoRA adapter on it (fields of `recipe.Adapter`; PEFT keeps it float32)."""
    if init_from is not None:
        return _without_waits(PeftModel.from_pretrained(backbone.model, init_from, is_trainable=True))
    rows = {"embed_tokens": [backbone.family.mask_id]} if train_mask_embedding else None
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(targets or backbone.family.lora_targets),
        use_rslora=rslora,
        use_dora=dora,
        trainable_token_indices=rows,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )
    return _without_waits(get_peft_model(backbone.model, config))


def _without_waits(model: PeftModel) -> PeftModel:
    """Have the numbers of trained tokens lie on the device.

    PEFT sends them there whenever such a layer is called: for every chunk of the loss the host would wait until the
    device has done all that it was told before, and the backward pass would begin with nothing launched ahead.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.get_merged_weights = MethodType(_merged_weights, module)  # type: ignore[method-assign]
    return model


def _merged_weights(self: TrainableTokensLayer, active_adapters: list[str]) -> Tensor:
    """PEFT's method of this name: the weight, with the rows of trained tokens in place."""
    weight: Any = self.base_layer.weight
    for name in active_adapters:
        numbers = _numbers(tuple(self.token_indices[name]), weight.device)
        weight = weight.index_copy(0, numbers, self.trainable_tokens_delta[name].to(weight))
    return weight


@lru_cache(maxsize=16)
def _numbers(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else autograd could not save them in a later pass
        return torch.tensor(tokens, device=device)


def family_facts(family: Family) -> dict[str, Any]:
    """What a converted checkpoint's config.json, or the file beside an adapter, says of its family."""
    return {
        "family": family.name,
        "block_size": family.block_size,
        "mask_id": family.mask_id,
        "stop_ids": list(family.stop_ids),
        "pad_id": family.pad_id,
    }


def write_family(folder: Path, family: Family) -> None:
    """Put the family facts beside an adapter."""
    (folder / FAMILY_FILE).write_text(json.dumps(family_facts(family), indent=2) + "\n")


def read_family(folder: str | Path) -> Family | None:
    """The family recorded beside a local adapter, or None."""
    path = Path(folder) / FAMILY_FILE
    if not path.is_file():
        return None
    facts = json.loads(path.read_text())
    name, stop_ids = facts.pop("family"), tuple(facts.pop("stop_ids"))
    return get_family(name).with_overrides(stop_ids=stop_ids, **facts)
