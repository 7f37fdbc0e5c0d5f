"""Scores of keys, and the choice from a shortlist, against mage_tune.selection."""

import pytest
import torch

from mage_kernels.exact_attention import exact_attention
from mage_kernels.key_scores import mean_logit, mean_probability, tile_mass, tile_probability
from mage_kernels.select_keys import select_keys
from mage_kernels.testing import random_tensor
from mage_kernels.top_k import top_k
from mage_tune import selection

LAYERS, BATCH, HEADS, ROWS, DIM, TILE, SCALE = 2, 3, 2, 24, 32, 16, 0.3
LENGTHS = (90, 0, 37)


class Prefix:
    """Queries, keys and what the exact pass leaves, for two layers."""

    def __init__(self, dtype, device, capacity=93):
        self.query = random_tensor(LAYERS, BATCH, HEADS, ROWS, DIM, dtype=dtype, device=device, seed=1)
        self.key = random_tensor(LAYERS, BATCH, HEADS, capacity, DIM, dtype=dtype, device=device, seed=2)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        for row, length in enumerate(LENGTHS):
            self.key[:, row, :, length:] = float("nan")
        self.attend()

    def attend(self):
        """What `exact_attention` leaves behind."""
        layers = zip(self.query, self.key, strict=True)
        seen = [exact_attention(q, k, k, self.lengths, SCALE, tile=TILE, impl="reference") for q, k in layers]
        self.log_mass = torch.stack([s.prefix_log_mass for s in seen])
        self.tiles = torch.stack([s.tile_log_mass for s in seen])
        self.mass = tile_mass(self.tiles, self.log_mass, self.lengths, TILE, impl="reference")
        scored = (self.query, self.key, self.log_mass, self.lengths, SCALE)
        self.score = mean_probability(*scored, impl="reference")

    def expected(self):
        """(layers, batch, heads, capacity) from mage_tune, in float64."""
        visible = torch.arange(self.key.shape[3], device=self.key.device) < self.lengths[:, None]
        key = self.key.double().nan_to_num(0.0)
        rows = self.query.double().unsqueeze(3)
        score = [
            selection.mean_probability(q, k, visible[:, None, None], SCALE) for q, k in zip(rows, key, strict=True)
        ]
        return torch.stack(score).squeeze(3)


@pytest.fixture
def prefix(dtype, device):
    return Prefix(dtype, device)


def test_mean_probability_is_selections(prefix):
    score = mean_probability(prefix.query, prefix.key, prefix.log_mass, prefix.lengths, SCALE, impl="triton")
    torch.testing.assert_close(score.double(), prefix.expected(), atol=1e-5, rtol=2e-3)
    assert (score[:, 1] == 0).all() and (score[:, 2, :, 37:] == 0).all()


def test_tile_mass_sums_its_keys(prefix):
    mass = tile_mass(prefix.tiles, prefix.log_mass, prefix.lengths, TILE, impl="triton")
    expected = torch.nn.functional.pad(prefix.expected(), (0, 3)).unflatten(-1, (-1, TILE)).sum(-1)
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=2e-3)


def test_masses_kept_of_all_layers_are_averaged_at_once(device):
    """Bit for bit what each layer's own launch gives."""
    prefix = Prefix(torch.float16, device)
    given = {"tile": TILE, "impl": "triton"}
    layers = list(zip(prefix.query, prefix.key, strict=True))
    seen = [exact_attention(q, k, k, prefix.lengths, SCALE, **given) for q, k in layers]
    alone = [tile_mass(s.tile_log_mass, s.prefix_log_mass, prefix.lengths, TILE, impl="triton") for s in seen]
    tiles = torch.empty(*prefix.tiles.shape, device=device)
    log_mass = torch.empty(*prefix.log_mass.shape, device=device)
    for (q, k), *masses in zip(layers, tiles, log_mass, strict=True):
        exact_attention(q, k, k, prefix.lengths, SCALE, **given, masses=tuple(masses))
    mass = tile_mass(tiles, log_mass, prefix.lengths, TILE, impl="triton")
    assert mass.equal(torch.stack(alone))


def test_tile_probability_scores_the_tiles_listed(prefix):
    device = prefix.key.device
    tiles = torch.tensor([0, 2, 5], dtype=torch.int32, device=device).repeat(LAYERS, BATCH, HEADS, 1)
    count = torch.tensor([3, 0, 2], dtype=torch.int32, device=device)[None, :, None].repeat(LAYERS, 1, HEADS)
    arguments = (prefix.query, prefix.key, prefix.log_mass, prefix.lengths, SCALE, tiles, count, TILE)
    score = tile_probability(*arguments, impl="triton").unflatten(-1, (3, TILE))
    expected = torch.nn.functional.pad(prefix.expected(), (0, 3)).unflatten(-1, (-1, TILE))[..., [0, 2, 5], :]
    expected[:, 1] = 0
    expected[:, 2, :, 2] = 0
    torch.testing.assert_close(score.double(), expected, atol=1e-5, rtol=2e-3)


def test_mean_logit_is_selections(prefix):
    score = mean_logit(prefix.query, prefix.key, prefix.lengths, SCALE, impl="triton")
    for layer in range(LAYERS):
        for row, length in enumerate(LENGTHS):
            query, key = prefix.query[layer, row : row + 1], prefix.key[layer, row : row + 1, :, :length]
            expected = selection.mean_logit(query.double(), key.double(), SCALE)[0]
            torch.testing.assert_close(score[layer, row, :, :length].double(), expected, atol=1e-5, rtol=1e-4)
            assert (score[layer, row, :, length:] == 0).all()


def test_one_layer_needs_no_dimension_of_layers(prefix):
    whole = mean_probability(prefix.query, prefix.key, prefix.log_mass, prefix.lengths, SCALE, impl="triton")
    last = mean_probability(prefix.query[1], prefix.key[1], prefix.log_mass[1], prefix.lengths, SCALE, impl="triton")
    assert last.equal(whole[1])


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_shortlist_of_everything_is_the_full_choice(impl, device):
    prefix = Prefix(torch.float16, device)
    arguments = (prefix.query, prefix.key, prefix.log_mass, prefix.mass, prefix.lengths, SCALE, 20)
    chosen = select_keys(*arguments, tile=TILE, shortlist=6, sinks=2, recent=3, impl=impl)
    full = top_k(prefix.score, 20, prefix.lengths, sinks=2, recent=3, impl="reference")
    assert chosen.is_exact.all()
    assert chosen.index.equal(full.index) and chosen.count.equal(full.count)


def test_exactness_is_claimed_only_where_it_holds(device):
    prefix = Prefix(torch.float16, device)
    prefix.query[0] *= 12.0  # sharp attention in one layer: few tiles matter there
    prefix.attend()
    arguments = (prefix.query, prefix.key, prefix.log_mass, prefix.mass, prefix.lengths, SCALE, 3)
    chosen = select_keys(*arguments, tile=TILE, shortlist=4, impl="reference")
    is_same = (chosen.index == top_k(prefix.score, 3, prefix.lengths, impl="reference").index).all(-1)
    assert (is_same | ~chosen.is_exact).all()
    assert chosen.is_exact[:, 1:].all()  # rows that fit in the shortlist
    assert not chosen.is_exact[1, 0].any()  # diffuse attention cannot be certain
