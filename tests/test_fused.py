"""Fused layers against transformers' and PEFT's own: values, gradients, what autograd keeps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mage_tune.run as run_module
from mage_tune.backbone import hidden_states
from mage_tune.data.collate import Collator
from mage_tune.fused import fuse, layers, product
from mage_tune.fused.elementwise import (
    add_norm_into,
    normed_rotated,
    normed_turned_back_into,
    rms_norm,
    rms_norm_backward,
    rotated,
    rotated_apart,
    swiglu,
    swiglu_backward_into,
    turned_back_into,
)
from mage_tune.recipe import RecipeError, load_recipe
from mage_tune.recipe_schema import Objective
from mage_tune.run import enable_checkpointing
from mage_tune.stream_loss import StreamLoss
from mage_tune.streams import RowStreams, StreamAttention

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVE = Objective.model_validate(
    {
        "diffusion": {"weight": 1.0},
        "query_alignment": {"weight": 0.5, "skip_layers": 1},
        "attention_alignment": {"weight": 0.25, "blocks": 3, "skip_layers": 0},
        "sparse_distillation": {"weight": 2.0, "budget": 8, "dense_layers": 1},
    }
)
EVERY_KEY = OBJECTIVE.model_copy(
    update={"sparse_distillation": OBJECTIVE.sparse_distillation.model_copy(update={"budget": 64})}
)
"""The student keeps all keys: rounding cannot make it choose others, which would be a jump."""
MODES = [("nothing", False), ("mlp", False), ("layer", False), ("layer", True)]


def gradients(model, batch, objective=OBJECTIVE) -> dict[str, Tensor]:
    """The objective's sums under "sum ...", and the gradient of every trained parameter."""
    sums = StreamLoss(objective).sums(model.train(), batch)
    sum(value for name, value in sums.items() if name != "sparse_share").backward()
    found = {f"sum {name}": value.detach() for name, value in sums.items()}
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def pair(tiny_backbone, tiny_adapter, make_examples):
    """pair(prepare, ...) -> what two equal models find on the same batch, the second one prepared."""

    def compare(prepare, *, dtype=torch.float64, shape=None, **adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = []
        for change in (None, prepare):
            backbone = tiny_backbone("converted", **shape or {})
            if change is enable_offloaded:
                change(backbone.model)
            model = tiny_adapter(backbone, **adapter).to(dtype)
            if change not in (None, enable_offloaded):
                change(model)
            batch = Collator(backbone.family, 0, **StreamLoss(OBJECTIVE).collator_needs())(
                make_examples((24, 3), (20, 0))
            )
            found.append(gradients(model, batch))
        return found[0], found[1]

    return compare


def enable_offloaded(model) -> None:
    enable_checkpointing(model, offload=True)


def assert_equal(plain: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == plain.keys() and len(plain) > 20
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance * float(value.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("recompute", "offload"), MODES)
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_sums_and_gradients_are_those_of_plain_layers(pair, architecture, recompute, offload, kept_bytes):
    plain, ours = pair(
        lambda m: fuse(m, recompute, offload=offload, kept_bytes=kept_bytes), shape={"architecture": architecture}
    )
    assert_equal(plain, ours, 1e-5)  # alignment runs in float32 whatever the model's precision


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "k_proj", "down_proj"], ["q_proj", "o_proj", "up_proj"]])
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_adapters_on_some_layers(pair, targets, kept_bytes):
    plain, ours = pair(lambda m: fuse(m, kept_bytes=kept_bytes), targets=targets)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
    assert ours.keys() == plain.keys()


def test_kept_products_follow_weights_and_adapters(tiny_backbone, tiny_adapter):
    ids, row, found = torch.full((1, 64), 7), RowStreams(32, 4, noisy=1), []
    for change in (None, fuse):
        model = tiny_adapter(tiny_backbone("converted", num_layers=2)).double()
        if change is not None:
            change(model)  # keeps, as the model is small
        for seed in (0, 1):
            with torch.no_grad():
                for p in model.parameters() if seed else ():
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double()
            found.append(hidden_states(model.train(), ids, torch.arange(64)[None], StreamAttention(row).attend))
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[0], found[1], rtol=0.1)


@pytest.mark.parametrize("changed", ["lora_A", "lora_B", "base_layer"])
def test_kept_products_follow_steps_of_an_optimizer(tiny_backbone, tiny_adapter, changed):
    """In the backward pass too, whose matrices are others: gradients after a step are those of plain layers."""
    generator = torch.Generator().manual_seed(0)
    ids, row, found = torch.randint(6, 60, (1, 64), generator=generator), RowStreams(32, 4, noisy=1), []
    weight = torch.randn(1, 64, 32, generator=generator).double()
    for change in (None, fuse):
        model = tiny_adapter(tiny_backbone("converted", num_layers=2)).double()
        if change is not None:
            change(model)
        for is_last in (False, True):
            model.zero_grad()
            out = hidden_states(model.train(), ids, torch.arange(64)[None], StreamAttention(row).attend)
            (out * weight).sum().backward()
            with torch.no_grad():
                for name, p in model.named_parameters() if not is_last else ():
                    if changed in name:
                        p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "width"), [(24, 40), (24, 8), (23, 8), (24, 3), (24, 0)])
def test_rows_are_copied_bit_by_bit(dtype, size, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, width, generator=generator).to(dtype)
    x[::2] = torch.nan
    wide = torch.zeros(6, size + width, dtype=dtype)
    product.copy_rows(wide[:, size:], x)
    assert torch.equal(wide[:, size:].nan_to_num(7.0), x.nan_to_num(7.0)) and not wide[:, :size].any()


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("has_adapters", [[True, False, True], [False, False, False]])
def test_both_ways_to_the_gradient_of_an_input_are_one(is_kept, has_adapters):
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = []
    for is_stacked in (False, True):
        generator = torch.Generator().manual_seed(0)
        linears, adapters = [], []
        for has_adapter in has_adapters:
            linear = torch.nn.Linear(16, 24).requires_grad_(False).double()
            linear.weight.copy_(normal(24, 16))
            linears.append(product.Frozen(linear, 0.5, has_adapter))
            adapters += [normal(5, 16), normal(24, 5)] if has_adapter else []
        made = product.Product(linears, adapters, torch.float64, is_kept, is_stacked)
        product.refresh([made])
        wide, grad = product.room_for_gradient(linears[0].base.weight, 7, made)
        grad.copy_(normal(7, 72))
        found.append(product.gradient_of_input(wide, made))
    torch.testing.assert_close(found[1], found[0])
    x, inner = found[0]
    assert x.shape == (7, 16) and inner.shape == (7, 8 * sum(has_adapters))


@pytest.mark.parametrize("rank", [1, 5, 8, 36])
@pytest.mark.parametrize("recompute", ["nothing", "layer"])
def test_ranks_that_are_no_multiples_of_eight(pair, rank, recompute):
    plain, ours = pair(lambda m: fuse(m, recompute), rank=rank)
    assert_equal(plain, ours, 1e-5)


def test_products_see_rows_of_whole_16_bytes(tiny_backbone, tiny_adapter, monkeypatch):
    """Else cuBLAS falls back to the slower kernels of older GPUs."""
    model = tiny_adapter(tiny_backbone("converted", num_layers=1), rank=5).bfloat16()
    fuse(model)
    operands: list[Tensor] = []
    for name in ("mm", "addmm_", "__matmul__"):
        owner = torch if name == "mm" else Tensor
        multiply = getattr(owner, name)

        def seen(*args, multiply=multiply, **kwargs):
            operands.extend([*args, *kwargs.values()])
            return multiply(*args, **kwargs)

        monkeypatch.setattr(owner, name, seen)
    ids, row = torch.full((1, 64), 7), RowStreams(32, 4, noisy=1)
    hidden_states(model.train(), ids, torch.arange(64)[None], StreamAttention(row).attend).sum().backward()
    assert len(operands) > 40
    assert {max(x.stride()) % 8 for x in operands if x.dim() == 2} == {0}


def test_rank_stabilised_scaling_and_the_mask_embedding(pair):
    plain, ours = pair(fuse, rslora=True, train_mask_embedding=True)
    assert_equal(plain, ours, 1e-5)
    assert any("token_adapter" in name for name in ours)


@pytest.fixture
def gradients_on(tiny_backbone, tiny_adapter, make_examples):
    """gradients_on(device, lengths) -> those of fused layers."""

    def find(device: str, lengths: tuple[int, ...]) -> dict[str, Tensor]:
        backbone = tiny_backbone("converted")
        model = tiny_adapter(backbone, rank=5).to(device)
        fuse(model)
        collator = Collator(backbone.family, 0, **StreamLoss(EVERY_KEY).collator_needs())
        batch = collator(make_examples(*((length, 3) for length in lengths)))
        batch = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        return {name: x.cpu() for name, x in gradients(model, batch, EVERY_KEY).items()}

    return find


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_compiled_kernels_give_the_gradients_of_a_cpu(gradients_on):
    """For several numbers of rows, so that kernels for any number are compiled too."""
    for lengths in ((24, 20), (40, 36), (56, 52)):
        assert_equal(gradients_on("cpu", lengths), gradients_on("cuda", lengths), 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_lengths_seen_before_compile_nothing(gradients_on):
    """Else a run would halt in its middle, for seconds, whenever a length comes back."""
    seen = ((24, 20), (40, 36), (56, 52))
    for lengths in seen:
        gradients_on("cuda", lengths)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in seen:
            gradients_on("cuda", lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_in_a_pass_waits_for_the_device(tiny_backbone, tiny_adapter, make_examples):
    """The host would launch the next kernel only when the device has run out of them."""
    backbone = tiny_backbone("converted", tie_embeddings=True)
    model = tiny_adapter(backbone, rank=5, train_mask_embedding=True).to("cuda")
    fuse(model)
    batch = Collator(backbone.family, 0)(make_examples((128, 3), (120, 0)))
    batch = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in batch.items()}
    objective = Objective.model_validate({"diffusion": {"weight": 1.0}})
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gradients(model, batch, objective)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offloaded_inputs_of_plain_layers_change_nothing(pair):
    plain, ours = pair(enable_offloaded)
    assert_equal(plain, ours, 1e-12)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_as_near_to_exact_ones(tiny_backbone, tiny_adapter, make_examples, weights):
    """The error of bfloat16, measured against float64: fused layers may not add to it."""

    def found(dtype: torch.dtype, change=None, autocast: bool = False) -> dict[str, Tensor]:
        backbone = tiny_backbone("converted", architecture="qwen2")
        model = tiny_adapter(backbone)
        model.to(dtype) if dtype == torch.float64 else backbone.model.to(weights)
        if dtype != torch.float64:
            for name, p in model.named_parameters():
                if "lora" in name:
                    p.data = p.data.float()
        if change:
            change(model)
        batch = Collator(backbone.family, 0, **StreamLoss(OBJECTIVE).collator_needs())(make_examples((24, 3)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(model, batch, EVERY_KEY)

    exact = found(torch.float64)

    def error(values: dict[str, Tensor]) -> float:
        names = [name for name in exact if "lora" in name]
        assert all(values[name].dtype == torch.float32 for name in names)
        apart = sum((values[name].double() - exact[name]).square().sum() for name in names)
        return float((apart / sum(exact[name].square().sum() for name in names)).sqrt())

    plain, ours = (error(found(torch.float32, change, True)) for change in (None, fuse))
    assert 0 < ours < 1.5 * plain + 1e-3


def test_elementwise_gradients_are_derivatives():
    generator = torch.Generator().manual_seed(0)
    x, gate, up, grad = torch.randn(4, 5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    (expected,) = torch.autograd.grad(rms_norm(x, weight, 1e-6, torch.float64), x, grad)
    normed = rms_norm(x, weight, 1e-6, torch.float64)
    torch.testing.assert_close(rms_norm_backward(grad, x, weight, 1e-6, up), (expected + up, normed))
    of_gate, of_up = torch.autograd.grad(swiglu(gate, up), (gate, up), grad)
    found = torch.empty(2, *x.shape, dtype=x.dtype)
    product = swiglu_backward_into(*found, *(part.detach() for part in (grad, gate, up)))
    torch.testing.assert_close((product, *found), (swiglu(gate, up), of_gate, of_up))
    total = add_norm_into(found[0], x.detach(), up.detach(), weight, 1e-6)
    torch.testing.assert_close((total, found[0]), (x + up, rms_norm(x + up, weight, 1e-6, torch.float64)))


@pytest.mark.parametrize("heads", [(3, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_gradients_of_rotated_heads_are_written_side_by_side(heads, has_norms):
    """Into columns of a wider matrix, as the product before them reads them."""
    batch, n, size, room = 2, 5, 8, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [normal(batch, h, n, size).requires_grad_() for h in heads]
    grads = [normal(*x.shape) for x in inputs]
    angle = normal(1, 1, n, size // 2).repeat(1, 1, 1, 2)
    rotary, gains = (angle.cos(), angle.sin()), (1 + normal(size), 1 + normal(size), 1e-6)
    wide = torch.full((batch * n, sum(heads) * size + room), torch.nan, dtype=torch.float64)
    joined = wide[:, :-room].view(batch, n, -1, size)
    if has_norms:
        out = *normed_rotated(*inputs[:2], *gains, *rotary), inputs[2].clone()
        parts, unturned = joined.transpose(1, 2).split(heads, dim=1), [x.detach() for x in inputs[:2]]
        normed_turned_back_into(*parts, *grads, *unturned, *gains, *rotary)
    else:
        out = rotated_apart(*inputs, *rotary)
        turned_back_into(joined, *grads, *rotary)
    expected = torch.cat([x.transpose(1, 2) for x in torch.autograd.grad(out, inputs, grads)], dim=2)
    torch.testing.assert_close(joined, expected)
    assert wide[:, -room:].isnan().all()


def test_rotation_is_transformers_own():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 7, 8, generator=generator), torch.randn(2, 1, 7, 8, generator=generator)
    angle = torch.randn(1, 7, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(rotated(query, key, cos[:, None], sin[:, None]), expected)


def kept_bytes(model, length: int) -> int:
    """Bytes of distinct storages that autograd keeps in a forward pass, parameters apart."""
    kept: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in owned and x.numel() >= length:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(6, 60, (1, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = hidden_states(model.train(), ids, torch.arange(length)[None], lambda layer, q, k, v, scaling: q * 1)
    assert out.requires_grad
    return sum(kept.values())


def test_fused_layers_keep_about_half_and_less_with_the_feed_forward_recomputed(tiny_backbone, tiny_adapter):
    shape = {"architecture": "qwen2", "num_layers": 2, "intermediate_size": 160}
    kept = {}
    for name, change in {
        "plain": lambda m: None,
        "nothing": fuse,
        "mlp": lambda m: fuse(m, "mlp"),
        "layer": lambda m: fuse(m, "layer"),
    }.items():
        model = tiny_adapter(tiny_backbone("converted", **shape))
        change(model)
        kept[name] = kept_bytes(model, 1024)
    assert kept["nothing"] < 0.62 * kept["plain"]
    assert kept["mlp"] < 0.55 * kept["nothing"]
    assert kept["layer"] < 0.5 * kept["mlp"]


def test_the_last_product_is_not_recomputed(tiny_backbone, tiny_adapter, monkeypatch):
    model = tiny_adapter(tiny_backbone("converted", num_layers=1))
    fuse(model, "layer", kept_bytes=0)
    products: list[tuple[int, int]] = []
    weight = product.Frozen.weight

    def counted(self, dtype):
        products.append(tuple(self.base.weight.shape))
        return weight(self, dtype)

    monkeypatch.setattr(product.Frozen, "weight", counted)
    row = RowStreams(32, 4, noisy=1)
    out = hidden_states(model.train(), torch.full((1, 64), 7), torch.arange(64)[None], StreamAttention(row).attend)
    assert products.count((32, 48)) == 1  # down_proj, forward
    out.sum().backward()
    assert products.count((32, 48)) == 2  # its input gradient: no recomputation
    assert products.count((48, 32)) == 6  # gate and up: forward, again, input gradient


def test_an_adapter_that_is_off_is_off(tiny_backbone, tiny_adapter):
    backbone = tiny_backbone("converted")
    ids, row = torch.full((1, 64), 7), RowStreams(32, 4, noisy=1)

    def states(model) -> Tensor:
        with torch.no_grad():
            return hidden_states(model, ids, torch.arange(64)[None], StreamAttention(row).attend)

    bare = states(backbone.model)
    model = tiny_adapter(backbone)
    fuse(model)
    assert not torch.allclose(states(model), bare)
    with model.disable_adapter():
        torch.testing.assert_close(states(model), bare)


def test_decoding_goes_the_plain_way(tiny_backbone, tiny_adapter, monkeypatch):
    model = tiny_adapter(tiny_backbone("converted")).eval()
    ids = torch.randint(6, 60, (1, 16))
    before = model(input_ids=ids).logits
    fuse(model)
    monkeypatch.setattr(layers, "layer_forward", None)  # would fail if it were called
    assert model(input_ids=ids).logits.equal(before)


@pytest.mark.parametrize("adapter", [{"dora": True}, {"dropout": 0.1}])
def test_adapters_of_other_arithmetic_are_refused(tiny_backbone, tiny_adapter, adapter):
    model = tiny_adapter(tiny_backbone("converted"), **adapter)
    with pytest.raises(ValueError, match="fused has neither DoRA nor dropout"):
        fuse(model)


def test_random_weights_are_said_loudly(tmp_path, capsys):
    short = ["train.steps=1", "data.length=64", "objective.sparse_distillation.budget=16", f"output={tmp_path / 'run'}"]
    run_module.train(load_recipe(ROOT / "recipes" / "debug.yaml", [*short, "train.kernels=fused"]))
    assert "RANDOM WEIGHTS" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["weights"].startswith("RANDOM")


def test_zero3_is_refused(tiny_backbone, monkeypatch):
    monkeypatch.setattr(run_module, "is_deepspeed_zero3_enabled", lambda: True)
    recipe = load_recipe(ROOT / "recipes" / "debug.yaml", ["train.kernels=fused"])
    with pytest.raises(ValueError, match="ZeRO-3 keeps spread over the processes; write plain, or launch with fsdp2"):
        run_module.build_adapter(tiny_backbone("converted"), recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.checkpointing=mlp"], "plain, but checkpointing 'mlp' is a choice of fused layers"),
        (["train.kernels=fused", "train.checkpointing=reentrant"], "fused layers are not recomputed that way"),
        (["train.offload=true"], "only recomputed layers have inputs to hold"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes, message):
    off = [f"objective.{name}.weight=0" for name in ("query_alignment", "attention_alignment", "sparse_distillation")]
    with pytest.raises(RecipeError, match=message):
        load_recipe(ROOT / "recipes" / "debug.yaml", [*off, *changes])
