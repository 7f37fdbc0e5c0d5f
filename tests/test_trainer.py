"""Fine-tuning: the weighted terms, and that a run's result depends on its recipe alone."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import mage_tune.callbacks as callbacks_module
import mage_tune.stream_loss as stream_loss_module
import mage_tune.trainer as trainer_module
from mage_tune.backbone import hidden_states, output_head, read_family
from mage_tune.blocks import StreamLayout
from mage_tune.callbacks import SparedCollections
from mage_tune.data.collate import Collator
from mage_tune.data.example import Example
from mage_tune.families import Noise
from mage_tune.lm import load
from mage_tune.objectives import cross_entropy_sum
from mage_tune.recipe import Recipe, RecipeError, load_recipe
from mage_tune.recipe_schema import Objective, Train
from mage_tune.run import train
from mage_tune.run_folder import ADAPTER_FILE, MetricsFile, first_difference, last_checkpoint, save_adapter
from mage_tune.stream_loss import StreamLoss
from mage_tune.streams import LayerView, RowStreams, StreamAttention
from mage_tune.trainer import clear_by_list, learning_rate_share

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="exactness is promised on a CPU")

FAMILIES = ["fast_dllm_v2", "sdar", "converted"]
TERMS = {
    "diffusion": {"weight": 1.0},
    "query_alignment": {"weight": 0.5, "skip_layers": 1},
    "attention_alignment": {"weight": 0.25, "blocks": 3, "skip_layers": 0},
    "sparse_distillation": {"weight": 2.0, "budget": 8, "dense_layers": 1},
}


def objective(*active: str, **changes: dict) -> Objective:
    """The named terms; `changes` are merged into a term, active or not."""
    terms = {"diffusion": {"weight": 0.0}} | {name: dict(TERMS[name]) for name in active}
    for name, change in changes.items():
        terms[name] = terms.get(name, {}) | change
    return Objective.model_validate(terms)


# --- the terms on a batch --------------------------------------------------------------------------------------------


@pytest.fixture
def measure(tiny_backbone, tiny_adapter):
    """measure(objective, examples, ...) -> (sums, items, gradients by name) of one batch."""

    def run(goal: Objective, examples: list[Example], family: str = "converted", fresh: bool = False, **collator):
        backbone = tiny_backbone(family)
        model = tiny_adapter(backbone).train()
        if fresh:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.zero_()
        loss = StreamLoss(goal)
        batch = Collator(backbone.family, 0, **loss.collator_needs() | collator)(examples)
        sums = loss.sums(model, batch)
        items = dict(zip(loss.weights, loss.items(batch).tolist(), strict=True))
        torch.stack([loss.weights[n] * sums[n] / max(items[n], 1) for n in loss.weights]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n: s.item() for n, s in sums.items()}, items, gradients

    return run


@pytest.mark.parametrize(
    ("active", "streams"),
    [
        (["diffusion"], "noisy clean"),
        (["query_alignment"], "mask noisy clean"),
        (["diffusion", "attention_alignment"], "mask noisy clean"),
        (["sparse_distillation"], "sparse mask clean"),
        (["diffusion", "sparse_distillation"], "sparse mask noisy clean"),
    ],
)
def test_rows_carry_only_the_streams_that_a_term_needs(tiny_backbone, make_examples, active, streams):
    needs = StreamLoss(objective(*active)).collator_needs()
    row = Collator(tiny_backbone().family, 0, **needs)(make_examples((24, 0)))["streams"]
    assert ["sparse"] * row.sparse + ["mask"] * row.mask + ["noisy"] * row.noisy + ["clean"] == streams.split()


def test_a_teacher_with_adapters_on_is_this_passes_noisy_stream(tiny_backbone, make_examples):
    goal = objective("sparse_distillation", sparse_distillation={"teacher": "adapters_on"})
    row = Collator(tiny_backbone().family, 0, **StreamLoss(goal).collator_needs())(make_examples((24, 0)))["streams"]
    assert (row.sparse, row.mask, row.noisy) == (True, True, 1)


@pytest.mark.parametrize("name", ["query_alignment", "attention_alignment", "sparse_distillation"])
def test_a_term_of_weight_zero_is_a_no_op(measure, make_examples, name):
    others = [other for other in TERMS if other != name]
    examples = make_examples((24, 3), (20, 0))
    odd = {"query_alignment": {"distance": "squared"}, "attention_alignment": {"blocks": 5}}
    without = measure(objective(*others), examples)
    zero = measure(objective(*others, **{name: odd.get(name, {"budget": 3}) | {"weight": 0.0}}), examples)
    assert zero[:2] == without[:2]
    assert all(zero[2][n].equal(g) for n, g in without[2].items())


def test_diffusion_of_weight_zero_is_a_no_op(measure, make_examples):
    without = measure(objective("query_alignment"), make_examples((24, 3)))
    assert without[0].keys() == {"query_alignment"}
    with_it = measure(objective("query_alignment", "diffusion"), make_examples((24, 3)))
    assert with_it[0]["query_alignment"] == without[0]["query_alignment"]


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_are_sums_over_rows_whatever_the_batch_and_its_padding(measure, make_examples, family):
    examples = make_examples((24, 3), (9, 0), (17, 6))
    goal = objective(*TERMS)
    alone = [measure(goal, [e], family)[:2] for e in examples]
    for multiple in (1, 32):
        sums, items, _ = measure(goal, examples, family, length_multiple=multiple)
        for name in TERMS:
            assert sums[name] == pytest.approx(sum(s[name] for s, _ in alone), rel=2e-5)
            assert items[name] == pytest.approx(sum(i[name] for _, i in alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_gradient(measure, make_examples, family):
    goal = objective(*TERMS)
    plain = measure(goal, make_examples((18, 3)), family)[2]
    padded = measure(goal, make_examples((18, 3)), family, length_multiple=64)[2]
    for name, gradient in plain.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-6)


def test_all_masked_blocks_with_unit_weights_are_plain_cross_entropy(tiny_backbone, tiny_adapter, make_examples):
    """No code of ours but the mask: every block is predicted from its masks and the clean blocks before it."""
    backbone = tiny_backbone("sdar")
    family = backbone.family.with_overrides(noise=Noise(per="sample", low=1.0))
    model = tiny_adapter(backbone)
    (example,) = make_examples((24, 0))
    loss = StreamLoss(objective("diffusion"))
    batch = Collator(family, 0, **loss.collator_needs())([example])
    clean = torch.from_numpy(example.input_ids)
    total = 0.0
    for start in range(0, 24, 4):
        ids = torch.cat([clean[:start], torch.full((4,), family.mask_id)])[None]
        mask = StreamLayout(0, start + 4, 4).dense_mask()[None, None]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, start:]
        total += torch.nn.functional.cross_entropy(logits, clean[start : start + 4], reduction="sum").item()
    assert loss.sums(model, batch)["diffusion"].item() == pytest.approx(total, rel=1e-5)
    assert loss.items(batch).tolist() == [24.0]


def test_a_batch_in_which_nothing_was_hidden_still_steps(tiny_backbone, tiny_adapter, make_examples):
    backbone = tiny_backbone("converted")
    family = backbone.family.with_overrides(noise=Noise(per="sample", high=0.0, floor=0.0))
    loss = StreamLoss(objective("diffusion", "sparse_distillation"))
    batch = Collator(family, 0, **loss.collator_needs())(make_examples((3, 0)))
    assert loss.items(batch).tolist() == [0.0, 0.0]
    sums = loss.sums(tiny_adapter(backbone).train(), batch)
    (sums["diffusion"] + sums["sparse_distillation"]).backward()
    assert sums["diffusion"].item() == sums["sparse_distillation"].item() == 0.0


# --- alignment -------------------------------------------------------------------------------------------------------


def alignment_views(model, batch: dict) -> list[LayerView]:
    """What every layer shows of a batch, in the order of the layers."""
    views: list[LayerView] = []

    def keep(view: LayerView) -> Tensor:
        views.append(view)
        return torch.zeros(())

    with torch.no_grad():
        attention = StreamAttention(batch["streams"], observers={"keep": (0, keep)})
        hidden_states(model, batch["input_ids"], batch["position_ids"], attention.attend)
    return views


def mean_attention(rows: Tensor, key: Tensor, prefix: int, scaling: float) -> np.ndarray:
    """(R, D) queries, (N, D) keys -> (prefix,) mean probability in float64."""
    logits = scaling * rows.double().numpy() @ key[:prefix].double().numpy().T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).mean(axis=0)


def distance(x: np.ndarray, y: np.ndarray, name: str) -> float:
    return 1 - x @ y / np.sqrt((x @ x) * (y @ y)) if name == "cosine" else (x - y) @ (x - y) / (y @ y)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "direction"), [("cosine", "later_to_mask"), ("squared", "mask_to_later")])
def test_alignment_terms_equal_loops_over_layers_views_blocks_and_heads(
    tiny_backbone, tiny_adapter, make_examples, family, name, direction
):
    backbone = tiny_backbone(family)
    model = tiny_adapter(backbone)
    loss = StreamLoss(
        objective(
            "query_alignment",
            "attention_alignment",
            query_alignment={"distance": name},
            attention_alignment={"direction": direction},
        )
    )
    batch = Collator(backbone.family, 0, **loss.collator_needs())(make_examples((24, 3), (18, 5)))
    views, size = alignment_views(model, batch), backbone.family.block_size
    query, attention = [], []  # sums per layer
    for layer in views:
        query.append(0.0)
        attention.append(0.0)
        for v, b, h, j in np.ndindex(*batch["is_counted"].shape[:2], 2, batch["is_counted"].shape[2]):
            at_mask, later = layer.mask_rows[b, h, j], layer.later_rows[v][b, h, j]
            if batch["is_counted"][v, b, j]:
                query[-1] += distance(*(rows.double().numpy().mean(axis=0) for rows in (at_mask, later)), name) / 2
            sampled = batch["sampled_blocks"][b][batch["is_sampled"][v, b]]
            if j in sampled.tolist():
                p, q = (
                    mean_attention(rows, layer.clean_key[b, h], j * size, layer.scaling) for rows in (later, at_mask)
                )
                first, second = (p, q) if direction == "later_to_mask" else (q, p)
                attention[-1] += (first * np.log((first + 1e-8) / (second + 1e-8))).sum() / 2
    sums = loss.sums(model, batch)
    assert sums["query_alignment"].item() == pytest.approx(np.mean(query[1:]), rel=1e-4)  # skip_layers is 1
    assert sums["attention_alignment"].item() == pytest.approx(np.mean(attention), rel=1e-4)  # and 0 here
    counts = {"query_alignment": batch["is_counted"].sum(), "attention_alignment": batch["is_sampled"].sum()}
    assert loss.items(batch).tolist() == [float(count) for count in counts.values()]
    assert all(count > 0 for count in counts.values())


# --- sparse distillation ---------------------------------------------------------------------------------------------


def divergence(measure, examples: list[Example], fresh: bool, **settings) -> float:
    """The KL part of sparse distillation."""

    def loss(kl_weight: float) -> float:
        goal = objective("sparse_distillation", sparse_distillation=settings | {"kl_weight": kl_weight})
        return measure(goal, examples, fresh=fresh)[0]["sparse_distillation"]

    return loss(1.0) - loss(0.0)


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_an_untuned_student_with_every_key_is_its_teacher(measure, make_examples, direction):
    examples = make_examples((24, 3), (24, 0), (20, 5))
    same = {"direction": direction, "budget": 24}
    assert abs(divergence(measure, examples, fresh=True, teacher="adapters_off", **same)) < 1e-3
    assert divergence(measure, examples, fresh=False, teacher="adapters_off", **same) > 0.1, "the teacher is untuned"
    assert abs(divergence(measure, examples, fresh=False, teacher="adapters_on", **same)) < 1e-3
    assert divergence(measure, examples, fresh=False, teacher="adapters_on", direction=direction, budget=2) > 0.1


def test_the_teacher_is_the_exact_untuned_model(tiny_backbone, tiny_adapter, make_examples):
    backbone = tiny_backbone("fast_dllm_v2")
    model = tiny_adapter(backbone).train()
    loss = StreamLoss(objective("diffusion", "sparse_distillation"))
    batch = Collator(backbone.family, 0, **loss.collator_needs())(make_examples((24, 3), (20, 0)))
    teacher = loss._teacher_rows(model, batch, torch.zeros(()))
    assert not teacher.requires_grad
    row = batch["streams"]
    noisy = batch["input_ids"][:, row.offset("noisy") : row.offset("noisy") + row.length]
    pair = torch.cat([noisy, batch["input_ids"][:, row.offset("clean") :]], dim=1)
    attention = StreamAttention(RowStreams(row.length, row.block_size, noisy=1))
    untuned = tiny_backbone("fast_dllm_v2").model
    positions = torch.arange(row.length).repeat(2).expand(2, -1)
    exact = hidden_states(untuned, pair, positions, attention.attend)
    at, source = np.divmod(batch["sparse_from"].numpy(), row.total)
    torch.testing.assert_close(teacher, exact[at, source].detach())
    # and these rows are the ones that predict the sparse stream's targets
    uniform = cross_entropy_sum(teacher, output_head(untuned), batch["sparse_target"], batch["sparse_weight"])
    assert uniform.isfinite()


def test_sparse_distillation_is_cross_entropy_plus_weighted_kl_over_its_own_items(measure, make_examples):
    def sparse(kl_weight: float) -> tuple[float, float]:
        goal = objective("diffusion", "sparse_distillation", sparse_distillation={"kl_weight": kl_weight})
        sums, items, _ = measure(goal, make_examples((24, 3), (20, 5)))
        assert items["sparse_distillation"] < items["diffusion"], "seed tokens are not predicted by the sparse stream"
        return sums["sparse_distillation"], items["sparse_distillation"]

    (plain, items), (once, _), (thrice, _) = (sparse(kl_weight) for kl_weight in (0.0, 1.0, 3.0))
    assert items == int(items)  # unit weights: one per hidden token
    assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-4)
    assert once > plain + 0.1


def test_share_of_really_sparse_blocks_is_over_those_that_predict(tiny_backbone, tiny_adapter, make_examples):
    backbone = tiny_backbone("sdar")
    family = backbone.family.with_overrides(noise=Noise(per="sample", low=1.0))  # every block predicts
    loss = StreamLoss(objective("sparse_distillation", sparse_distillation={"budget": 8}))
    batch = Collator(family, 0, length_multiple=64, **loss.collator_needs())(make_examples((24, 16), (24, 0), (8, 0)))
    share = loss.sums(tiny_adapter(backbone), batch)["sparse_share"]
    assert share.item() == (2 + 3 + 0) / (2 + 6 + 2)  # prefixes above 8 of (16, 20), (0, 4, ..., 20) and (0, 4)


# --- runs ------------------------------------------------------------------------------------------------------------

TIMES = {"tokens_per_s", "step_s", "train_runtime"}


@pytest.fixture(scope="module")
def base(tiny_backbone, converted_checkpoint) -> Path:
    return converted_checkpoint(tiny_backbone())


@pytest.fixture
def recipe(tmp_path, base):
    """recipe(output, train={...}, ...) -> Recipe of the tiny model on token ids, 24 rows of up to 24 tokens."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(4, 60, 24 * 24 - 14))  # the last row is short

    def make(output: str = "run", **sections: dict) -> Recipe:
        parts = {
            "eval": {},
            "model": {"path": str(base), "dtype": "float32"},
            "data": {"length": 24, "sources": [{"kind": "text", "path": str(tmp_path / "ids.npy")}]},
            "adapter": {"rank": 4, "alpha": 8.0},
            "objective": TERMS,
            "train": {"steps": 3, "learning_rate": 1e-2, "warmup_steps": 1, "precision": "float32"},
        }
        for name, change in sections.items():
            parts[name] = parts[name] | change
        return Recipe.model_validate({"name": "test", "output": str(tmp_path / output)} | parts)

    return make


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / ADAPTER_FILE)


def test_a_run_folder_holds_adapter_facts_and_every_term(recipe):
    folder = train(recipe(train={"steps": 4, "log_every": 2, "accumulation": 2}))
    found = {p.name for p in folder.iterdir()}
    assert found == {
        "adapter_config.json", ADAPTER_FILE, "checkpoints", "mage_tune.json", "metrics.jsonl", "recipe.yaml",
        "versions.json",
    }  # fmt: skip
    assert read_family(folder).mask_id == 63
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert line.keys() >= {*TERMS, "loss", "grad_norm", "learning_rate", "tokens_per_s", "step_s", "sparse_share"}
        assert all(np.isfinite(value) for value in line.values())
        assert line["loss"] == pytest.approx(sum(TERMS[name]["weight"] * line[name] for name in TERMS), rel=1e-5)
        assert 0 < line["sparse_share"] < 1
    assert any(tensor.any() for name, tensor in weights(folder).items() if "lora_B" in name)


def test_a_run_says_what_it_saved_and_what_it_took(recipe, capsys):
    """All tokens are counted, those of steps that no line is logged of too; weights of a checkpoint are not random."""
    folder = train(recipe(train={"steps": 3, "log_every": 2, "save_every": 2, "accumulation": 2}))
    said = capsys.readouterr().err.splitlines()
    saved = [f"step {step}: checkpoint saved to {folder}/checkpoints/checkpoint-{step}" for step in (2, 3)]
    assert [line for line in said if "checkpoint" in line] == saved
    assert re.fullmatch(
        r"3 steps in 0:\d\d · 144 tokens, \d+ tok/s on average · peak \d+\.\d GiB of host memory", said[-1]
    )
    assert "weights" not in metrics(folder)[0]


def test_metrics_of_random_weights_say_so(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", is_random=True)
    file.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=3), None, logs={"loss": 1.0})
    assert json.loads(file.path.read_text()) == {"step": 3, "loss": 1.0, "weights": "random"}


def test_inactive_terms_are_not_logged(recipe):
    folder = train(recipe(objective={**TERMS, "query_alignment": {}, "sparse_distillation": {}}))
    assert metrics(folder)[0].keys() & TERMS.keys() == {"diffusion", "attention_alignment"}


def test_accumulation_2x4_equals_1x8(recipe):
    wide = train(recipe("wide", train={"rows": 2, "accumulation": 4}))
    for name, shape in {"long": {"rows": 1, "accumulation": 8}, "whole": {"rows": 8, "accumulation": 1}}.items():
        other = train(recipe(name, train=shape))
        for a, b in zip(metrics(wide), metrics(other), strict=True):
            del a["sparse_share"], b["sparse_share"]  # a mean over micro-steps, whatever their rows
            assert a == pytest.approx(b, rel=1e-5, abs=1e-7)
        for key, tensor in weights(wide).items():
            torch.testing.assert_close(weights(other)[key], tensor, rtol=0, atol=2e-6)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(recipe, micro_step) runs until that micro-step fails, and returns the unfinished folder."""

    def run(unlucky: Recipe, micro_step: int) -> Path:
        compute_loss, calls = trainer_module.MageTrainer.compute_loss, iter(range(1, 100))

        def fail_in_time(*args, **kwargs):
            if next(calls) == micro_step:
                raise Interrupted
            return compute_loss(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(trainer_module.MageTrainer, "compute_loss", fail_in_time)
            with pytest.raises(Interrupted):
                train(unlucky)
        assert not (Path(unlucky.output) / ADAPTER_FILE).exists()
        return Path(unlucky.output)

    return run


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, interrupted):
    settings = {
        "adapter": {"dropout": 0.1},  # so that the state of torch's generator counts too
        "train": {"steps": 5, "rows": 2, "accumulation": 2, "save_every": 2},
    }
    whole = train(recipe("whole", **settings))
    folder = interrupted(recipe("parts", **settings), micro_step=8)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]  # step 3 will be done again
    assert train(recipe("parts", **settings)) == folder
    assert metrics(folder) == metrics(whole)
    assert (folder / ADAPTER_FILE).read_bytes() == (whole / ADAPTER_FILE).read_bytes()


def test_a_streamed_source_trains_and_resumes_too(recipe, interrupted, tiny_backbone, converted_checkpoint, tmp_path):
    text = "\n".join(json.dumps({"text": f"line {i} " * (2 + i % 7)}) for i in range(40))
    (tmp_path / "text.jsonl").write_text(text)
    source = {"kind": "text", "path": str(tmp_path / "text.jsonl"), "streaming": True}
    settings = {
        "model": {"path": str(converted_checkpoint(tiny_backbone(vocab_size=264)))},
        "data": {"sources": [source]},
        "train": {"steps": 3, "rows": 2, "save_every": 2},
    }
    whole = train(recipe("whole", **settings))
    folder = interrupted(recipe("parts", **settings), micro_step=3)
    train(recipe("parts", **settings))
    assert metrics(folder) == metrics(whole)
    assert (folder / ADAPTER_FILE).read_bytes() == (whole / ADAPTER_FILE).read_bytes()


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path / "checkpoints") is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_workers_change_nothing(recipe):
    alone = train(recipe("alone"))
    helped = train(recipe("helped", data={"workers": 2}))
    assert metrics(helped) == metrics(alone)
    assert (helped / ADAPTER_FILE).read_bytes() == (alone / ADAPTER_FILE).read_bytes()


def test_recomputing_activations_changes_nothing(recipe):
    plain = train(recipe("plain", train={"steps": 2}))
    recomputed = train(recipe("recomputed", train={"steps": 2, "checkpointing": "non_reentrant"}))
    assert metrics(recomputed) == metrics(plain)
    assert (recomputed / ADAPTER_FILE).read_bytes() == (plain / ADAPTER_FILE).read_bytes()


def test_rows_come_in_the_order_of_the_schedule(recipe, monkeypatch):
    seen = []
    sums = StreamLoss.sums

    def watch(self, model, batch):
        seen.extend(batch["rows"])
        return sums(self, model, batch)

    monkeypatch.setattr(StreamLoss, "sums", watch)
    train(recipe(train={"rows": 2, "accumulation": 2}))
    assert seen == list(range(12))


def test_the_seed_changes_the_run(recipe):
    one = recipe("one", train={"steps": 1})
    two = Recipe.model_validate(one.model_dump() | {"seed": 1, "output": str(Path(one.output).with_name("two"))})
    assert metrics(train(one))[0]["loss"] != metrics(train(two))[0]["loss"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_never_overwritten(recipe):
    folder = train(recipe(train={"steps": 1}))
    before = (folder / ADAPTER_FILE).read_bytes()
    with pytest.raises(RecipeError, match="holds a finished run"):
        train(recipe(train={"steps": 2}))
    assert (folder / ADAPTER_FILE).read_bytes() == before


@pytest.fixture
def unfinished(recipe):
    """A run of two steps that stopped before its adapter was written."""
    folder = train(recipe(train={"steps": 2, "save_every": 1}))
    (folder / ADAPTER_FILE).unlink()
    return folder


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate was 0.01 and is 0.001 now"),
        ({"train": {"steps": 9, "log_every": 3}}, "train.steps was 2 and is 9 now"),
        ({"adapter": {"targets": ["q_proj"]}}, "adapter.targets was None and is ['q_proj'] now"),
        ({"objective": TERMS | {"diffusion": {"weight": 0.5}}}, "objective.diffusion.weight was "),
    ],
)
def test_an_unfinished_run_of_another_recipe_is_refused(recipe, unfinished, sections, said):
    changed = {"train": {"steps": 2, "save_every": 1} | sections.pop("train", {})} | sections
    with pytest.raises(RecipeError, match="different recipe") as caught:
        train(recipe(**changed))
    assert said in str(caught.value)
    assert str(caught.value).endswith(f"--set train.resume={unfinished}/checkpoints/checkpoint-2")


def test_data_of_an_unfinished_run_is_compared_source_by_source():
    one = {"data": {"sources": [{"path": "a", "share": 1.0}, {"path": "b", "share": 1.0}], "workers": 0}}
    other = {"data": {"sources": [{"path": "a", "share": 1.0}, {"path": "c", "share": 1.0}], "workers": 2}}
    assert first_difference(one, other) == ("data.sources.1.path", "b", "c")
    fewer = {"data": {"sources": one["data"]["sources"][:1], "workers": 0}}
    assert first_difference(one, fewer) == ("data.sources", one["data"]["sources"], fewer["data"]["sources"])


def test_an_unfinished_run_goes_on_with_what_changes_nothing_of_it(recipe, interrupted):
    """And does as the new recipe says: its step 4 is saved, and logged with step 3."""
    settings = {"steps": 4, "save_every": 2, "log_every": 1}
    whole = train(recipe("whole", train=settings))
    folder = interrupted(recipe("parts", train=settings), micro_step=4)
    others = settings | {"save_every": 3, "log_every": 2, "keep_checkpoints": 5, "checkpointing": "non_reentrant"}
    changed = {"train": others | {"trackers": ["tensorboard"]}, "data": {"workers": 1}, "eval": {"documents": 3}}
    renamed = recipe("parts", **changed).model_copy(update={"name": "renamed"})
    train(renamed)
    assert (folder / ADAPTER_FILE).read_bytes() == (whole / ADAPTER_FILE).read_bytes()
    assert [line["step"] for line in metrics(folder)] == [1, 2, 4]
    assert {file.name for file in (folder / "checkpoints").iterdir()} == {f"checkpoint-{step}" for step in (2, 3, 4)}
    assert load_recipe(folder / "recipe.yaml") == renamed


@pytest.mark.parametrize("inside", ["", "/deeper/run"])
def test_an_output_that_is_a_file_is_refused_before_anything_is_loaded(recipe, tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"output: .*/file is a file; name a folder"):
        train(recipe(f"file{inside}", model={"path": "nowhere"}))


def test_an_unfinished_run_is_refused_with_resume_never(recipe, unfinished):
    with pytest.raises(RecipeError, match=r"train\.resume is never"):
        train(recipe(train={"steps": 2, "save_every": 1, "resume": "never"}))


def test_a_checkpoint_can_be_named_and_must_exist(recipe, unfinished):
    named = train(recipe("other", train={"steps": 3, "resume": str(unfinished / "checkpoints" / "checkpoint-2")}))
    assert [line["step"] for line in metrics(named)] == [3]
    with pytest.raises(RecipeError, match="no checkpoint at nowhere"):
        train(recipe("third", train={"resume": "nowhere"}))


def test_a_length_that_is_no_whole_number_of_the_checkpoints_blocks_is_refused(
    recipe, tiny_backbone, converted_checkpoint
):
    wide = converted_checkpoint(tiny_backbone(block_size=16))
    with pytest.raises(ValueError, match=r"data\.length 24 is not a multiple of the block size 16"):
        train(recipe(model={"path": str(wide)}))


def test_an_adapter_that_is_not_finite_is_never_saved(recipe, monkeypatch):
    monkeypatch.setattr(stream_loss_module, "cross_entropy_sum", lambda *args: cross_entropy_sum(*args) * float("nan"))
    with pytest.raises(ValueError, match=r"step 1: diffusion is nan on rows 0 \(text .*ids\.npy, tokens "):
        train(recipe(train={"steps": 2}))
    folder = Path(recipe().output)
    assert not list(folder.glob("adapter*"))
    assert not (folder / ".adapter").exists()


def test_one_infinite_weight_is_enough(tiny_backbone, tiny_adapter, tmp_path):
    model = tiny_adapter(tiny_backbone())
    save_adapter(model, tmp_path)
    assert (tmp_path / ADAPTER_FILE).exists()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = float("inf")
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=r"lora_A.*not finite"):
        save_adapter(model, tmp_path / "again")
    assert not list((tmp_path / "again").iterdir())


# --- learning rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.882843, 0.6, 0.317157, 0.2]),
    ],
)
def test_learning_rate_warms_up_and_decays_to_its_final_share(schedule, expected):
    settings = Train(steps=6, warmup_steps=2, schedule=schedule, final_lr_share=0.2)
    share = learning_rate_share(settings)
    assert [share(step) for step in range(7)] == pytest.approx(expected, abs=1e-6)
    assert share(10) == pytest.approx(expected[-1])


def test_the_first_step_without_warm_up_uses_the_peak(recipe):
    folder = train(recipe(train={"steps": 2, "warmup_steps": 0, "learning_rate": 1e-3, "schedule": "linear"}))
    assert [line["learning_rate"] for line in metrics(folder)] == pytest.approx([1e-3, 0.55e-3])


# --- the adapter elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_mask_embedding", [False, True])
def test_plain_peft_on_the_plain_base_gives_our_logits(recipe, base, train_mask_embedding):
    folder = train(recipe(adapter={"train_mask_embedding": train_mask_embedding}))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    ours = load(base, adapter=folder)
    ids = torch.randint(4, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
    mask = StreamLayout(0, 16, 4).dense_mask()[None, None]
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours.logits(ids), expected, rtol=0, atol=1e-5)
    assert not ours.logits(ids).allclose(load(base).logits(ids), atol=1e-2)


def test_the_garbage_collector_passes_over_what_the_first_steps_left(monkeypatch):
    """Not before their code is compiled, and only as long as the run lasts."""
    done: list[str] = []
    for name in ("collect", "freeze", "unfreeze"):
        monkeypatch.setattr(callbacks_module.gc, name, lambda name=name: done.append(name))
    spared = SparedCollections()
    for step in range(1, 5):
        spared.on_step_end(None, None, None)
        assert done == (["collect", "freeze"] if step >= spared.WARM_UP else [])
    spared.on_train_end(None, None, None)
    assert done[2:] == ["unfreeze"]


def test_gradients_are_forgotten_by_list():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    clear_by_list(model, [model.weight])
    model(torch.ones(1, 2)).sum().backward()
    model.zero_grad()
    assert model.weight.grad is None
