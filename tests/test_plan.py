"""The plan of a run: its counts against real models, its memory against what autograd keeps and what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from typer.testing import CliRunner

import mage_tune.plan.trial as trial_module
import mage_tune.stream_loss as stream_loss_module
from mage_tune.backbone import attach_adapter, hidden_states, random_backbone
from mage_tune.cli import app
from mage_tune.families import get_family
from mage_tune.fused import fuse
from mage_tune.plan import USABLE, plan, probe
from mage_tune.plan.estimate import CARDS, CHUNK, Estimate
from mage_tune.plan.shape import Shape, read_model
from mage_tune.recipe import Recipe, load_recipe
from mage_tune.run import leave_casts_to_autocast

ROOT = Path(__file__).resolve().parents[1]


def published_shape(name: str) -> Shape:
    """Sizes of a model that comes with the package."""
    random = {"random_weights": name}
    shape, _ = read_model(load_recipe(ROOT / "recipes" / "debug.yaml", [f"model={json.dumps(random)}"]))
    return shape


SMOLLM2 = published_shape("smollm2-135m")
LAYER = {"hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24}


def make_recipe(**sections) -> Recipe:
    """A recipe of a small random model; sections are merged into it."""
    parts = {
        "name": "test",
        "eval": {"dense_layers": 0},
        "model": {"family": "converted", "mask_id": 5, "stop_ids": [1], "pad_id": 0, "random_weights": LAYER},
        "data": {"length": 256, "sources": [{"kind": "text", "path": "text.txt"}]},
    }
    return Recipe.model_validate({**parts, **{name: parts.get(name, {}) | part for name, part in sections.items()}})


def smollm2(recipe: Path, **sections) -> Estimate:
    """The shipped recipe on SmolLM2's sizes, with changed sections."""
    loaded = load_recipe(recipe)
    merged = loaded.model_dump() | {name: loaded.model_dump()[name] | part for name, part in sections.items()}
    return Estimate(Recipe.model_validate(merged), SMOLLM2, get_family("converted"))


def peak(estimate: Estimate) -> float:
    return sum(item.amount for item in estimate.memory())


def peak_of_wide_logits(estimate: Estimate) -> float:
    """GiB as they were when the loss took 12 bytes a logit and so was at the peak, as in measurements until 2bfb2d6."""
    kept = sum(item.amount for item in estimate.memory() if not item.name.startswith("at the peak"))
    return kept + 12 * min(CHUNK, estimate._predictions()) * estimate.shape.vocab_size / 2**30


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [{}, {"rank": 3, "targets": ["q_proj", "down_proj"]}, {"dora": True}])
def test_parameters_are_those_of_the_real_model_and_adapter(architecture, tied, adapter):
    shape = LAYER | {"architecture": architecture, "tie_embeddings": tied, "num_layers": 2}
    model = {"random_weights": shape}
    recipe = make_recipe(model=model, adapter=adapter | {"train_mask_embedding": tied})
    found = plan(recipe)
    sizes = recipe.model.random_weights.model_dump()
    backbone = random_backbone(sizes, "converted", dtype="float32", device="cpu", mask_id=5, stop_ids=(1,), pad_id=0)
    assert found.parameters == sum(p.numel() for p in backbone.model.parameters())
    peft = attach_adapter(backbone, **recipe.adapter.model_dump())
    assert found.adapter_parameters == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert found.adapter_mib == found.adapter_parameters * 4 / 2**20


def test_published_sizes():
    published = {"7b": 7615616512, "1.5b": 1543714304, "sdar-8b": 8190735360, "smollm2-135m": 134515008}
    for name, parameters in published.items():
        assert published_shape(name).parameters == parameters


def test_model_flop_are_two_per_multiply_add_forward_and_input_gradient():
    """By hand: 3 blocks of 128 tokens, two streams, untied head; the sums of a small case."""
    layer = LAYER | {"num_layers": 2, "vocab_size": 512}
    recipe = make_recipe(
        model={"random_weights": layer, "block_size": 128},
        data={"length": 384},
        adapter={"rank": 1, "targets": ["q_proj"]},
        train={"rows": 2, "accumulation": 3},
    )
    estimate = Estimate(recipe, Shape(512, 64, 160, 2, 4, 2, 24, True), recipe.model.record)
    tokens = 2 * 2 * 384
    weights = 2 * (64 * 96 + 2 * 64 * 48 + 96 * 64 + 3 * 64 * 160) + 2 * (64 + 96)
    predictions = 2 * 384 * (0.15 + 0.85 / 2)  # converted: 15 % of the blocks all masked, the others by half
    pairs = 2 * 2 * 128 * (128 + 256 + 384)  # rows x streams x what the blocks see
    expected = 4 * weights * tokens + 4 * 512 * 64 * predictions + 12 * 4 * 24 * pairs * 2
    assert estimate.model_flop() == pytest.approx(3 * expected)


# --- memory ----------------------------------------------------------------------------------------------------------


class LikeFlex(torch.autograd.Function):
    """Attention that keeps what FlexAttention keeps: q, k, v, output and log-sum-exp, in autocast's precision."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.clone()
        ctx.save_for_backward(query, key, value, out, query[..., 0].float())
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def kept_bytes(layers: int, length: int, weights: str, targets: list[str], architecture: str, change=None) -> int:
    """Bytes that autograd keeps in the forward pass of a real model, parameters apart, each storage once."""
    sizes = LAYER | {"num_layers": layers, "architecture": architecture, "vocab_size": 64, "max_positions": 4096}
    shape = sizes | {"tie_embeddings": True}
    backbone = random_backbone(shape, "converted", dtype=weights, device="cpu", mask_id=5, stop_ids=(1,), pad_id=0)
    model = attach_adapter(backbone, rank=4, alpha=8.0, targets=targets, train_mask_embedding=True)
    leave_casts_to_autocast(model)
    if change is not None:
        change(model)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned and tensor.numel() >= length:  # (small: adapters cast to bfloat16)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(6, 64, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = hidden_states(
            model.train(), ids, torch.arange(length)[None], lambda layer, q, k, v, scaling: LikeFlex.apply(q, k, v)
        )
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "o_proj"]])
@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, None),
        ({"kernels": "fused"}, fuse),
        ({"kernels": "fused", "checkpointing": "mlp"}, lambda model: fuse(model, "mlp")),
    ],
)
def test_a_layer_is_counted_as_autograd_keeps_it(weights, targets, settings, change):
    names = targets or list(get_family("converted").lora_targets)
    length = 4096 if change is None else 1024  # `kept_bytes` tells cast weights of plain layers by their size
    recipe = make_recipe(
        model={"dtype": weights},
        data={"length": length // 2},  # two streams
        adapter={"rank": 4, "targets": targets},
        train=settings,
    )
    architecture = "llama" if change is None else "qwen3"
    shape = Shape(256, 64, 160, 4, 4, 2, 24, True, head_norms=architecture == "qwen3")
    counted = Estimate(recipe, shape, recipe.model.record).layer_bytes()
    three, two = (kept_bytes(n, length, weights, names, architecture, change) for n in (3, 2))
    assert counted == pytest.approx(three - two, rel=0.03)


def test_weights_in_4_bits_are_counted_as_bitsandbytes_holds_them():
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    recipe = make_recipe(model={"random_weights": shape, "quantise": "nf4"})
    sizes = recipe.model.random_weights.model_dump()
    backbone = random_backbone(
        sizes, "converted", dtype="bfloat16", device="cpu", quantise="nf4", mask_id=5, stop_ids=(1,), pad_id=0
    )
    held = sum(p.nbytes for p in backbone.model.parameters())
    for module in backbone.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    items = {item.name: item.amount for item in plan(recipe).memory}
    assert items["weights"] * 2**30 == pytest.approx(held, rel=0.01)


def test_offloaded_checkpoints_cost_the_device_nothing():
    settings = {"kernels": "fused", "checkpointing": "non_reentrant"}
    kept, offloaded = (
        {item.name: item for item in plan(make_recipe(train=settings | {"offload": off})).memory}
        for off in (False, True)
    )
    assert kept["checkpoints"].amount > 0 == offloaded["checkpoints"].amount
    assert "of host memory" in offloaded["checkpoints"].made_of


SPARSE_OFF = {"weight": 0.0}
SPARSE_ON = {"weight": 1.0, "budget": 128, "kl_weight": 0.0}
PLAIN = {"kernels": "plain"}
ALIGNED = {"objective": {"sparse_distillation": SPARSE_OFF}, "train": PLAIN | {"rows": 8, "accumulation": 2}}
ALIGNED_AND_SPARSE = {"objective": {"sparse_distillation": SPARSE_ON}, "train": PLAIN | {"rows": 4, "accumulation": 4}}


@pytest.mark.parametrize(
    ("name", "sections", "measured"),
    [
        ("smollm2-135m-convert", {"train": PLAIN}, 44.80),
        ("smollm2-135m", ALIGNED, 38.83),
        ("smollm2-135m", ALIGNED_AND_SPARSE, 28.2),
        ("smollm2-135m-convert", {"model": {"dtype": "float32"}, "train": PLAIN}, 51.6),
        ("smollm2-135m", {"train": {"rows": 8, "accumulation": 2}}, 34.0),  # fused, with real weights
    ],
)
def test_peaks_measured_on_an_h100(name, sections, measured):
    """docs/log.md and results/*.json; the bar of issue 6 is 10 %, these are within 4."""
    estimate = smollm2(ROOT / "recipes" / f"{name}.yaml", **sections)
    assert peak_of_wide_logits(estimate) == pytest.approx(measured, rel=0.04)


def test_the_peak_of_the_recipe_as_it_is_measured_with_real_weights():
    assert peak(smollm2(ROOT / "recipes" / "smollm2-135m.yaml")) == pytest.approx(60.7, rel=0.04)


@pytest.mark.parametrize(
    ("name", "sections", "measured"),
    [
        ("smollm2-135m-convert", {"train": PLAIN}, 0.541),
        ("smollm2-135m-convert", {"train": PLAIN | {"rows": 4, "accumulation": 5}}, 1.2),
        ("smollm2-135m", ALIGNED, 0.99),
        ("smollm2-135m", {}, 0.711),  # the recipe as it is, with real weights (bd13d5e)
    ],
)
def test_step_times_measured_on_an_h100(monkeypatch, name, sections, measured):
    """Before efaba03, while the loss waited for the device and the host for the loss."""
    monkeypatch.setattr("mage_tune.plan.estimate.LAUNCH_S", 0.0075)
    estimate = smollm2(ROOT / "recipes" / f"{name}.yaml", **sections)
    assert sum(item.amount for item in estimate.time(CARDS["h100"])) == pytest.approx(measured, rel=0.15)


RESULTS = json.loads((ROOT / "results" / "training_h100.json").read_text())
MEASURED = RESULTS["rows"]


@pytest.mark.parametrize(
    "row", [row for row in MEASURED if row.get("predicted_gib") is not None], ids=lambda row: row["case"]
)
def test_the_training_benchmark_of_an_h100(row):
    """Each row of results/training_h100.json: memory within 10 %, the bar of issue 6, and time within 15 %."""
    recipe = load_recipe(ROOT / "recipes" / f"{row['model']}.yaml").model_dump()
    names = ("rows", "accumulation", "kernels", "checkpointing", "offload")
    recipe["train"] |= {name: row[name] for name in names}
    recipe["data"]["length"] = row["length"]
    recipe["model"]["quantise"] = row["quantised"] or "none"
    student = recipe["objective"]["sparse_distillation"]
    student["weight"] = float("sparse_distillation" in row["terms"])
    student["kl_weight"] = row.get("kl_weight", 0.0)  # rows of 2bfb2d6 do not say: the recipes had none
    student["share"] = 1.0 if row["stream_names"].startswith("sparse +") else student["share"]
    family = get_family("converted" if row["model"].startswith("smollm2") else "fast_dllm_v2")
    estimate = Estimate(Recipe.model_validate(recipe), published_shape(row["model"].removesuffix("-convert")), family)
    assert estimate.stream_names == row["stream_names"]
    is_older = row["commit"] == "2bfb2d6"  # loss and fused layers took more memory and time
    found = peak_of_wide_logits(estimate) if is_older else peak(estimate)
    assert found == pytest.approx(row["peak_gib"], rel=0.10)
    if not (is_older and row["kernels"] == "fused") and "disturbed" not in row:
        assert sum(item.amount for item in estimate.time(CARDS["h100"])) == pytest.approx(row["step_s"], rel=0.15)


ENGINE_ROWS = json.loads((ROOT / "results" / "engines_h100.json").read_text())["rows"]


@pytest.mark.parametrize("row", ENGINE_ROWS, ids=lambda row: row["case"])
def test_the_engines_benchmark_on_several_h100s(row):
    """Each row of results/engines_h100.json: memory within 10 %, and time where it is predicted."""
    names = ("rows", "accumulation", "kernels", "checkpointing")
    recipe = load_recipe(ROOT / "recipes" / "7b.yaml", [f"train.{name}={row[name]}" for name in names])
    engine = row["engine"] if row["gpus"] > 1 else "ddp"
    found = plan(recipe, engine=engine, gpus=row["gpus"])
    assert found.peak_gib == pytest.approx(row["peak_gib"], rel=0.10)
    assert found.tokens_per_step == row["tokens_per_step"]
    if engine == "zero3":
        assert found.is_step_a_bound and found.step_s < row["step_s"]
    else:
        assert not found.is_step_a_bound and found.step_s == pytest.approx(row["step_s"], rel=0.10)


def test_a_teacher_costs_time_and_no_memory_to_speak_of():
    """A quarter of the blocks hold a quarter of the logits, and a chunk of them is small beside a layer's gradients."""

    def recipe(kl_weight: float, share: float) -> Estimate:
        student = {"weight": 1.0, "budget": 128, "kl_weight": kl_weight, "teacher": "adapters_on", "share": share}
        return smollm2(ROOT / "recipes" / "smollm2-135m.yaml", objective={"sparse_distillation": student})

    assert peak(recipe(1.0, 1.0)) - peak(recipe(0.0, 1.0)) < 0.3
    assert peak(recipe(1.0, 0.25)) == peak(recipe(0.0, 0.25))
    seconds = {
        share: next(i.amount for i in recipe(1.0, share).time(CARDS["h100"]) if i.name == "KL to the teacher")
        for share in (1.0, 0.25)
    }
    assert seconds[1.0] == pytest.approx(4 * seconds[0.25])
    assert all(item.name != "KL to the teacher" for item in recipe(0.0, 1.0).time(CARDS["h100"]))


def test_fused_layers_pad_ranks_to_multiples_of_eight():
    def layer_bytes(kernels: str, rank: int) -> float:
        recipe = ROOT / "recipes" / "smollm2-135m-convert.yaml"
        return smollm2(recipe, adapter={"rank": rank}, train={"kernels": kernels}).layer_bytes()

    assert layer_bytes("fused", 36) == layer_bytes("fused", 40) > layer_bytes("fused", 32)
    assert layer_bytes("plain", 36) < layer_bytes("plain", 40)


def test_recomputing_keeps_a_layer_input_each_and_one_whole_layer():
    recipe = ROOT / "recipes" / "smollm2-135m-convert.yaml"
    plain, lean = smollm2(recipe), smollm2(recipe, train={"checkpointing": "non_reentrant"})
    items = {item.name.partition(":")[0]: item.amount for item in lean.memory()}
    assert items["checkpoints"] == 65536 * 30 * 2 * 576 / 2**30
    assert items["at the peak"] > lean.layer_bytes() / 2**30
    assert peak(lean) < peak(plain) / 5


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_longest_row_fits_and_a_tile_more_does_not():
    recipe = make_recipe(model={"random_weights": LAYER | {"num_layers": 8}}, data={"length": 256})
    found = plan(recipe, memory_gib=4.0)
    assert found.fits
    assert found.longest_length % 128 == 0
    for length, fits in ((found.longest_length, True), (found.longest_length + 128, False)):
        assert plan(make_recipe(data={"length": length}, model=recipe.model.model_dump()), memory_gib=4.0).fits is fits
    assert plan(recipe, memory_gib=0.01).longest_length == 0


def test_a_run_that_does_not_fit_says_what_would_help():
    recipe = make_recipe(train={"rows": 64}, data={"length": 8192})
    tight = plan(recipe, memory_gib=plan(recipe).peak_gib / USABLE / 1.2)
    assert not tight.fits
    assert tight.advice.startswith("with train.checkpointing=non_reentrant it needs ")
    assert tight.advice.endswith(", and fits")
    lean = make_recipe(train={"rows": 64, "checkpointing": "non_reentrant"}, data={"length": 8192})
    assert f"{plan(lean).peak_gib:.1f} GiB" in tight.advice
    assert plan(lean, memory_gib=1.0).advice.startswith("lower train.rows")
    large = load_recipe(ROOT / "recipes" / "7b.yaml")
    with_less = "with train.checkpointing=non_reentrant and model.quantise=nf4 it needs"
    assert plan(large, memory_gib=16.0).advice.startswith(with_less)


@pytest.fixture
def config_only(tmp_path) -> Path:
    """The folder of a published 7B: a config.json and nothing else."""
    sizes = {
        "model_type": "Fast_dLLM_Qwen", "bd_size": 32, "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return tmp_path


def test_a_config_alone_is_enough(config_only):
    options = ["plan", "7b", "--set", f"model.path={config_only}"]
    done = CliRunner().invoke(app, [*options, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["parameters"] == 7615616512
    assert found["streams"] == "sparse (25%) + all-mask + noisy + clean"
    assert found["tokens"] == 200 * 8 * 4096
    assert found["fits"]
    assert found["peak_gib"] == pytest.approx(sum(item["amount"] for item in found["memory"]))
    assert found["hours"] == pytest.approx(200 * sum(item["amount"] for item in found["time"]) / 3600)
    table = CliRunner().invoke(app, [*options, "--gpu", "rtx4090"], catch_exceptions=False).stdout
    words = " ".join(table.split())
    assert "does not fit: it needs 60.7 GiB, and 21.9 of the card's 23.5 can be used; with train.check" in words
    assert "activations" in table and "checkpoints" not in table  # its layers are fused and nothing is recomputed
    assert "with train.checkpointing=non_reentrant it needs" in " ".join(table.split())
    assert "flex mask" in table
    assert f"; {found_with(options, 'rtx4090')['longest_recomputed']:,} with train.checkpointing=non_reentrant" in words
    assert "the whole run: 200 steps, 6,553,600 tokens of data, 2.1 hours" in words


def found_with(options: list[str], gpu: str) -> dict:
    found = json.loads(CliRunner().invoke(app, [*options, "--gpu", gpu, "--json"], catch_exceptions=False).stdout)
    recomputed = [*options, "--gpu", gpu, "--set", "train.checkpointing=non_reentrant", "--json"]
    leaner = json.loads(CliRunner().invoke(app, recomputed, catch_exceptions=False).stdout)
    assert found["longest_length"] < found["longest_recomputed"] == leaner["longest_length"]
    return found


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_planned(recipe, config_only):
    loaded = load_recipe(recipe)
    if loaded.model.path is not None:
        family = {} if loaded.model.family else {"family": "converted"}
        model = loaded.model.model_copy(update={"path": str(config_only), **family})
        loaded = loaded.model_copy(update={"model": model})
    found = plan(loaded)
    assert found.peak_gib > 0
    assert found.step_s > 0


def test_a_config_out_of_reach_is_said_with_a_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"^nobody/nothing: its config.json cannot be read \(.*\); without network"):
        plan(make_recipe(model={"path": "nobody/nothing", "random_weights": None}))


@pytest.mark.parametrize(("name", "family"), [("7b", "fast_dllm_v2"), ("1.5b", "fast_dllm_v2"), ("sdar-8b", "sdar")])
def test_shipped_recipes_are_planned_without_asking_the_hub(name, family, monkeypatch, tmp_path):
    """Half a minute of retries, where there is no network."""
    ask = PreTrainedConfig.get_config_dict
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *args, **options: pytest.fail("asked"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert read_model(recipe) == (published_shape(name), get_family(family))
    words = " ".join(CliRunner().invoke(app, ["plan", name], catch_exceptions=False).stdout.split())
    assert f"sizes of {recipe.model.path} as shipped with mage_tune: its config.json is not here" in words
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", ask)
    elsewhere = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": "other"})})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"config.json cannot be read"):
        read_model(elsewhere)


def test_a_plan_of_several_gpus_says_what_it_is_worth():
    def told(*options: str) -> str:
        done = CliRunner().invoke(app, ["plan", "7b", *options], catch_exceptions=False)
        return " ".join(done.stdout.split())

    assert "how close" not in told()
    assert "7b on 4 x h100 with fsdp2, predicted" in told("--gpus", "4", "--engine", "fsdp2")
    plain = ["--set", "train.kernels=plain", "--set", "train.checkpointing=non_reentrant"]
    words = told("--gpus", "2", "--engine", "zero3", *plain)
    assert "a step: at least 7.5 s" in words and "what gathering weights takes is not predicted" in words


@pytest.mark.parametrize(
    ("engine", "overrides", "told"),
    [
        ("zero2", [], "--engine zero2: not predicted; predicted are ddp, fsdp2, zero3"),
        ("zero3", [], "--engine zero3: refuses fused layers; add --set train.kernels=plain"),
        ("fsdp2", ["model.quantise=nf4"], "--engine fsdp2: not predicted for weights in 4 bits"),
        ("ddp", ["train.accumulation=3"], "train.accumulation: 3 micro-steps cannot be shared evenly by 2"),
    ],
)
def test_launches_that_are_not_planned(engine, overrides, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        plan(load_recipe(ROOT / "recipes" / "7b.yaml", overrides), engine=engine, gpus=2)


def test_refusals(config_only):
    with pytest.raises(ValueError, match="--gpu abacus: unknown; known are h100"):
        plan(make_recipe(), "abacus")
    with pytest.raises(ValueError, match=r"adapter\.targets: cannot plan for lm_head"):
        plan(make_recipe(adapter={"targets": ["lm_head", "q_proj"]}))
    (config_only / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}')
    model = {"path": str(config_only), "family": "converted"}
    broken = Recipe.model_validate(make_recipe().model_dump() | {"model": model})
    with pytest.raises(ValueError, match="does not tell 'vocab_size'"):
        plan(broken)


# --- tried ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_recipe(tmp_path) -> Path:
    """The debug recipe with fused layers and two micro-steps."""
    text = (
        (ROOT / "recipes" / "debug.yaml").read_text().replace("rows: 2", "rows: 2\n  accumulation: 2\n  kernels: fused")
    )
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return path


def test_the_longest_batch_is_tried(small_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = []
    sums = stream_loss_module.StreamLoss.sums

    def watched(self, model, batch):
        batches.append(batch)
        return sums(self, model, batch)

    monkeypatch.setattr(stream_loss_module.StreamLoss, "sums", watched)
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["plan", str(small_recipe), "--probe", "--json"], catch_exceptions=False)
    tried = json.loads(done.stdout)["probe"]
    assert tried["fits"] and tried["step_s"] == pytest.approx(2 * tried["micro_step_s"]) and tried["micro_step_s"] > 0
    assert len(batches) == 4  # one to warm up
    for batch in batches:
        assert batch["num_tokens"] == 2 * 192 and batch["streams"].length == 192
        assert batch["streams"].sparse and batch["streams"].mask
    assert sorted(tmp_path.iterdir()) == before
    shown = CliRunner().invoke(app, ["plan", str(small_recipe), "--probe"], catch_exceptions=False).stdout
    assert "random weights: the longest batch takes" in " ".join(shown.split())
    assert "RANDOM WEIGHTS" in shown


def test_a_batch_that_does_not_fit_says_so(small_recipe, monkeypatch):
    def too_much(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(stream_loss_module.StreamLoss, "sums", too_much)
    done = CliRunner().invoke(app, ["plan", str(small_recipe), "--probe"], catch_exceptions=False)
    assert "the longest batch is out of memory" in " ".join(done.stdout.split())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_probed_model_has_the_size_of_the_planned_one(architecture, monkeypatch):
    found = []
    make = trial_module.random_backbone
    monkeypatch.setattr(trial_module, "random_backbone", lambda *a, **k: found.append(make(*a, **k)) or found[-1])
    recipe = make_recipe(model={"random_weights": LAYER | {"architecture": architecture, "num_layers": 1}})
    probe(recipe, 1)
    assert sum(p.numel() for n, p in found[0].model.named_parameters() if "lora" not in n) == plan(recipe).parameters
