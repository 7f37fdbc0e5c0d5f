"""Every term of the loss against a slow transcription in float64, values and gradients."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mage_tune import objectives
from mage_tune.objectives import (
    attention_alignment_sum,
    block_mean_queries,
    cross_entropy_sum,
    kl_sum,
    query_alignment_sum,
    undo_rotary,
)
from mage_tune.selection import packed_rows

ROWS, HIDDEN, VOCAB = 7, 5, 11
BATCH, HEADS, BLOCKS, DIM, KEYS = 2, 3, 4, 6, 9


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(array: np.ndarray, *, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(dtype).requires_grad_(grad)


def probabilities(rng: np.random.Generator, *shape: int) -> np.ndarray:
    p = np.exp(3 * rng.normal(size=shape))
    return p / p.sum(-1, keepdims=True)


@pytest.fixture
def head():
    layer = nn.Linear(HIDDEN, VOCAB)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    return [x - top - math.log(total) for x in logits]


def log_probabilities(head: nn.Linear, row: np.ndarray) -> list[float]:
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    return log_softmax([float(weight[v] @ row + bias[v]) for v in range(VOCAB)])


def numerical_gradient(function, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of a float64 function of an array."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


# --- cross-entropy and KL of hidden rows -----------------------------------------------------------------------------


def slow_cross_entropy(head: nn.Linear, hidden: np.ndarray, targets: list[int], weights: np.ndarray) -> float:
    terms = [-w * log_probabilities(head, row)[t] for row, t, w in zip(hidden, targets, weights, strict=True)]
    return math.fsum(terms)


def slow_kl(head: nn.Linear, first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    total = 0.0
    for a, b, w in zip(first, second, weights, strict=True):
        p, q = log_probabilities(head, a), log_probabilities(head, b)
        total += w * math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))
    return total


def test_cross_entropy_equals_a_slow_transcription(rng, head):
    hidden, targets = rng.normal(size=(ROWS, HIDDEN)), rng.integers(0, VOCAB, ROWS)
    weights = rng.uniform(0, 3, ROWS)
    rows = tensor(hidden, grad=True)
    loss = cross_entropy_sum(rows, head, torch.from_numpy(targets), tensor(weights))
    assert loss.item() == pytest.approx(slow_cross_entropy(head, hidden, targets, weights), rel=1e-5)
    loss.backward()
    slow = numerical_gradient(lambda x: slow_cross_entropy(head, x, targets, weights), hidden)
    np.testing.assert_allclose(rows.grad.numpy(), slow, atol=1e-5)


def test_unit_weights_are_plain_cross_entropy(rng, head):
    hidden, targets = tensor(rng.normal(size=(ROWS, HIDDEN))), torch.from_numpy(rng.integers(0, VOCAB, ROWS))
    ours = cross_entropy_sum(hidden, head, targets, torch.ones(ROWS))
    torch.testing.assert_close(ours, F.cross_entropy(head(hidden), targets, reduction="sum"))


@given(st.integers(0, 9), st.integers(1, 12))
def test_chunks_change_neither_value_nor_gradient(num_rows, chunk):
    generator = torch.Generator().manual_seed(num_rows)
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator)
    teacher = torch.randn(num_rows, HIDDEN, generator=generator)
    targets = torch.randint(VOCAB, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator)

    def results(chunk: int) -> list[Tensor]:
        rows = hidden.clone().requires_grad_()
        head.zero_grad()
        loss = cross_entropy_sum(rows, head, targets, weights, chunk)
        loss = loss + kl_sum(rows, teacher, head, weights, chunk=chunk)
        loss.backward()
        empty = torch.zeros_like(head.weight)
        return [loss.detach(), rows.grad, empty if head.weight.grad is None else head.weight.grad.clone()]

    for ours, whole in zip(results(chunk), results(num_rows + 1), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


def test_gradients_under_bfloat16_are_as_near_to_exact_ones_as_plain_cross_entropy_s(rng):
    """The error of bfloat16 against float64, of rows and of a trained head; the loss is scaled as a step scales it."""
    vocab, rows = 300, 200
    hidden, weight = rng.normal(size=(rows, 16)), rng.normal(size=(vocab, 16))
    targets, weights = torch.from_numpy(rng.integers(0, vocab, rows)), tensor(rng.uniform(0.5, 2, rows))

    def found(dtype: torch.dtype, loss) -> list[Tensor]:
        head = nn.Linear(16, vocab, bias=False)
        head.weight = nn.Parameter(tensor(weight).to(torch.bfloat16).to(dtype))
        states = tensor(hidden).to(torch.bfloat16).to(dtype).requires_grad_()
        (loss(states, head) / 77).backward()
        return [states.grad.double(), head.weight.grad.double()]

    def plain(states: Tensor, head: nn.Linear) -> Tensor:
        logits = head(states)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (F.cross_entropy(wide, targets, reduction="none") * weights).sum()

    exact = found(torch.float64, plain)
    theirs = found(torch.bfloat16, plain)
    ours = found(torch.bfloat16, lambda states, head: cross_entropy_sum(states, head, targets, weights))
    for right, a, b in zip(exact, ours, theirs, strict=True):
        assert 0 < (a - right).norm() < 1.2 * (b - right).norm()


def test_a_frozen_head_and_evaluation_make_only_the_gradients_they_need(rng, head):
    hidden, targets = rng.normal(size=(ROWS, HIDDEN)), torch.from_numpy(rng.integers(0, VOCAB, ROWS))
    rows = tensor(hidden, grad=True)
    with torch.no_grad():
        value = cross_entropy_sum(rows, head, targets, torch.ones(ROWS))
    assert not value.requires_grad
    head.requires_grad_(False)
    assert not cross_entropy_sum(tensor(hidden), head, targets, torch.ones(ROWS)).requires_grad
    loss = cross_entropy_sum(rows, head, targets, torch.ones(ROWS))
    loss.backward()
    assert loss.item() == value.item()
    assert rows.grad.abs().max() > 0
    assert head.weight.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("loss", ["cross-entropy", "teacher first", "student first"])
def test_compiled_losses_equal_those_of_a_cpu(loss):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 1000, bias=False).requires_grad_(False)
    states, teacher = torch.randn(2, 70, 64, generator=generator)
    targets, weights = torch.randint(1000, (70,), generator=generator), torch.rand(70, generator=generator)

    def found(device: str) -> list[Tensor]:
        rows, others = states.detach().to(device).requires_grad_(), (x.to(device) for x in (teacher, targets, weights))
        other, target, weight = others
        on_device = head.to(device)
        if loss == "cross-entropy":
            value = cross_entropy_sum(rows, on_device, target, weight, chunk=32)
        else:
            value = kl_sum(rows, other, on_device, weight, teacher_first=loss == "teacher first", chunk=32)
        value.backward()
        return [value.detach().cpu(), rows.grad.cpu()]

    for ours, expected in zip(found("cuda"), found("cpu"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["cross-entropy", "kl"])
def test_losses_are_compiled_for_one_number_of_rows_and_for_any(monkeypatch, loss):
    """Numbers of rows and of chunks change with every step; a third compilation would come in the middle of a run.

    (Torch compiles for a chunk of one row apart, whatever we do.)
    """
    counter = CompileCounter()
    monkeypatch.setattr(objectives, "_is_compiled_for", lambda x: True)
    monkeypatch.setattr(objectives, "_compiled", functools.cache(lambda term: torch.compile(term, backend=counter)))
    head = nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    for n in (8 + 3, 8 + 5, 7, 8, 2 * 8 + 2, 6):
        states, teacher, weights = torch.randn(n, HIDDEN), torch.randn(n, HIDDEN), torch.rand(n)
        if loss == "kl":
            kl_sum(states, teacher, head, weights, chunk=8)
        else:
            cross_entropy_sum(states, head, torch.randint(VOCAB, (n,)), weights, chunk=8)
    assert counter.frame_count == 2


def test_no_rows_are_a_zero_that_can_be_trained_on(head):
    """A row in which noise hid nothing must not stop the run."""
    model_output = torch.randn(3, HIDDEN, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = cross_entropy_sum(model_output[none], head, none, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert not model_output.grad.any()


@pytest.mark.parametrize("teacher_first", [True, False])
def test_kl_of_hidden_rows_in_both_directions(rng, head, teacher_first):
    student, teacher = rng.normal(size=(ROWS, HIDDEN)), rng.normal(size=(ROWS, HIDDEN))
    weights = rng.uniform(0, 3, ROWS)

    def slow(x: np.ndarray) -> float:
        return slow_kl(head, *((teacher, x) if teacher_first else (x, teacher)), weights)

    rows, target = tensor(student, grad=True), tensor(teacher, grad=True)
    loss = kl_sum(rows, target, head, tensor(weights), teacher_first=teacher_first)
    assert loss.item() == pytest.approx(slow(student), rel=1e-5)
    other = kl_sum(rows, target, head, tensor(weights), teacher_first=not teacher_first)
    assert other.item() != pytest.approx(loss.item(), rel=0.01)
    loss.backward()
    np.testing.assert_allclose(rows.grad.numpy(), numerical_gradient(slow, student), atol=1e-5)
    assert target.grad is None


def test_kl_of_a_row_with_itself_is_zero(rng, head):
    hidden = tensor(rng.normal(size=(ROWS, HIDDEN)), grad=True)
    loss = kl_sum(hidden, hidden.detach().clone(), head, torch.ones(ROWS))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


# --- query alignment -------------------------------------------------------------------------------------------------


def slow_query_alignment(at_mask: np.ndarray, later: np.ndarray, counted: np.ndarray, distance: str) -> float:
    total = 0.0
    for b, j in zip(*np.nonzero(counted), strict=True):
        for h in range(HEADS):
            x, y = at_mask[b, h, j], later[b, h, j]
            if distance == "cosine":
                total += (1 - x @ y / math.sqrt((x @ x) * (y @ y))) / HEADS
            else:
                total += (x - y) @ (x - y) / (y @ y) / HEADS
    return total


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_query_alignment_equals_a_slow_transcription(rng, distance):
    at_mask, later = rng.normal(size=(2, BATCH, HEADS, BLOCKS, DIM))
    counted = rng.random((BATCH, BLOCKS)) < 0.6
    query, target = tensor(at_mask, grad=True), tensor(later, grad=True)
    loss = query_alignment_sum(query, target, torch.from_numpy(counted), distance)
    assert loss.item() == pytest.approx(slow_query_alignment(at_mask, later, counted, distance), rel=1e-5)
    loss.backward()
    slow = numerical_gradient(lambda x: slow_query_alignment(x, later, counted, distance), at_mask)
    np.testing.assert_allclose(query.grad.numpy(), slow, atol=1e-5)
    assert target.grad is None, "the later step is a target, not something to move"


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_symmetric_alignment_moves_both_sides_to_the_same_value(rng, distance):
    at_mask, later = rng.normal(size=(2, BATCH, HEADS, BLOCKS, DIM))
    counted = np.ones((BATCH, BLOCKS), dtype=bool)
    query, target = tensor(at_mask, grad=True), tensor(later, grad=True)
    loss = query_alignment_sum(query, target, torch.from_numpy(counted), distance, symmetric=True)
    assert loss.item() == pytest.approx(slow_query_alignment(at_mask, later, counted, distance), rel=1e-5)
    loss.backward()
    for side, slow in (
        (query, numerical_gradient(lambda x: slow_query_alignment(x, later, counted, distance), at_mask)),
        (target, numerical_gradient(lambda x: slow_query_alignment(at_mask, x, counted, distance), later)),
    ):
        np.testing.assert_allclose(side.grad.numpy(), slow, atol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_aligned_queries_cost_nothing(rng, distance):
    later = tensor(rng.normal(size=(BATCH, HEADS, BLOCKS, DIM)))
    counted = torch.ones(BATCH, BLOCKS, dtype=torch.bool)
    query = later.clone().requires_grad_()
    loss = query_alignment_sum(query, later, counted, distance)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert query.grad.abs().max() < 1e-6


def test_cosine_ignores_length_and_squared_does_not(rng):
    later = tensor(rng.normal(size=(BATCH, HEADS, BLOCKS, DIM)))
    counted = torch.ones(BATCH, BLOCKS, dtype=torch.bool)
    assert query_alignment_sum(3 * later, later, counted).abs() < 1e-5
    assert query_alignment_sum(3 * later, later, counted, "squared").item() == pytest.approx(4 * BATCH * BLOCKS)
    assert query_alignment_sum(-later, later, counted).item() == pytest.approx(2 * BATCH * BLOCKS)


def test_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="cosine or squared"):
        query_alignment_sum(*torch.ones(2, 1, 1, 1, 2), torch.ones(1, 1), "euclid")


def test_block_means_are_float32_means_over_positions_and_group(rng):
    rows = tensor(rng.normal(size=(BATCH, HEADS, BLOCKS, 6, DIM)), dtype=torch.bfloat16)
    mean = block_mean_queries(rows)
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), rows.double().numpy().mean(axis=3), atol=1e-6)


def test_block_means_of_every_head_of_a_group(rng):
    rows = rng.normal(size=(BATCH, HEADS, BLOCKS, 6, DIM))  # two query heads of three positions
    mean = block_mean_queries(tensor(rows), group=2)
    for head in range(HEADS):
        for member in range(2):
            expected = rows[:, head, :, 3 * member : 3 * member + 3].mean(axis=2)
            np.testing.assert_allclose(mean[:, 2 * head + member].numpy(), expected, atol=1e-6)


def test_rotary_positions_are_undone(rng):
    """Against transformers' own rotation, on packed rows."""
    size, blocks, group, dim = 4, 3, 2, 6
    query = tensor(rng.normal(size=(1, 2 * group, size * blocks, dim)))
    angle = tensor(rng.normal(size=(1, size * blocks, dim // 2))).repeat(1, 1, 2)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()  # some rope types scale both
    turned, _ = apply_rotary_pos_emb(query, query, cos, sin)
    before = undo_rotary(packed_rows(turned, 2, size), *(part[0].view(blocks, size, dim) for part in (cos, sin)))
    torch.testing.assert_close(before, packed_rows(query, 2, size))


# --- attention alignment ---------------------------------------------------------------------------------------------


def slow_attention_alignment(first: np.ndarray, second: np.ndarray, counted: np.ndarray, floor: float) -> float:
    total = 0.0
    for b, j in zip(*np.nonzero(counted), strict=True):
        for h in range(HEADS):
            for p, q in zip(first[b, h, j], second[b, h, j], strict=True):
                total += p * math.log((p + floor) / (q + floor)) / HEADS
    return total


@pytest.mark.parametrize("later_first", [True, False])
def test_attention_alignment_equals_a_slow_transcription(rng, later_first):
    at_mask, later = probabilities(rng, 2, BATCH, HEADS, BLOCKS, KEYS)
    at_mask[:, :, 1, 5:] = later[:, :, 1, 5:] = 0.0  # a shorter prefix
    counted = rng.random((BATCH, BLOCKS)) < 0.6
    floor = 1e-3

    def slow(x: np.ndarray) -> float:
        return slow_attention_alignment(*((later, x) if later_first else (x, later)), counted, floor)

    ours, target = tensor(at_mask, grad=True), tensor(later, grad=True)
    loss = attention_alignment_sum(ours, target, torch.from_numpy(counted), later_first=later_first, floor=floor)
    assert loss.item() == pytest.approx(slow(at_mask), rel=1e-5)
    loss.backward()
    np.testing.assert_allclose(ours.grad.numpy(), numerical_gradient(slow, at_mask, 1e-6), atol=2e-4)
    assert target.grad is None


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("later_first", [True, False])
def test_symmetric_attention_alignment_moves_both_sides_to_the_same_value(rng, later_first, power):
    at_mask, later = probabilities(rng, 2, BATCH, HEADS, BLOCKS, KEYS)
    counted = rng.random((BATCH, BLOCKS)) < 0.6

    def slow(x: np.ndarray, y: np.ndarray) -> float:
        if power != 1.0:
            x, y = (side.clip(min=0) ** power for side in (x, y))
            x, y = (side / side.sum(-1, keepdims=True) for side in (x, y))
        return slow_attention_alignment(*((y, x) if later_first else (x, y)), counted, 1e-3)

    ours, target = tensor(at_mask, grad=True), tensor(later, grad=True)
    same = {"later_first": later_first, "power": power, "floor": 1e-3}
    loss = attention_alignment_sum(ours, target, torch.from_numpy(counted), symmetric=True, **same)
    assert loss.item() == pytest.approx(slow(at_mask, later), rel=1e-4)
    loss.backward()
    for side, values, numerical in (
        (ours, at_mask, numerical_gradient(lambda x: slow(x, later), at_mask, 1e-7)),
        (target, later, numerical_gradient(lambda x: slow(at_mask, x), later, 1e-7)),
    ):
        steady = values > 1e-3  # a power below 1 is steep beside 0
        np.testing.assert_allclose(side.grad.numpy()[steady], numerical[steady], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("top_k", "power"), [(3, 1.0), (3, 0.5), (None, 0.5), (99, 1.0)])
def test_attention_alignment_on_the_top_keys_and_sharpened(rng, top_k, power):
    at_mask, later = probabilities(rng, 2, BATCH, HEADS, BLOCKS, KEYS)
    at_mask[:, :, 1, 5:] = later[:, :, 1, 5:] = 0.0  # a shorter prefix
    counted = rng.random((BATCH, BLOCKS)) < 0.6
    best = np.argsort(-later, axis=-1)[..., : top_k or KEYS]

    def transformed(x: np.ndarray) -> np.ndarray:
        raised = np.take_along_axis(x, best, axis=-1).clip(min=0) ** power
        return raised / raised.sum(-1, keepdims=True)

    def slow(x: np.ndarray) -> float:
        return slow_attention_alignment(transformed(later), transformed(x), counted, 1e-3)

    ours = tensor(at_mask, grad=True)
    loss = attention_alignment_sum(ours, tensor(later), torch.from_numpy(counted), top_k=top_k, power=power, floor=1e-3)
    assert loss.item() == pytest.approx(slow(at_mask), rel=1e-4)
    loss.backward()
    visible = at_mask > 0  # elsewhere a power below 1 has no finite slope
    np.testing.assert_allclose(
        ours.grad.numpy()[visible], numerical_gradient(slow, at_mask, 1e-7)[visible], rtol=1e-2, atol=2e-3
    )
    assert ours.grad.isfinite().all()


def test_attention_alignment_is_the_kl_divergence(rng):
    at_mask, later = tensor(probabilities(rng, 2, BATCH, HEADS, BLOCKS, KEYS))
    counted = torch.ones(BATCH, BLOCKS, dtype=torch.bool)
    kl = F.kl_div(at_mask.log(), later, reduction="none").sum(-1).mean(1).sum()
    torch.testing.assert_close(attention_alignment_sum(at_mask, later, counted), kl, rtol=1e-4, atol=1e-4)
    assert attention_alignment_sum(later, later, counted).abs() < 1e-6


def test_missing_a_key_that_matters_later_costs_more_than_a_spare_one():
    even, peaked = torch.full((1, 1, 1, 4), 0.25), torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 1, 4)
    counted = torch.ones(1, 1, dtype=torch.bool)
    covers = attention_alignment_sum(even, peaked, counted)
    misses = attention_alignment_sum(peaked, even, counted)
    assert covers.item() == pytest.approx(math.log(4), rel=1e-4)
    assert misses > 3 * covers


@pytest.mark.parametrize("later_first", [True, False])
def test_a_block_without_prefix_gives_zero_and_finite_gradients(later_first):
    nothing = torch.zeros(1, 1, 1, 4, requires_grad=True)
    counted = torch.zeros(1, 1, dtype=torch.bool)
    loss = attention_alignment_sum(nothing, torch.zeros(1, 1, 1, 4), counted, later_first=later_first)
    loss.backward()
    assert loss.item() == 0.0
    assert nothing.grad.isfinite().all()
