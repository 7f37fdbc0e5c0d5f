"""On a GPU: the checks before a benchmark, graphs for every length, and the converted SmolLM2 when it is there."""

from pathlib import Path

import pytest
import torch

from mage_tune.bench.checks import LENGTHS, check_engine, tiny_lm
from mage_tune.decode.engine.engine import Engine
from mage_tune.decode.engine.generate import engine_settings, generate
from mage_tune.decode.engine.weights import weights_of
from mage_tune.decode.rules import Mage
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
