"""Greedy continuations equal the official code's, token by token (tests/fixtures/README.md)."""

import pytest

# SDAR's official "greedy" is temperature 1 with top_k 1: every confidence is then 1, and dynamic takes whole blocks.
SDAR_GREEDY = {"temperature": 1.0, "top_k": 1}
CASES = {
    ("fast_dllm_v2", "gen_sub"): {"sub_block": 4, "threshold": 0.9},
    ("fast_dllm_v2", "gen_full"): {"sub_block": 8, "threshold": 0.9},
    ("fast_dllm_v2", "gen_t1"): {"sub_block": 4, "threshold": 1.0},
    ("sdar", "gen_dynamic"): {"threshold": 0.9, **SDAR_GREEDY},
    ("sdar", "gen_static"): {"acceptance": "static", "steps": 4, **SDAR_GREEDY},
}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_the_official_continuation(published, family, name):
    official = published(family)
    lm, length = official.load(), official.facts["prompt_len"]
    prompt = official.data["ids"][0, :length].tolist()
    expected = official.data[name][0, length:].tolist()
    # The official code writes whole blocks (and the next seed token); here exactly what is asked is written.
    whole = lm.generate(prompt, max_new_tokens=len(expected), **CASES[family, name])
    assert whole.tokens == expected
    asked = official.facts["max_new_tokens"]
    out = lm.generate(prompt, max_new_tokens=asked, **CASES[family, name]).tokens
    common = min(asked, len(expected))
    assert len(out) == asked
    assert out[:common] == expected[:common]
    assert lm.generate(prompt, max_new_tokens=5, **CASES[family, name]).tokens == expected[:5]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_equals_it_inside_a_batch(published, family, name):
    official = published(family)
    lm, length = official.load(), official.facts["prompt_len"]
    ids = official.data["ids"][0].tolist()
    expected = official.data[name][0, length:].tolist()
    batch = [ids[:3], ids[:length], ids[:8], ids[5:30] * 2]
    out = lm.generate(batch, max_new_tokens=len(expected), **CASES[family, name])
    assert out.tokens[1] == expected
