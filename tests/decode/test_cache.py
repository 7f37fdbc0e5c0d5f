"""The prefix cache: cached equals recomputed, peeks leave no trace, prefixes of prefixes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_tune.backbone import output_head
from mage_tune.decode.attention import block_forward, extend
from mage_tune.decode.cache import PrefixCache


@pytest.fixture
def filled(tiny_lm, prompts):
    """A model and a cache of three rows, 24, 8 and 16 tokens on a grid of 4."""
    lm = tiny_lm(dtype=torch.float64)
    rows = prompts((24, 8, 16))
    cache = PrefixCache.for_model(lm.model, 3, 32)
    extend(lm.model, cache, rows, 4)
    return lm, cache, rows


def recomputed(lm, ids):
    return lm.logits(torch.tensor([ids]))[0]


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    chunk=st.integers(1, 20),
    more=st.integers(0, 3),
    block_size=st.sampled_from([2, 4, 8]),
)
def test_cached_equals_recomputed(tiny_lm_static, lengths, chunk, more, block_size):
    lm = tiny_lm_static(block_size)
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(2, 62, (n * block_size,), generator=generator).tolist() for n in lengths]
    cache = PrefixCache.for_model(lm.model, len(rows), (7 + more + 1) * block_size)
    hidden, passes = extend(lm.model, cache, rows, block_size, chunk=chunk)
    extra = torch.randint(2, 62, (more * block_size,), generator=generator).tolist()
    hidden, _ = extend(lm.model, cache, [extra] * len(rows), block_size)  # rows of different lengths go on together
    block = torch.randint(2, 63, (len(rows), block_size), generator=generator)
    peek = output_head(lm.model)(block_forward(lm.model, cache, block))
    for i, row in enumerate(rows):
        whole = recomputed(lm, row + extra + block[i].tolist())
        assert (peek[i] - whole[-block_size:]).abs().max() < 1e-9
        if extra:
            assert (output_head(lm.model)(hidden[i]) - whole[-block_size - 1]).abs().max() < 1e-9
        assert passes[i] == -(-len(row) // max(block_size, chunk // block_size * block_size))


@pytest.fixture(scope="module")
def tiny_lm_static():
    """Models in float64 that hypothesis may use again and again."""
    from mage_tune.backbone import random_backbone
    from mage_tune.lm import from_backbone

    shape = {"architecture": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2}
    shape |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "tie_embeddings": True, "max_positions": 512}
    made = {
        size: from_backbone(random_backbone(shape, "converted", mask_id=63, stop_ids=(1,), block_size=size))
        for size in (2, 4, 8)
    }
    for lm in made.values():
        lm.model.double()
    return made.__getitem__


def test_a_peek_leaves_no_trace(filled):
    lm, cache, _ = filled
    keys, ids = cache.keys.clone(), [list(row) for row in cache.ids]
    block = torch.full((3, 4), 63)
    first = block_forward(lm.model, cache, block)
    assert torch.equal(block_forward(lm.model, cache, block), first)
    assert torch.equal(cache.keys, keys)
    assert cache.ids == ids


def test_many_blocks_of_one_cached_document(filled, prompts):
    lm, cache, rows = filled
    lengths = [4, 24, 12, 0]
    blocks = torch.tensor(prompts([4] * 4, seed=5))
    together = block_forward(lm.model, cache.prefix(rows=[0] * 4, lengths=lengths), blocks)
    logits = output_head(lm.model)(together)
    for i, n in enumerate(lengths):
        alone = block_forward(lm.model, cache.prefix(rows=[0], lengths=[n]), blocks[i : i + 1])
        assert (together[i] - alone[0]).abs().max() < 1e-10
        assert (logits[i] - recomputed(lm, rows[0][:n] + blocks[i].tolist())[-4:]).abs().max() < 1e-9


def test_what_lies_beyond_a_row_is_never_read(filled):
    lm, cache, _ = filled
    block = torch.full((3, 4), 63)
    before = block_forward(lm.model, cache, block)
    for i, n in enumerate(cache.lengths):
        cache.keys[:, i, :, n:] = 1e3
        cache.values[:, i, :, n:] = -1e3
    assert torch.equal(block_forward(lm.model, cache, block), before)


def test_memory_grows_only_on_request_and_keeps_what_it_holds(filled):
    lm, cache, _ = filled
    block = torch.full((3, 4), 63)
    before = block_forward(lm.model, cache, block)
    cache.reserve(8)
    assert cache.capacity == 32
    cache.reserve(48)
    assert cache.capacity == 48
    assert torch.equal(block_forward(lm.model, cache, block), before)


def test_keeps_the_common_whole_blocks(filled):
    _, cache, rows = filled
    assert cache.keep_common(0, [*rows[0][:13], 1, 1, 1, 1], 4) == 12
    assert cache.lengths == [12, 8, 16]
    # The last token is always read again: its forward pass tells what comes next.
    assert cache.keep_common(1, rows[1], 4) == 4
    assert cache.keep_common(2, [*rows[2], 9], 4) == 16


def test_refuses_what_does_not_fit(filled):
    lm, cache, _ = filled
    with pytest.raises(ValueError, match="only whole blocks of 4"):
        extend(lm.model, cache, [[5] * 3, [], []], 4)
    with pytest.raises(ValueError, match="do not fit in a cache of 32"):
        extend(lm.model, cache, [[5] * 12, [], []], 4)
    with pytest.raises(ValueError, match="do not fit cached rows"):
        cache.prefix(rows=[1], lengths=[12])
    assert cache.lengths == [24, 8, 16]
