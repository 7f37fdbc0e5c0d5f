"""On a GPU: the checks before a benchmark, graphs for every length, and the converted SmolLM2 when it is there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mage_kernels.overlap import overlapping
from mage_tune.bench.checks import LENGTHS, check_engine, tiny_lm
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings, generate
from mage_tune.decode.engine.weights import QWEN_1_5B, SDAR_8B, random_weights, weights_of
from mage_tune.decode.rules import Mage
from mage_tune.families import FAMILIES
from mage_tune.lm import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]
CONVERTED = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-diffusion"


def test_checks():
    assert [check for check in check_engine(torch.device("cuda"), torch.bfloat16) if not check.is_fine] == []


def test_one_graph_of_each_kind_serves_every_length():
    """Prefixes of several lengths, and growing by commits, through graphs that were captured once."""
    lm = tiny_lm("fast_dllm_v2", torch.device("cuda"), torch.bfloat16)
    settings = engine_settings(lm.family, Mage(budget=128, dense_layers=1), steps=8, acceptance="static")
    engines = [Engine(weights_of(lm.model), settings, 2, 1024, use_graphs=graphs) for graphs in (True, False)]
    for length in (256, 640, 160):
        texts = []
        for engine in engines:
            generator = torch.Generator().manual_seed(length)
            engine.cache.set_lengths([0, 0])
            for row in range(2):
                engine.prefill(row, torch.randint(2, 262, (length + 32 * row,), generator=generator).tolist())
            text = []
            for _ in range(3):
                ids = torch.full((2, 32), 262)
                ids[:, 0] = 7
                engine.blocks.lay_out(ids)
                engine.denoise(8)
                text += engine.blocks.ids.tolist()
                engine.commit()
            texts.append(text)
        assert texts[0] == texts[1]
    assert len(engines[0].graphs) == 4, "score, select, sparse, commit: one graph each"


@pytest.mark.parametrize(("shape", "family"), [(QWEN_1_5B, "fast_dllm_v2"), (SDAR_8B, "sdar")], ids=["1.5B", "SDAR"])
def test_overlapping_launches_change_no_bit(shape, family):
    """A sparse step of a few layers as a graph whose launches overlap (on Hopper), many times, and launched eagerly."""
    device, size = torch.device("cuda"), 32
    weights = random_weights(replace(shape, num_layers=4, vocab=4096), torch.bfloat16, device)
    named = replace(FAMILIES[family].with_overrides(block_size=size), mask_id=300)
    settings = engine_settings(named, Mage(budget=512, dense_layers=0), steps=32, acceptance="static")
    engine = Engine(weights, settings, 1, 1024, use_graphs=False)
    engine.cache.set_lengths([640])
    kept = engine.chooser.kept
    kept.keys.normal_()
    kept.values.normal_()
    kept.counts.fill_(512)
    kept.counts[0, 0, -1] = 507
    engine.blocks.lay_out(torch.arange(size, device=device)[None])
    eager = engine.look("sparse")
    graph = torch.cuda.CUDAGraph()
    with overlapping():
        torch.cuda.synchronize()
        assert torch.equal(engine.look("sparse"), eager)
        with torch.cuda.graph(graph):
            found = engine.look("sparse")
    for _ in range(200):
        found.zero_()
        graph.replay()
        assert torch.equal(found, eager)
    assert eager.isfinite().all()
    assert not engine.body.arrivals.any() and not engine.frame.arrivals.any()


@pytest.mark.parametrize("attention", ["exact", "mage"])
def test_the_converted_smollm2(attention):
    if not CONVERTED.is_dir():
        pytest.skip("the converted SmolLM2 is not here")
    lm = load(CONVERTED, dtype="bfloat16", device="cuda")
    prompt = "The river ran through the old town, and the people of the town lived by the river. " * 60
    options = {"max_new_tokens": 64, "stop_ids": (), "attention": attention}
    options |= {"budget": 256} if attention == "mage" else {}
    got, expected = generate(lm, prompt, **options).tokens, lm.generate(prompt, **options).tokens
    same = next((i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), len(got))
    assert same >= 16, f"in bfloat16 a tie may fall either way, but not after {same} tokens"


def test_lengths_of_the_checks_differ():
    assert len(set(LENGTHS)) == len(LENGTHS)
