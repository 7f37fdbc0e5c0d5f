"""The engine writes what the plain decoder writes, knows what it cannot do, and reads nothing back it need not."""

import pytest
import torch

from mage_kernels.layout import by_token
from mage_tune.bench.checks import check_engine, check_kernel
from mage_tune.decode.attention import block_forward, extend
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.engine.blocks import Blocks, most_steps
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings, generate
from mage_tune.decode.engine.kernels import Sdpa, page_numbers, pages_of
from mage_tune.decode.engine.weights import SHAPES, random_weights, weights_of
from mage_tune.decode.rules import Exact, Mage, make_rule
from mage_tune.lm import BlockDiffusionLM, from_backbone

ARCHITECTURES = {"converted": "llama", "fast_dllm_v2": "qwen2", "sdar": "qwen3"}
LENGTHS = (21, 3, 16, 40)
COMMON = {"max_new_tokens": 18, "stop_ids": ()}
RULES = {
    "mage": {"budget": 12, "dense_layers": 1},
    "mage, by layer": {
        "attention": "mage",
        "budget": 12,
        "dense_layers": 0,
        "rule_options": {"layer_budgets": {1: 20}},
    },
    "mage, forced": {"attention": "mage", "budget": 12, "dense_layers": 0, "sinks": 1, "recent": 3},
    "mean-query": {"budget": 12, "dense_layers": 1},
    "sparse-dllm": {"budget": 12, "dense_layers": 0},
    "sparsed": {"budget": 16, "dense_layers": 0, "rule_options": {"tile": 16, "skip": 0.3}},
    "quest": {"budget": 12, "dense_layers": 1, "rule_options": {"page_size": 4}},
    "tidal": {"budget": 12, "dense_layers": 0, "rule_options": {"correction_layer": 2}},
}


@pytest.fixture
def engine_lm(tiny_lm):
    """engine_lm(family) -> a tiny model of the family's own architecture."""
    return lambda family, **options: tiny_lm(family, block_size=8, **{"architecture": ARCHITECTURES[family]} | options)


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("rule", ["exact", *RULES])
def test_tokens_of_every_rule(engine_lm, prompts, family, rule):
    lm, batch = engine_lm(family), prompts(LENGTHS)
    options = {"attention": rule} | RULES.get(rule, {}) | COMMON
    expected = lm.generate(batch, **options)
    got = generate(lm, batch, **options)
    assert got.tokens == expected.tokens
    assert [row.finish for row in got.rows] == [row.finish for row in expected.rows]
    assert got.settings == expected.settings
    if rule == "mage, by layer":
        assert got.keys_kept == pytest.approx(expected.keys_kept, rel=0.01)  # steps are counted a little differently
    if rule != "exact":  # the rule has something to say here
        assert expected.tokens != lm.generate(batch, **COMMON).tokens


def test_the_model_offers_it(engine_lm, prompts):
    lm, batch = engine_lm("converted"), prompts(LENGTHS)
    options = {"attention": "mage", "budget": 12} | COMMON
    assert lm.generate(batch, fast=True, **options).tokens == lm.generate(batch, **options).tokens
    with pytest.raises(ValueError, match="no option 'temperature'"):
        lm.generate(batch, fast=True, temperature=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"acceptance": "static", "steps": 4},
        {"acceptance": "static", "steps": 3, "sub_block": 4},
        {"steps": 2},
        {"sub_block": 2},
        {"threshold": 0.0},
        {"threshold": 1.0},
        {"prefill_chunk": 8},
        {"exact_kernel": "sdpa"},
        {"max_new_tokens": 1},
        {"max_new_tokens": 3},
    ],
    ids=str,
)
def test_tokens_of_every_way_to_fill_a_block(engine_lm, prompts, options):
    lm, batch = engine_lm("fast_dllm_v2"), prompts(LENGTHS)
    options = COMMON | {"attention": "mage", "budget": 12, "dense_layers": 1} | options
    plain = {name: option for name, option in options.items() if name != "exact_kernel"}
    assert generate(lm, batch, **options).tokens == lm.generate(batch, **plain).tokens


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_rows_end_by_themselves(engine_lm, prompts, family):
    lm, batch = engine_lm(family), prompts(LENGTHS)
    free = lm.generate(batch, **COMMON).tokens
    for stop in (free[0][0], free[1][7], free[2][-1]):
        options = COMMON | {"stop_ids": (stop,)}
        expected, got = lm.generate(batch, **options), generate(lm, batch, **options)
        assert got.tokens == expected.tokens
        assert [(r.finish, r.blocks) for r in got.rows] == [(r.finish, r.blocks) for r in expected.rows]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("rule", ["exact", "mage", "sparse-dllm", "quest"])
def test_rows_are_counted_as_the_plain_decoder_counts(engine_lm, prompts, family, rule):
    """Where texts end with a block: the engine finishes a block in which the plain decoder stops early."""
    lm, batch = engine_lm(family), prompts((21, 5, 13, 45))
    options = COMMON | {"attention": rule, "max_new_tokens": 19} | RULES.get(rule, {})
    assert generate(lm, batch, **options).rows == lm.generate(batch, **options).rows


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_of_a_step(engine_lm, prompts, family):
    lm = engine_lm(family)
    batch = [ids[: len(ids) // 8 * 8] for ids in prompts((24, 8, 48))]
    block = torch.full((3, 8), lm.family.mask_id)
    block[:, 0] = 7
    cache = PrefixCache.for_model(lm.model, 3, 48)
    extend(lm.model, cache, batch, 8)
    expected = lm.model.get_output_embeddings()(block_forward(lm.model, cache, block))
    engine = Engine(weights_of(lm.model), engine_settings(lm.family, Exact()), 3, 56)
    for row, ids in enumerate(batch):
        engine.prefill(row, ids)
    engine.blocks.lay_out(block)
    engine.plan()
    torch.testing.assert_close(engine.look("exact"), expected)
    torch.testing.assert_close(engine.cache.keys[:, 0, :, :24], cache.keys[:, 0, :, :24])


def test_the_checks_before_a_benchmark_pass_here() -> None:
    cpu, dtype = torch.device("cpu"), torch.float32
    checks = [*check_engine(cpu, dtype), check_kernel("sdpa", cpu, dtype)]
    assert [check for check in checks if not check.is_fine] == []


def test_the_checks_find_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(Sdpa, "attend", lambda self, layer, rows, seen: by_token(rows, 32))
    assert not check_kernel("sdpa", torch.device("cpu"), torch.float32).is_fine


def test_an_attached_adapter_is_merged_into_a_copy(tiny_backbone, tiny_adapter, prompts):
    backbone = tiny_backbone("fast_dllm_v2", block_size=8, architecture="qwen2")
    model = tiny_adapter(backbone)
    lm = BlockDiffusionLM(model, None, backbone.family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = prompts((21, 9))
    got = generate(lm, batch, **COMMON)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert got.tokens == lm.generate(batch, **COMMON).tokens
    with model.disable_adapter():
        assert got.tokens != lm.generate(batch, **COMMON).tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "oracle"}, "no form of the selection rule 'oracle'"),
        ({"attention": "mage-v1"}, "no form of the selection rule 'mage-v1'"),
        ({"attention": "mage", "dense_layers": 3}, "leave no layer"),
        ({"attention": "mage", "dense_layers": 0, "rule_options": {"layer_budgets": {3: 9}}}, "no layer 3"),
        ({"attention": "quest", "budget": 12, "rule_options": {"page_size": 16}}, "whole pages"),
        (
            {"attention": "sparsed", "rule_options": {"ratio": 0.7, "tile": 16}, "dense_layers": 0},
            "rows of equal length",
        ),
        ({"attention": "sparsed", "budget": 24}, "tiles of"),
        ({"acceptance": "entropy"}, "acceptance by entropy"),
        ({"exact_kernel": "theirs"}, "unknown exact kernel 'theirs'"),
        ({"exact_kernel": "flashinfer-fa2"}, "needs a GPU"),
        ({"use_graphs": True}, "CUDA graphs need a GPU"),
    ],
    ids=str,
)
def test_what_it_cannot_do_it_refuses(engine_lm, prompts, options, message):
    lm = engine_lm("sdar")
    with pytest.raises(ValueError, match=message):
        generate(lm, prompts((21, 40)), **COMMON | options)


def test_models_it_does_not_know(tiny_backbone):
    lm = from_backbone(tiny_backbone(architecture="llama"))
    lm.model.config.rope_parameters = lm.model.config.rope_parameters | {"rope_type": "dynamic"}
    with pytest.raises(ValueError, match="changes with the length"):
        weights_of(lm.model)
    lm = from_backbone(tiny_backbone(architecture="llama"))
    lm.model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match="a bias on the attention output"):
        weights_of(lm.model)


def test_nan_is_reported(tiny_backbone, prompts):
    lm = from_backbone(tiny_backbone("sdar", block_size=8, architecture="qwen3"))
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate(lm, prompts((16,)), **COMMON)


def test_a_prompt_that_does_not_fit(engine_lm):
    lm = engine_lm("sdar")
    engine = Engine(weights_of(lm.model), engine_settings(lm.family, Exact()), 1, 16)
    with pytest.raises(ValueError, match="whole blocks of 8"):
        engine.prefill(0, [5] * 9)
    with pytest.raises(ValueError, match="do not fit"):
        engine.prefill(0, [5] * 24)


def test_pages_of_the_cache_are_its_keys():
    """How FlashInfer sees rows and heads: page p of a row holds keys p * page and on of every head."""
    cache = torch.arange(3 * 2 * 24 * 5).view(3, 2, 24, 5)
    pages = pages_of(cache, 8)
    for row in range(3):
        seen = pages[page_numbers(cache, 8, row, 3).long()]  # (3, heads, 8, D)
        assert torch.equal(seen.transpose(0, 1).flatten(1, 2), cache[row])


# --- blocks ---


def test_steps_known_beforehand(engine_lm):
    family = engine_lm("sdar").family
    for steps, masked, expected in ((8, range(8), 8), (3, range(8), 3), (3, range(1, 8), 3), (1, range(8), 1)):
        settings = engine_settings(family, Exact(), steps=steps, acceptance="static")
        assert most_steps(settings, list(masked)) == expected
        blocks = Blocks(settings, 1, torch.device("cpu"), "reference")
        ids = torch.full((1, 8), 9)
        ids[0, list(masked)] = family.mask_id
        blocks.lay_out(ids)
        for step in range(expected):
            assert step == 0 or not blocks.are_done()
            blocks.accept(torch.full((8,), 5), torch.rand(8))
        assert blocks.are_done()


def test_a_step_without_masks_changes_nothing(engine_lm):
    settings = engine_settings(engine_lm("sdar").family, Exact())
    blocks = Blocks(settings, 2, torch.device("cpu"), "reference")
    ids = torch.arange(16).view(2, 8)
    blocks.lay_out(ids)
    blocks.accept(torch.full((16,), 5), torch.ones(16))
    assert torch.equal(blocks.ids, ids)


# --- shapes ---


@pytest.mark.parametrize(
    ("name", "body", "head", "per_token"),
    [("1.5B", 1.310e9, 0.233e9, 28672), ("7B", 6.525e9, 0.545e9, 57344)],
)
def test_published_shapes(name, body, head, per_token):
    shape = SHAPES[name]
    assert shape.matmul_weights == pytest.approx(body + head, rel=1e-3)
    assert shape.kv_per_token * 2 == per_token
    assert shape.stored_weights - shape.matmul_weights == (0 if shape.is_tied else shape.hidden * shape.vocab)


def test_random_weights_fit_their_shape():
    from dataclasses import replace

    shape = replace(SHAPES["SDAR-8B"], num_layers=2, hidden=64, intermediate=48, vocab=99, num_heads=4, num_kv_heads=2)
    weights = random_weights(shape, torch.float32, "cpu")
    matrices = [m for layer in weights.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    assert sum(m.numel() for m in matrices) + weights.head.numel() == shape.matmul_weights
    assert weights.layers[0].query_norm is not None and weights.layers[0].qkv_bias is None


def test_rules_that_the_engine_times_exist():
    for rule in ("mage", "quest", "tidal", "sparsed", "sparse-dllm"):
        assert make_rule(rule, budget=64).is_sparse(65)
    assert Mage(budget=64).select_at(8) == 0
