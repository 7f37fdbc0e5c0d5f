"""A training row's attention against loops, and what alignment terms see of it, with and without recomputation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mage_tune.backbone import hidden_states
from mage_tune.blocks import StreamLayout
from mage_tune.data.collate import Collator
from mage_tune.objectives import block_mean_queries, query_alignment_sum
from mage_tune.recipe_schema import AttentionAlignment, Objective, QueryAlignment, SparseDistillation
from mage_tune.run import enable_checkpointing
from mage_tune.stream_loss import StreamLoss
from mage_tune.streams import FLEX_OPTIONS, LayerView, RowStreams, StreamAttention, cut, exact_attention, flex_options

BATCH, HEADS, KV_HEADS, DIM, SIZE, LENGTH, SCALING = 2, 4, 2, 8, 4, 24, 0.4
BLOCKS, GROUP = LENGTH // SIZE, HEADS // KV_HEADS


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def random_qkv(total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, total, DIM, generator=generator)
    key, value = torch.randn(2, BATCH, KV_HEADS, total, DIM, generator=generator)
    return query, key, value


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Plain attention under a dense mask, grouped heads repeated."""
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    logits = (query @ key.transpose(-1, -2) * SCALING).masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ value


# --- streams of a row ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        RowStreams(LENGTH, SIZE),
        RowStreams(LENGTH, SIZE, mask=True, noisy=2),
        RowStreams(LENGTH, SIZE, sparse=True, mask=True),
        RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=0, student_blocks=2),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_cut_streams_and_the_sum_of_their_gradients_are_those_of_slices(row, transposed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, row.total, HEADS, DIM, generator=generator, dtype=torch.float64).transpose(1, 2)
    x = (x if transposed else x.contiguous()).requires_grad_()
    starts = {"mask": row.offset("mask")} if row.mask else {}
    starts |= {f"noisy {i}": row.offset("noisy", i) for i in range(row.noisy)} | {"clean": row.offset("clean")}
    slices = {"exact": x[:, :, row.sparse_length :]}
    slices |= {name: x[:, :, start : start + LENGTH] for name, start in starts.items()}
    slices |= {"sparse": x[:, :, : row.sparse_length]} if row.sparse else {}
    parts = cut(x, row)
    assert parts.keys() == slices.keys()
    for used in (parts.keys(), parts.keys() - {"exact"}, {"clean"}):
        weights = {name: torch.randn(slices[name].shape, generator=generator, dtype=torch.float64) for name in used}
        ours, theirs = (
            torch.autograd.grad(sum((some[name] * weights[name]).sum() for name in used), x, retain_graph=True)[0]
            for some in (parts, slices)
        )
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == x.stride()
    assert all(parts[name].equal(part) for name, part in slices.items())


# --- attention of a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_noisy", [0, 1, 2, 3])
def test_exact_streams_equal_attention_under_the_dense_mask(num_noisy):
    layout = StreamLayout(num_noisy, LENGTH, SIZE)
    query, key, value = random_qkv(layout.total)
    dense = masked_attention(query, key, value, layout.dense_mask())
    close(exact_attention(query, key, value, layout, SCALING), dense)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize(("num_noisy", "block_size"), [(0, 32), (1, 4), (2, 32), (1, 128)])
def test_flex_attention_equals_the_dense_mask_with_gradients(num_noisy, block_size):
    layout = StreamLayout(num_noisy, 256, block_size)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, layout.total, 32, generator=generator)
    key, value = torch.randn(2, BATCH, KV_HEADS, layout.total, 32, generator=generator)
    grad = torch.randn(query.shape, generator=generator)

    def results(device: str, dtype: torch.dtype, attend) -> list[Tensor]:
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in (query, key, value)]
        out = attend(*leaves)
        out.backward(grad.to(out))
        return [x.detach().cpu().double() for x in (out, *(leaf.grad for leaf in leaves))]

    ours = results("cuda", torch.float32, lambda q, k, v: exact_attention(q, k, v, layout, SCALING))
    exact = results("cpu", torch.float64, lambda q, k, v: masked_attention(q, k, v, layout.dense_mask()))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def slow_row_attention(row: RowStreams, query: Tensor, key: Tensor, value: Tensor, budget: int) -> np.ndarray:
    """Float64 loops over every query of a row: what it sees, then softmax over exactly that."""
    q, k, v = (x.double().numpy() for x in (query, key, value))
    names = ["sparse"] * row.sparse + ["mask"] * row.mask + ["noisy"] * row.noisy + ["clean"]
    clean = (len(names) - 1) * LENGTH
    out = np.zeros_like(q)

    def attention(b: int, head: int, i: int, keys: list[int]) -> np.ndarray:
        logits = np.array([SCALING * q[b, head, i] @ k[b, head // GROUP, j] for j in keys])
        p = np.exp(logits - logits.max())
        return p / p.sum()

    def chosen(b: int, kv_head: int, block: int) -> list[int]:
        """MAGE's choice: prefix keys by mean attention of the mask stream's rows of the group."""
        prefix = [clean + j for j in range(block * SIZE)]
        if not prefix:
            return []
        start = names.index("mask") * LENGTH + block * SIZE
        rows = [(h, i) for h in range(kv_head * GROUP, (kv_head + 1) * GROUP) for i in range(start, start + SIZE)]
        score = np.mean([attention(b, h, i, prefix) for h, i in rows], axis=0)
        best = sorted(range(len(prefix)), key=lambda j: -score[j])[:budget]
        return [prefix[j] for j in best]

    for b, head, i in np.ndindex(BATCH, HEADS, row.total):
        stream, position = divmod(i, LENGTH)
        block = position // SIZE
        own = [stream * LENGTH + j for j in range(block * SIZE, (block + 1) * SIZE)]
        before = [clean + j for j in range(block * SIZE)]
        keys = own + (chosen(b, head // GROUP, block) if names[stream] == "sparse" else before)
        out[b, head, i] = attention(b, head, i, keys) @ v[b, head // GROUP, keys]
    return out


@pytest.mark.parametrize(
    ("row", "budget"),
    [
        (RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=1), 5),
        (RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=2), 1),
        (RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=0), 6),
        (RowStreams(LENGTH, SIZE, mask=True, noisy=1), 0),
    ],
)
def test_a_row_equals_a_slow_oracle(row, budget):
    query, key, value = random_qkv(row.total)
    ours = StreamAttention(row, budget=budget).attend(0, query, key, value, SCALING)
    np.testing.assert_allclose(ours.numpy(), slow_row_attention(row, query, key, value, budget), atol=1e-5)


def sparse_row_with_copied_noise(seed: int = 0) -> tuple[RowStreams, tuple[Tensor, ...]]:
    """[x_t sparse ; x_m ; x_t ; x_0] in which the sparse stream's q, k, v are those of the noisy one."""
    row = RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=1)
    qkv = random_qkv(row.total, seed)
    for x in qkv:
        x[:, :, :LENGTH] = x[:, :, row.offset("noisy") : row.offset("noisy") + LENGTH]
    return row, qkv


@pytest.mark.parametrize("budget", [LENGTH - SIZE, LENGTH, 10 * LENGTH])
def test_a_budget_that_holds_the_prefix_is_exact(budget):
    row, (query, key, value) = sparse_row_with_copied_noise()
    out = StreamAttention(row, budget=budget).attend(0, query, key, value, SCALING)
    noisy = row.offset("noisy")
    close(out[:, :, :LENGTH], out[:, :, noisy : noisy + LENGTH])


def test_a_smaller_budget_is_exact_only_for_blocks_it_covers():
    row, (query, key, value) = sparse_row_with_copied_noise()
    out = StreamAttention(row, budget=2 * SIZE).attend(0, query, key, value, SCALING)
    noisy = row.offset("noisy")
    apart = (out[:, :, :LENGTH] - out[:, :, noisy : noisy + LENGTH]).abs().amax(dim=(0, 1, 3)).view(BLOCKS, SIZE)
    assert apart[:3].max() < 1e-5
    assert apart[3:].min() > 1e-4


def test_a_layer_may_have_a_budget_of_its_own():
    row, qkv = sparse_row_with_copied_noise()
    attention = StreamAttention(row, budget=5, layer_budgets={1: 2})
    for layer, budget in ((0, 5), (1, 2)):
        np.testing.assert_allclose(
            attention.attend(layer, *qkv, SCALING).numpy(), slow_row_attention(row, *qkv, budget), atol=1e-5
        )


def test_dense_layers_give_the_sparse_stream_exact_attention():
    row, (query, key, value) = sparse_row_with_copied_noise()
    attention = StreamAttention(row, budget=1, dense_layers=2)
    noisy = row.offset("noisy")
    for layer, is_dense in ((0, True), (1, True), (2, False)):
        out = attention.attend(layer, query, key, value, SCALING)
        assert out[:, :, :LENGTH].allclose(out[:, :, noisy : noisy + LENGTH], atol=1e-5) == is_dense


def test_sparse_gradients_equal_those_of_masked_attention_over_the_chosen_keys():
    row, qkv = sparse_row_with_copied_noise(seed=3)
    budget = 6
    dense = torch.zeros(BATCH, HEADS, LENGTH, row.total, dtype=torch.bool)
    clean = row.offset("clean")
    query, key, _ = qkv
    for b, head, block in np.ndindex(BATCH, HEADS, BLOCKS):
        at = slice(block * SIZE, (block + 1) * SIZE)
        dense[b, head, at, at] = True
        if block == 0:
            continue
        rows = query[b, head // GROUP * GROUP : (head // GROUP + 1) * GROUP, LENGTH + at.start : LENGTH + at.stop]
        p = (rows @ key[b, head // GROUP, clean : clean + at.start].T * SCALING).softmax(-1).mean((0, 1))
        dense[b, head, at, clean + p.topk(min(budget, at.start)).indices] = True

    def gradients(attend) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = attend(*leaves)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        return [out.detach(), *(x.grad for x in leaves)]

    attention = StreamAttention(row, budget=budget)
    ours = gradients(lambda q, k, v: attention.attend(0, q, k, v, SCALING)[:, :, :LENGTH])
    expected = gradients(lambda q, k, v: masked_attention(q[:, :, :LENGTH], k, v, dense))
    for a, b in zip(ours, expected, strict=True):
        close(a, b)
    mask_queries = ours[1][:, :, LENGTH : 2 * LENGTH]
    assert not mask_queries.any(), "the choice itself is not differentiated"


def test_offsets_follow_the_order_of_a_row():
    row = RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=2)
    names = [("sparse", 0), ("mask", 0), ("noisy", 0), ("noisy", 1), ("clean", 0)]
    assert [row.offset(*name) // LENGTH for name in names] == [0, 1, 2, 3, 4]
    assert row.total == 5 * LENGTH
    assert RowStreams(LENGTH, SIZE, noisy=0).offset("clean") == 0


# --- through a model -------------------------------------------------------------------------------------------------


def run(model, row: RowStreams, *streams: Tensor, **options) -> Tensor:
    """Hidden states of a row whose streams hold the given (batch, length) tokens."""
    ids = torch.cat(streams, dim=1)
    positions = torch.arange(row.length).repeat(len(streams)).expand(len(ids), -1)
    return hidden_states(model, ids, positions, StreamAttention(row, **options).attend)


@pytest.fixture
def tokens():
    """Noisy, all-mask and clean tokens of two rows."""
    clean = torch.randint(4, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    return clean.where(~hidden, 63), torch.full_like(clean, 63), clean


def test_other_streams_leave_the_noisy_and_clean_ones_as_they_were(tiny_backbone, tokens):
    model = tiny_backbone().model
    noisy, mask, clean = tokens
    plain = run(model, RowStreams(LENGTH, SIZE), noisy, clean)
    with_mask = run(model, RowStreams(LENGTH, SIZE, mask=True), mask, noisy, clean)
    close(with_mask[:, LENGTH:], plain, 1e-6)
    with_sparse = run(
        model, RowStreams(LENGTH, SIZE, sparse=True, mask=True), noisy, mask, noisy, clean, budget=3, dense_layers=1
    )
    close(with_sparse[:, LENGTH:], with_mask, 1e-6)


def test_a_sparse_stream_with_the_whole_prefix_is_the_noisy_one_through_all_layers(tiny_backbone, tokens):
    noisy, mask, clean = tokens
    row = RowStreams(LENGTH, SIZE, sparse=True, mask=True)
    out = run(tiny_backbone().model, row, noisy, mask, noisy, clean, budget=LENGTH)
    close(out[:, :LENGTH], out[:, 2 * LENGTH : 3 * LENGTH])
    starved = run(tiny_backbone().model, row, noisy, mask, noisy, clean, budget=1)
    assert (starved[:, :LENGTH] - starved[:, 2 * LENGTH : 3 * LENGTH]).abs().max() > 1e-3


def test_the_clean_stream_is_the_block_causal_forward(tiny_backbone, tokens):
    model = tiny_backbone().model
    noisy, mask, clean = tokens
    alone = run(model, RowStreams(LENGTH, SIZE, noisy=0), clean)
    close(run(model, RowStreams(LENGTH, SIZE, mask=True), mask, noisy, clean)[:, 2 * LENGTH :], alone, 1e-6)


# --- what alignment terms see ----------------------------------------------------------------------------------------


def test_a_layer_view_holds_each_streams_queries_and_the_clean_keys():
    row = RowStreams(LENGTH, SIZE, sparse=True, mask=True, noisy=2)
    query, key, value = random_qkv(row.total)
    query += torch.arange(row.total // LENGTH).repeat_interleave(LENGTH)[:, None] * 100.0  # marks the stream
    seen: list[LayerView] = []

    def observe(view: LayerView) -> Tensor:
        seen.append(view)
        return torch.zeros(())

    attention = StreamAttention(row, budget=2, observers={"term": (0, observe)}, needs_gradient=False)
    attention.attend(0, query, key, value, SCALING)
    (view,) = seen
    assert view.mask_rows.shape == (BATCH, KV_HEADS, BLOCKS, GROUP * SIZE, DIM)
    assert [int(rows.mean() / 100 + 0.5) for rows in (view.mask_rows, *view.later_rows)] == [1, 2, 3]
    assert view.clean_key.equal(key[:, :, 4 * LENGTH :])
    assert view.scaling == SCALING


def test_aligned_streams_cost_nothing(tiny_backbone, tokens):
    """When the later step is the all-mask step itself, every layer's query distance is zero."""
    _, mask, clean = tokens

    def distance(later: Tensor) -> Tensor:
        def observe(view: LayerView) -> Tensor:
            counted = torch.ones(2, BLOCKS, dtype=torch.bool)
            return query_alignment_sum(
                block_mean_queries(view.mask_rows), block_mean_queries(view.later_rows[0]), counted
            )

        ids = torch.cat([mask, later, clean], dim=1)
        positions = torch.arange(LENGTH).repeat(3).expand(2, -1)
        with torch.no_grad():
            attention = StreamAttention(RowStreams(LENGTH, SIZE, mask=True), observers={"query": (0, observe)})
            hidden_states(tiny_backbone().model, ids, positions, attention.attend)
        assert len(attention.observed["query"]) == 3
        return attention.mean_over_layers("query")

    assert distance(mask).abs() < 1e-4
    assert distance(clean) > 0.1


ALL_TERMS = Objective(
    query_alignment=QueryAlignment(weight=1.0, skip_layers=1),
    attention_alignment=AttentionAlignment(weight=0.5, blocks=3, skip_layers=0),
    sparse_distillation=SparseDistillation(weight=1.0, budget=6, dense_layers=1),
)


@pytest.fixture
def gradients(tiny_backbone, tiny_adapter, make_examples):
    """gradients(objective, checkpointing) -> (model, term values) after one backward pass of every term."""

    def compute(objective: Objective = ALL_TERMS, checkpointing: bool | None = None, family: str = "converted"):
        backbone = tiny_backbone(family)
        if checkpointing is not None:
            enable_checkpointing(backbone.model, use_reentrant=checkpointing)
        model = tiny_adapter(backbone).train()
        loss = StreamLoss(objective)
        batch = Collator(backbone.family, 0, **loss.collator_needs())(make_examples((24, 3), (21, 9)))
        sums = loss.sums(model, batch)
        items = loss.items(batch).tolist()
        weighted = [w * sums[n] / i for (n, w), i in zip(loss.weights.items(), items, strict=True)]
        torch.stack(weighted).sum().backward()
        return model, {name: value.item() for name, value in sums.items()}

    return compute


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar", "converted"])
def test_only_adapter_parameters_get_gradient(gradients, family):
    model, sums = gradients(family=family)
    assert all(np.isfinite(value) for value in sums.values())
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(p.grad.any() for _, p in model.named_parameters() if p.grad is not None)


def test_recomputation_changes_no_value_and_no_gradient(gradients):
    plain, sums = gradients()
    recomputed, sums_again = gradients(checkpointing=False)
    assert sums == sums_again
    for (name, p), (_, q) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        if p.requires_grad:
            assert p.grad.equal(q.grad), name


@pytest.mark.parametrize("name", ["query_alignment", "attention_alignment"])
def test_alignment_alone_trains_through_recomputation(gradients, name):
    terms = ALL_TERMS.model_dump()
    for other in terms.keys() - {name}:
        terms[other]["weight"] = 0.0
    objective = Objective.model_validate(terms)
    for checkpointing in (None, False):
        model, _ = gradients(objective, checkpointing)
        queries = [p.grad for n, p in model.named_parameters() if "q_proj.lora" in n]
        assert all(g is not None and g.abs().max() > 0 for g in queries[2:])


def test_reentrant_recomputation_is_refused(gradients):
    with pytest.raises(RuntimeError, match="queries carry no gradient"):
        gradients(checkpointing=True)


def test_layers_whose_queries_no_adapter_reaches_can_be_skipped_but_not_aligned(
    tiny_backbone, tiny_adapter, make_examples
):
    backbone = tiny_backbone()
    model = tiny_adapter(backbone, targets=["o_proj"]).train()  # layer 0's queries come before any adapter

    def align(skip_layers: int) -> Tensor:
        loss = StreamLoss(Objective(query_alignment=QueryAlignment(weight=1.0, skip_layers=skip_layers)))
        batch = Collator(backbone.family, 0, **loss.collator_needs())(make_examples((24, 0)))
        return loss.sums(model, batch)["query_alignment"]

    assert align(skip_layers=1).requires_grad
    with pytest.raises(RuntimeError, match="layer 0: queries carry no gradient"):
        align(skip_layers=0)
    with pytest.raises(ValueError, match="query_alignment: skip_layers leaves out every layer"):
        align(skip_layers=3)


def test_a_layer_that_runs_twice_counts_once(tiny_backbone, tiny_adapter, tokens):
    noisy, mask, clean = tokens
    backbone = tiny_backbone()
    enable_checkpointing(backbone.model)
    model = tiny_adapter(backbone).train()
    calls = []

    def observe(view: LayerView) -> Tensor:
        calls.append(view.mask_rows.requires_grad)
        return block_mean_queries(view.mask_rows).square().sum()

    attention = StreamAttention(RowStreams(LENGTH, SIZE, mask=True), observers={"term": (1, observe)})
    ids, positions = torch.cat([mask, noisy, clean], dim=1), torch.arange(LENGTH).repeat(3).expand(2, -1)
    hidden = hidden_states(model, ids, positions, attention.attend)
    before = dict(attention.observed["term"])
    assert calls == [True, True]  # layers 1 and 2
    (attention.mean_over_layers("term") + hidden.sum()).backward()
    assert calls == [True] * 4, "every layer was recomputed, with gradient"
    assert attention.observed["term"].keys() == {1, 2}
    assert all(attention.observed["term"][layer] is before[layer] for layer in before)


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), FLEX_OPTIONS[64]),
        (torch.bfloat16, 128, (9, 0), FLEX_OPTIONS[128]),
        (torch.bfloat16, 96, (9, 0), None),
        (torch.float32, 64, (9, 0), None),
        (torch.bfloat16, 64, (8, 9), None),
    ],
)
def test_tiles_of_flex_attention_are_those_that_were_measured(monkeypatch, dtype, dim, capability, expected):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert flex_options(torch.empty(1, 1, 8, dim, dtype=dtype)) == expected
