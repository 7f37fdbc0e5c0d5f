"""Exact attention: against float64, at odd lengths, with and without the block's own keys."""

import pytest
import torch

from mage_kernels.exact_attention import exact_attention
from mage_kernels.testing import check_error, eager_attention, random_tensor
from mage_tune.decode.attention import attention_with_log_mass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Short prefixes are cut into several parts too."""
    from mage_kernels.exact_attention import triton

    monkeypatch.setattr(triton, "MIN_PART", 16)


def make(batch, heads, rows, capacity, dim, dtype, device, lengths, own=8):
    shapes = [(batch, heads, rows, dim), *[(batch, heads, capacity, dim)] * 2, *[(batch, heads, own, dim)] * 2]
    q, k, v, own_k, own_v = (random_tensor(*s, dtype=dtype, device=device, seed=i) for i, s in enumerate(shapes))
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    for row, length in enumerate(lengths.tolist()):  # what lies beyond a length must not matter
        k[row, :, length:] = float("nan")
        v[row, :, length:] = float("nan")
    return q, k, v, lengths, {"own_key": own_k, "own_value": own_v}


def check_against_float64(q, k, v, lengths, own, tile, scale):
    got = exact_attention(q, k, v, lengths, scale, **own, tile=tile, impl="triton")
    for row, length in enumerate(lengths.tolist()):
        keys, values = k[row, :, :length], v[row, :, :length]
        if own:
            keys = torch.cat([keys, own["own_key"][row]], dim=1)
            values = torch.cat([values, own["own_value"][row]], dim=1)
        if keys.shape[1] == 0:
            assert (got.out[row] == 0).all() and (got.log_mass[row] == float("-inf")).all()
        else:
            everything = keys.new_ones(1, dtype=torch.bool)
            out, mass = attention_with_log_mass(q[row].double(), keys.double(), values.double(), everything, scale)
            check_error(got.out[row], out, eager_attention(q[row], keys, values, scale))
            torch.testing.assert_close(got.log_mass[row].double(), mass.squeeze(-1), atol=2e-3, rtol=0)
        logits = q[row].double() @ k[row, :, :length].double().transpose(-1, -2) * scale
        everything = logits.logsumexp(-1)
        torch.testing.assert_close(got.prefix_log_mass[row].double(), everything, atol=2e-3, rtol=0)
        for number, part in enumerate(logits.split(tile, dim=-1) if length else ()):
            share = (got.tile_log_mass[row, :, number].double() - everything).exp()
            torch.testing.assert_close(share, (part.logsumexp(-1) - everything).exp(), atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("with_own", [True, False], ids=["own", "prefix-only"])
@pytest.mark.parametrize(("rows", "dim"), [(40, 64), (24, 24)], ids=["R40-D64", "R24-D24"])
def test_against_float64(rows, dim, with_own, dtype, device):
    q, k, v, lengths, own = make(3, 2, rows, 107, dim, dtype, device, [107, 0, 35])
    check_against_float64(q, k, v, lengths, own if with_own else {}, 16, dim**-0.5)


def test_one_key_and_whole_tiles(device):
    q, k, v, lengths, own = make(3, 1, 16, 64, 32, torch.float16, device, [1, 64, 32], own=5)
    check_against_float64(q, k, v, lengths, own, 32, 0.2)


def test_large_logits_do_not_overflow(device):
    q, k, v, lengths, own = make(1, 1, 16, 50, 32, torch.float16, device, [50])
    check_against_float64(q * 30, k, v, lengths, own, 16, 1.0)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("start", [16, 5])
def test_only_later_rows_see_the_block_itself(device, impl, start):
    q, k, v, lengths, own = make(2, 2, 32, 50, 32, torch.float16, device, [50, 0])
    got = exact_attention(q, k, v, lengths, 0.2, **own, own_from=start, tile=16, impl=impl)
    all_see, none_see = (exact_attention(q, k, v, lengths, 0.2, **own_, tile=16, impl=impl) for own_ in (own, {}))
    for name in ("out", "log_mass"):
        found, late, early = (getattr(seen, name) for seen in (got, all_see, none_see))
        assert found[:, :, start:].equal(late[:, :, start:]) and found[:, :, :start].equal(early[:, :, :start])
    assert got.out.isfinite().all()
    assert got.prefix_log_mass.equal(all_see.prefix_log_mass[:, :, start:])
    assert got.tile_log_mass[0].equal(all_see.tile_log_mass[0, ..., start:])  # row 1 has no tile


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("start", [0, 16, 5])
def test_masses_in_memory_of_all_layers_are_those_in_new_memory(device, impl, start):
    """A layer's slice of the buffers is written, bit for bit, and nothing beside it."""
    q, k, v, lengths, own = make(3, 2, 32, 75, 32, torch.float16, device, [75, 7, 0])
    given = {**own, "own_from": start, "tile": 16, "impl": impl}
    expected = exact_attention(q, k, v, lengths, 0.2, **given)
    tiles = torch.full((3, 3, 2, 5, 32 - start), 7.0, device=device)
    prefix = torch.full((3, 3, 2, 32 - start), 7.0, device=device)
    got = exact_attention(q, k, v, lengths, 0.2, **given, masses=(tiles[1], prefix[1]))
    assert got.tile_log_mass.data_ptr() == tiles[1].data_ptr()
    assert got.out.equal(expected.out) and got.log_mass.equal(expected.log_mass)
    assert prefix[1].equal(expected.prefix_log_mass)
    for row, count in ((0, 5), (1, 1)):
        assert tiles[1, row, :, :count].equal(expected.tile_log_mass[row, :, :count])
    assert (tiles[::2] == 7).all() and (prefix[::2] == 7).all()


def test_memory_for_masses_must_fit():
    x = torch.zeros(1, 2, 8, 16)
    for tile, tiles, prefix, message in [
        (None, (1, 2, 1, 8), (1, 2, 8), "say of how many keys"),
        (16, (1, 2, 2, 8), (1, 2, 8), r"masses\[0\] has shape"),
        (16, (1, 2, 1, 8), (1, 2, 7), r"masses\[1\] has shape"),
    ]:
        masses = torch.zeros(tiles), torch.zeros(prefix)
        with pytest.raises(ValueError, match=message):
            exact_attention(x, x, x, torch.ones(1, dtype=torch.int32), 1.0, tile=tile, masses=masses)
    masses = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="must be contiguous float32"):
        exact_attention(x, x, x, torch.ones(1, dtype=torch.int32), 1.0, tile=16, masses=masses)


def test_strided_caches(device):
    q, k, v, lengths, own = make(2, 2, 16, 40, 32, torch.float16, device, [40, 9])
    expected = exact_attention(q, k, v, lengths, 0.2, **own, impl="triton")
    layers = torch.stack([k, v], dim=3).transpose(1, 2)  # (batch, capacity, heads, 2, D)
    strided = [layers[:, :, :, i].transpose(1, 2) for i in range(2)]
    buffer = torch.cat([torch.full_like(own["own_key"], 7.0), own["own_key"]], dim=2)
    got = exact_attention(
        q, *strided, lengths, 0.2, own_key=buffer[:, :, 8:], own_value=own["own_value"], impl="triton"
    )
    assert got.out.equal(expected.out) and got.prefix_log_mass.equal(expected.prefix_log_mass)


def test_reference_equals_triton_in_everything_but_rounding(device):
    q, k, v, lengths, own = make(2, 2, 20, 50, 32, torch.float16, device, [50, 17])
    mine, theirs = (exact_attention(q, k, v, lengths, 0.2, **own, tile=16, impl=i) for i in ("triton", "reference"))
    for name in ("out", "log_mass", "prefix_log_mass"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=2e-3, rtol=0)


def test_splits_fill_the_machine_and_never_exceed_the_most():
    from mage_kernels.exact_attention.triton import choose_splits

    for columns, most in [(8, 16), (2, 256), (64, 256), (48, 64), (300, 256), (1, 1), (4, 0)]:
        splits = choose_splits(columns, most, 132)
        programs = columns * splits
        assert 1 <= splits <= max(most, 1)
        assert splits >= most or programs / (-(-programs // 132) * 132) > 0.9


def test_three_warp_groups_only_where_they_waste_less():
    from mage_kernels.exact_attention.hopper import choose_tiles

    assert choose_tiles(16, 192, 0) == choose_tiles(16, 192, 64) == choose_tiles(16, 192, 128) == (192, 64, 3)
    assert choose_tiles(16, 384, 128) == choose_tiles(32, 224, 0) == choose_tiles(64, 128, 0) == (128, 128, 2)
    assert choose_tiles(2, 192, 0) == (128, 128, 2) and choose_tiles(32, 224, 64) == (128, 64, 3)


def test_short_prefixes_of_few_rows_take_small_tiles(monkeypatch):
    from mage_kernels.exact_attention import hopper, triton

    monkeypatch.setattr(hopper, "why_not", lambda *_: None)
    monkeypatch.setattr(triton, "num_slots", lambda _: 132)
    monkeypatch.setattr(triton, "MIN_PART", 512)  # what the fixture above made small

    def plan(batch, heads, rows, slots, tile=0):
        query, key = (torch.zeros(1).expand(batch, heads, size, 128) for size in (rows, slots))
        return tuple(triton.make_plan(query, key, key, tile))

    long = (128, 128, 16, 4, 2, True)
    assert plan(1, 8, 128, 8192) == plan(1, 8, 128, 8192 + 32) == (128, 64, 8, 4, 3, True)
    assert plan(8, 8, 128, 8192) == (128, 64, 2, 4, 3, True)
    assert plan(1, 8, 128, 8192, tile=128) == (128, 64, 8, 4, 3, True)  # two tiles share a mass
    assert plan(1, 8, 128, 32768) == plan(1, 8, 128, 32768, tile=128) == long
    assert plan(1, 4, 224, 8192) == long and plan(1, 2, 128, 8192)[1] == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 2, 8, 16)}, "key has shape"),
        ({"value": (2, 2, 9, 16)}, "value has shape"),
        ({"own_key": (2, 2, 4, 16)}, "come together"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"query": (2, 2, 4, 16), "key": (2, 2, 8, 16), "value": (2, 2, 8, 16)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        exact_attention(**tensors, lengths=torch.ones(2, dtype=torch.int32), scale=1.0)


def test_lengths_stay_int32_and_tiles_are_powers_of_two():
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match="lengths must be contiguous int32"):
        exact_attention(x, x, x, torch.ones(1, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="tile 48 is none of"):
        exact_attention(x, x, x, torch.ones(1, dtype=torch.int32), 1.0, tile=48)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("rows", [96, 128, 192, 224])
@pytest.mark.parametrize("length", [77, 8192, 32768 + 33, 131072 + 1])
def test_full_matrix(rows, dim, length, dtype, device):
    q, k, v, lengths, own = make(2, 2, rows, length + 50, dim, dtype, device, [length, length // 3], own=32)
    tile = 64 if dim <= 128 else 32
    got = exact_attention(q, k, v, lengths, dim**-0.5, **own, tile=tile, impl="triton")
    for row, size in enumerate(lengths.tolist()):
        keys = torch.cat([k[row, :, :size], own["own_key"][row]], dim=1)
        values = torch.cat([v[row, :, :size], own["own_value"][row]], dim=1)
        everything = keys.new_ones(1, dtype=torch.bool)
        exact, mass = attention_with_log_mass(q[row].double(), keys.double(), values.double(), everything, dim**-0.5)
        check_error(got.out[row], exact, eager_attention(q[row], keys, values, dim**-0.5))
        torch.testing.assert_close(got.log_mass[row].double(), mass.squeeze(-1), atol=2e-3, rtol=0)
        sums = got.tile_log_mass[row, :, : -(-size // tile)].double().logsumexp(1)
        torch.testing.assert_close(sums, got.prefix_log_mass[row].double(), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("heads", "rows"), [(2, 192), (1, 100)], ids=["three groups", "two groups"])
def test_two_tiles_that_share_a_mass(heads, rows, tile, dtype, device):
    """On Hopper both shapes take tiles of 64 keys, in parts cut between masses; elsewhere tiles of a mass."""
    from mage_kernels.exact_attention.triton import make_plan

    lengths = [2500, 0, 1, 64, 127, 129, 255, 2176]
    q, k, v, lengths, own = make(8, heads, rows, 2550, 128, dtype, device, lengths, own=32)
    plan = make_plan(q, k, v, tile)
    assert plan.block_n == (64 if plan.is_hopper else tile) and plan.num_splits > 1
    check_against_float64(q, k, v, lengths, own, tile, 128**-0.5)
    check_against_float64(q * 30, k, v, lengths, own, tile, 128**-0.5)  # maxima change from tile to tile


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "rows"), [(4, 224), (2, 192)])
def test_masses_of_a_commit_are_the_next_blocks(heads, rows, dtype, device):
    """Rows of two blocks at once, of which the later half is observed; another plan may round otherwise."""
    q, k, v, lengths, own = make(2, heads, 2 * rows, 2550, 128, dtype, device, [2500, 640], own=32)
    both = exact_attention(q, k, v, lengths, 0.1, **own, own_from=rows, tile=128)
    later = exact_attention(q[:, :, rows:].contiguous(), k, v, lengths, 0.1, **own, tile=128)
    torch.testing.assert_close(both.prefix_log_mass, later.prefix_log_mass, atol=2e-4, rtol=0)
    for row, count in ((0, 20), (1, 5)):
        found, expected = (seen.tile_log_mass[row, :, :count] for seen in (both, later))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.gpu
def test_one_graph_for_every_length(device):
    q, k, v, lengths, own = make(2, 2, 96, 5000, 128, torch.bfloat16, device, [5000, 5000], own=32)
    exact_attention(q, k, v, lengths, 0.1, **own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = exact_attention(q, k, v, lengths, 0.1, **own, tile=64)
    for sizes in ([5000, 1], [0, 4097], [64, 63]):
        lengths.copy_(torch.tensor(sizes))
        graph.replay()
        expected = exact_attention(q, k, v, lengths, 0.1, **own, tile=64)
        assert replayed.out.equal(expected.out) and replayed.prefix_log_mass.equal(expected.prefix_log_mass)
