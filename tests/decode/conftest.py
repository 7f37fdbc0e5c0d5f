"""Tiny models for decoding tests, and a decoder that recomputes everything."""

import pytest
import torch

from mage_tune.backbone import hidden_states, output_head
from mage_tune.lm import BlockDiffusionLM, from_backbone


@pytest.fixture(scope="session")
def _models():
    return {}


@pytest.fixture
def tiny_lm(tiny_backbone, _models):
    """tiny_lm(family, dtype=, block_size=, seed=, **shape) -> BlockDiffusionLM, made once per argument list.

    In float64 two ways of computing the same thing do not fall on different sides of a tie.
    """

    def get(family: str = "converted", dtype: torch.dtype = torch.float32, **options) -> BlockDiffusionLM:
        key = (family, dtype, *sorted(options.items()))
        if key not in _models:
            lm = from_backbone(tiny_backbone(family, **options))
            lm.model.to(dtype)
            _models[key] = lm
        return _models[key]

    return get


@pytest.fixture
def prompts():
    """prompts(lengths, vocab) -> lists of random tokens: no mask token, no stop token."""

    def make(lengths, vocab: int = 62, seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]

    return make


class DenseAttention:
    """The whole sequence under one dense mask; the last block may be limited to chosen prefix keys.

    What each layer would choose from this forward is recorded in `chosen`; `keys`, chosen at another, limit this one.
    """

    def __init__(self, size, budget, dense_layers, keys=None):
        self.size, self.budget, self.dense_layers, self.keys, self.chosen = size, budget, dense_layers, keys, {}

    def attend(self, layer, query, key, value, scaling):
        heads, length = query.shape[1], query.shape[2]
        group = heads // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1)[0], value.repeat_interleave(group, dim=1)[0]
        logits = query[0] @ key.transpose(1, 2) * scaling
        block = torch.arange(length) // self.size
        seen = (block[None, :] <= block[:, None]).repeat(heads, 1, 1)
        start = length - self.size
        if start > self.budget and layer >= self.dense_layers:
            mass = logits[:, start:, :start].softmax(-1).mean(1).unflatten(0, (-1, group)).mean(1)
            self.chosen[layer] = torch.zeros_like(mass, dtype=torch.bool)
            for head, row in enumerate(mass.tolist()):
                best = sorted(range(start), key=lambda i: -row[i])[: self.budget]
                self.chosen[layer][head, best] = True
            if self.keys is not None:
                seen[:, start:, :start] &= self.keys[layer].repeat_interleave(group, dim=0)[:, None]
        return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value)[None]


@pytest.fixture
def brute_force():
    """A second decoder, without cache or batch: every step forwards the whole text under dense masks."""

    @torch.no_grad()
    def decode(lm, prompt, new, threshold, window, rule="exact", budget=10**6, dense_layers=2):
        family, size, mask_id = lm.family, lm.family.block_size, lm.family.mask_id
        shift = int(family.token_shift)
        text, limit, steps = list(prompt), len(prompt) + new, 0

        def logits(ids, attention):
            positions = torch.arange(len(ids))[None]
            out = output_head(lm.model)(hidden_states(lm.model, torch.tensor([ids]), positions, attention.attend))[0]
            out = out.float()
            if family.name == "converted":
                out[:, mask_id] = -torch.inf
            return out

        def stop_at():
            return next((i for i in range(len(prompt), len(text)) if text[i] in family.stop_ids), None)

        while len(text) < limit and stop_at() is None:
            if family.seed_token and len(text) % size == 0:
                row = logits(text, DenseAttention(size, budget, dense_layers))[-1]
                row[mask_id] = -torch.inf
                text.append(int(row.argmax()))
                continue
            start = len(text) // size * size
            ids = text[:start] + text[start:] + [mask_id] * (start + size - len(text))
            keys = None
            while mask_id in ids:
                look = DenseAttention(size, budget, dense_layers)
                out = logits(ids, look)
                if rule == "oracle" or (rule == "mage" and keys is not None):
                    keys = look.chosen if rule == "oracle" else keys
                    out = logits(ids, DenseAttention(size, budget, dense_layers, keys))
                keys = look.chosen if keys is None else keys
                steps += 1
                first = ids.index(mask_id)
                begin = start + (first - start) // window * window
                masked = [i for i in range(begin, begin + window) if ids[i] == mask_id]
                draws = {}
                for i in masked:
                    probability = out[i - shift].softmax(-1)
                    allowed = probability.clone()
                    allowed[mask_id] = -1.0
                    token = int(allowed.argmax())
                    draws[i] = (float(probability[token]), token)
                best = max(draws, key=lambda i: draws[i][0])
                for i, (confidence, token) in draws.items():
                    if confidence > threshold or i == best:
                        ids[i] = token
                text = ids[: ids.index(mask_id)] if mask_id in ids else ids
                if stop_at() is not None or len(text) >= limit:
                    break
        end = stop_at()
        return (text[: end + 1] if end is not None else text)[len(prompt) : limit], steps

    return decode
