"""Every key of a recipe does something: change it alone, and a run (or an evaluation) is another one.

`CHANGES` gives each key a new value and what else the recipe must say for the key to matter. A key that is missing
from it fails a test, so that no option can be added that nothing reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from transformers.trainer_callback import TrainerCallback

import mage_tune.run as run_module
from mage_tune import run_folder
from mage_tune.data import files
from mage_tune.data.files import Record
from mage_tune.evals import run as evaluation
from mage_tune.evals.needles import TASKS
from mage_tune.fused import offloaded_checkpoint
from mage_tune.recipe import Eval, Recipe, load_recipe
from mage_tune.recipe_schema import Section
from mage_tune.tracking import Tracking

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs are compared bit for bit, as they can be on a CPU"),
]

BASE = """\
name: base
model:
  family: converted
  random_weights:
    {vocab_size: 264, hidden_size: 16, intermediate_size: 16, num_layers: 3, num_heads: 4, num_kv_heads: 2}
data:
  length: 64
  sources:
    - {kind: text, path: one.jsonl}
adapter: {rank: 2, alpha: 4}
objective:
  diffusion: {weight: 1.0}
  query_alignment: {weight: 0.5, skip_layers: 1}
  attention_alignment: {weight: 0.5, blocks: 1, skip_layers: 1}
  sparse_distillation: {weight: 0.5, budget: 16, dense_layers: 1}
train: {steps: 3, learning_rate: 1e-2, warmup_steps: 1, save_every: 3}
"""

RETRIEVAL = "data.sources=[{kind: retrieval, path: one.jsonl, needles: [1, 2], questions: [1, 1]}]"
CHAT = "data.sources=[{kind: chat, path: chat.jsonl}]"
TWO = "data.sources=[{kind: text, path: one.jsonl}, {kind: %s, path: %s}]"
LONG = "data.length=384"
SIX = "train.steps=6"

CHANGES: dict[str, tuple[str, ...]] = {
    # key: (new value, what else holds before and after)
    "name": ("other",),
    "output": ("elsewhere",),
    "seed": ("1",),
    "model.path": ("other/model", "model.random_weights=null", "model.path=some/model"),
    "model.revision": ("v2", "model.random_weights=null", "model.path=some/model"),
    "model.family": ("sdar",),
    "model.block_size": ("16",),
    "model.mask_id": ("5",),
    "model.stop_ids": ("[4]", "data.length=640"),
    "model.pad_id": ("6", "model.family=sdar", CHAT),
    "model.dtype": ("bfloat16",),
    "model.quantise": ("nf4",),
    "model.random_weights": ("{vocab_size: 264, hidden_size: 32, num_layers: 3}",),
    "model.random_weights.architecture": ("qwen2",),
    "model.random_weights.vocab_size": ("300",),
    "model.random_weights.hidden_size": ("32",),
    "model.random_weights.intermediate_size": ("32",),
    "model.random_weights.num_layers": ("4",),
    "model.random_weights.num_heads": ("2",),
    "model.random_weights.num_kv_heads": ("1",),
    "model.random_weights.head_dim": ("8",),
    "model.random_weights.tie_embeddings": ("false",),
    "model.random_weights.max_positions": ("512",),
    "data.length": ("96",),
    "data.workers": ("1",),
    "data.packing": ("true", CHAT, "data.length=640", "train.rows=2"),
    "text.kind": ("chat", "data.sources.0.path=both.jsonl"),
    "text.path": ("two.jsonl",),
    "text.share": ("3.0", TWO % ("text", "two.jsonl"), SIX),
    "text.split": ("test", "data.sources.0.path=owner/name"),
    "text.field": ("other",),
    "text.streaming": ("true",),
    "chat.kind": ("text", CHAT, "data.sources.0.path=both.jsonl"),
    "chat.path": ("both.jsonl", CHAT),
    "chat.share": ("3.0", "data.sources=[{kind: chat, path: chat.jsonl}, {kind: text, path: one.jsonl}]", SIX),
    "chat.split": ("test", CHAT, "data.sources.0.path=owner/chats"),
    "chat.streaming": ("true", CHAT),
    "chat.overlong": ("truncate", CHAT),
    "retrieval.kind": ("text", "data.sources=[{kind: retrieval, path: one.jsonl}]", LONG),
    "retrieval.path": ("two.jsonl", RETRIEVAL, LONG),
    "retrieval.share": ("3.0", RETRIEVAL[:-1] + ", {kind: text, path: two.jsonl}]", LONG, SIX),
    "retrieval.field": ("other", RETRIEVAL, LONG),
    "retrieval.seed": ("1", RETRIEVAL, LONG),
    "retrieval.needles": ("[2, 2]", RETRIEVAL, LONG),
    "retrieval.questions": ("[2, 2]", RETRIEVAL, "data.sources.0.needles=[2, 2]", "data.length=512"),
    "retrieval.answer_weight": ("1.0", RETRIEVAL, LONG),
    "retrieval.other_weight": ("1.0", RETRIEVAL, LONG),
    "adapter.rank": ("4",),
    "adapter.alpha": ("8",),
    "adapter.dropout": ("0.5",),
    "adapter.targets": ("[q_proj]",),
    "adapter.rslora": ("true",),
    "adapter.dora": ("true",),
    "adapter.train_mask_embedding": ("true",),
    "adapter.init_from": ("base-run",),
    "objective.diffusion.weight": ("2.0",),
    "objective.diffusion.views": ("one", "model.family=fast_dllm_v2"),
    "objective.query_alignment.weight": ("0.0",),
    "objective.query_alignment.distance": ("squared",),
    "objective.query_alignment.average": ("head",),
    "objective.query_alignment.rotary": ("before",),
    "objective.query_alignment.symmetric": ("true",),
    "objective.query_alignment.skip_layers": ("0",),
    "objective.attention_alignment.weight": ("0.0",),
    "objective.attention_alignment.blocks": ("2", "data.length=128"),
    "objective.attention_alignment.direction": ("mask_to_later",),
    "objective.attention_alignment.top_k": ("8",),
    "objective.attention_alignment.power": ("0.5",),
    "objective.attention_alignment.symmetric": ("true",),
    "objective.attention_alignment.skip_layers": ("0",),
    "objective.sparse_distillation.weight": ("0.0",),
    "objective.sparse_distillation.budget": ("8",),
    "objective.sparse_distillation.layer_budgets": ('{"2": 8}',),
    "objective.sparse_distillation.kl_weight": ("0.0",),
    "objective.sparse_distillation.direction": ("student_to_teacher",),
    "objective.sparse_distillation.teacher": ("adapters_on",),
    "objective.sparse_distillation.dense_layers": ("0",),
    "objective.sparse_distillation.share": ("0.5",),
    "train.steps": ("2",),
    "train.rows": ("2",),
    "train.accumulation": ("2",),
    "train.learning_rate": ("1e-3",),
    "train.warmup_steps": ("2",),
    "train.schedule": ("linear", SIX),
    "train.final_lr_share": ("0.5",),
    "train.betas": ("[0.5, 0.95]",),
    "train.weight_decay": ("0.5",),
    "train.max_grad_norm": ("0.01",),
    "train.precision": ("bfloat16",),
    "train.kernels": ("fused",),
    "train.checkpointing": ("non_reentrant",),
    "train.offload": ("true", "train.checkpointing=non_reentrant"),
    "train.log_every": ("2",),
    "train.trackers": ("[tensorboard]",),
    "train.sample_every": ("1",),
    "train.save_every": ("1",),
    "train.keep_checkpoints": ("1", "train.save_every=1"),
    "train.resume": ("nowhere",),
}

SECTIONS = ("model", "data", "adapter", "objective", "train", "eval")


def leaves(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key that holds a value, as `CHANGES` calls it: sources by their kind, without eval's."""
    for name, field in schema.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        inner = [part for part in inner if issubclass(part, Section)]
        if name == "sources":
            union = get_args(get_args(field.annotation)[0])[0]
            for source in get_args(union):
                yield from leaves(source, f"{get_args(source.model_fields['kind'].annotation)[0]}.")
        elif inner and name != "eval":
            if name == "random_weights":
                yield prefix + name
            yield from leaves(inner[0], f"{prefix}{name}.")
        elif name != "eval":
            yield prefix + name


def test_no_key_is_forgotten() -> None:
    assert set(leaves(Recipe)) == set(CHANGES)


class Stop(Exception):
    """Raised in place of loading a checkpoint, with what would have been loaded."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and the data that it and `CHANGES` name."""
    folder = tmp_path_factory.mktemp("effects")
    (folder / "base.yaml").write_text(BASE)
    turn = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    long = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "No. " * 40}]
    for name, word in {"one": "first", "two": "second"}.items():
        records = [{"text": f"{word} text {i}, of many words. " * 20, "other": f"{i} " * 200} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    chats = [{"messages": turn}, {"messages": turn[:1] + long[1:]}, {"messages": turn + turn}]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chats))
    (folder / "both.jsonl").write_text(json.dumps({"text": "some text " * 20, "messages": long[:1] + turn[1:]}) + "\n")
    return folder


@pytest.fixture
def observe(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """observe(overrides) -> everything a run leaves behind or does on the way, for comparison."""
    seen: dict[str, Any] = {}

    def load_backbone(path: str, **options: Any) -> Any:
        raise Stop(path, sorted(map(str, options.items())))

    def hub_records(path: str, split: str, streaming: bool) -> Iterator[Record]:
        seen["hub"] = (path, split, streaming)
        for i in range(8):
            messages = [{"role": "user", "content": split}, {"role": "assistant", "content": f"{split} {i}"}]
            yield Record(path, {"text": f"{split} {i}. " * 40, "messages": messages})

    class Watch(TrainerCallback):
        """Notes what cannot be seen in the result."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen["model"] = model.get_base_model().config.to_dict()
            seen["workers"] = args.dataloader_num_workers
            layer = model.get_base_model().model.layers[0]
            seen["checkpointing"] = layer.gradient_checkpointing
            seen["offload"] = getattr(layer, "_gradient_checkpointing_func", None) is offloaded_checkpoint

    build = run_module.build_trainer

    class Trackers(Tracking):
        """Notes which would be started, instead of starting them."""

        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            seen["trackers"] = self.names

    def samples(lm: Any, row: Any, recipe: Recipe, console: Any, measured: dict[str, float]) -> TrainerCallback:
        seen["samples"] = recipe.train.sample_every
        return TrainerCallback()

    def build_watched(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        trainer.add_callback(Watch())
        return trainer

    monkeypatch.setattr(run_module, "load_backbone", load_backbone)
    monkeypatch.setattr(run_module, "build_trainer", build_watched)
    monkeypatch.setattr(run_module, "Tracking", Trackers)
    monkeypatch.setattr(files, "_hub_records", hub_records)
    # Of three short steps they take a good part, and nothing of the recipe is in them: the card, git, package versions.
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)
    monkeypatch.setattr(run_folder, "environment", dict)

    def run(overrides: list[str]) -> dict[str, Any]:
        seen.clear()
        monkeypatch.chdir(workplace)  # where overrides look for files
        recipe = load_recipe(workplace / "base.yaml", ["train.precision=float32", *overrides])
        monkeypatch.chdir(tmp_path)  # where runs are written
        try:
            folder = run_module.train(recipe, watch=samples)
        except (ValueError, Stop) as error:
            return {"stopped": repr(error)}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((folder / "adapter_config.json").read_text())
        found = {
            **seen,
            "folder": str(folder),
            "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*")),
            "adapter": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "config": {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()},
            "metrics": [{k: v for k, v in line.items() if k not in ("tokens_per_s", "step_s")} for line in lines],
        }
        folder.rename(tmp_path / f"done-{len(list(tmp_path.iterdir()))}")
        return found

    return run


@pytest.fixture(scope="module")
def baselines() -> dict[tuple[str, ...], dict[str, Any]]:
    """Runs without the change, by what else they hold; most changes share one."""
    return {}


@pytest.mark.parametrize("key", CHANGES)
def test_key_has_an_effect(key: str, observe, baselines, workplace: Path) -> None:
    value, *context = CHANGES[key]
    kind, _, rest = key.partition(".")
    dotted = f"data.sources.0.{rest}" if rest and kind not in SECTIONS else key
    if tuple(context) not in baselines:
        baselines[tuple(context)] = observe(context)
    if key == "adapter.init_from":
        value = str(make_adapter(observe, workplace))
    before = baselines[tuple(context)]
    expects_stop = key in ("model.path", "model.revision")
    assert ("stopped" in before) == expects_stop, before
    after = observe([*context, f"{dotted}={value}"])
    assert ("stopped" in after) == (expects_stop or key == "train.resume"), after
    assert after != before


def make_adapter(observe, workplace: Path) -> Path:
    """A trained adapter to start from."""
    observe(["seed=7"])
    done = next(folder for folder in Path.cwd().iterdir() if folder.name.startswith("done-"))
    return done.rename(workplace / "base-run")


def test_the_same_recipe_gives_the_same_run(observe) -> None:
    """Without this, the test above would prove nothing."""
    assert observe([]) == observe([])


class Recording(Eval):
    """Settings that note which of them are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).model_fields:
            READ.add(name)
        return super().__getattribute__(name)


READ: set[str] = set()


def test_every_key_of_eval_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone, converted_checkpoint
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = tiny_backbone(block_size=8, vocab_size=272, max_positions=1024)
    base = converted_checkpoint(backbone)
    backbone.tokenizer.save_pretrained(base)
    (tmp_path / "held.txt").write_text("".join(f"This is sentence {i} of the text.\n" for i in range(100)))
    settings = Recording(
        text=str(tmp_path / "held.txt"), context=768, documents=2, blocks=1, budgets=[8], dense_layers=1, needles=6,
        questions=1, needle_budget=8,
    )  # fmt: skip
    monkeypatch.setattr(evaluation, "override_section", lambda section, overrides: settings)
    assert TASKS
    READ.clear()
    evaluation.evaluate(str(base))
    assert set(Eval.model_fields) == READ
