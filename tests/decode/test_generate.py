"""Generation: batches equal singles, lengths and stops, sampling, counts, and what is refused."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.rules import RULES, make_rule
from mage_tune.lm import BlockDiffusionLM, from_backbone

LENGTHS = (21, 3, 16, 40)
VARIANTS = {
    **{name: {"attention": name} for name in RULES},
    "draft": {"attention": "mage", "refresh": "draft"},
    "union": {"attention": "mage", "refresh": "union"},
    "follow": {"attention": "mage", "rule_options": {"follow": 2}},
    "reselect": {"attention": "mage", "reselect_at": 2},
    "residual": {"attention": "mage", "residual": True},
    "static": {"acceptance": "static", "steps": 4},
    "entropy": {"acceptance": "entropy", "entropy_bound": 0.5},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 3},
    "sub-blocks": {"sub_block": 2, "attention": "mage"},
    "in-block cache": {"sub_block": 4, "block_cache": True, "attention": "mage", "reselect_at": 5},
    "chunked": {"prefill_chunk": 8},
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [("converted", variant) for variant in VARIANTS]
    + [(family, variant) for family in ("fast_dllm_v2", "sdar") for variant in ("exact", "mage", "draft", "sampled")],
)
def test_a_batch_equals_its_rows_alone(tiny_lm, prompts, family, variant):
    lm, batch = tiny_lm(family, block_size=8), prompts(LENGTHS)
    options = {"budget": 12, "max_new_tokens": 18, "dense_layers": 1} | VARIANTS[variant]
    stop_ids = lm.generate(batch, **options, stop_ids=()).tokens[2][4:5]  # so that rows stop at different blocks
    together = lm.generate(batch, **options, stop_ids=stop_ids)
    for row, prompt in zip(together.rows, batch, strict=True):
        alone = lm.generate(prompt, **options, stop_ids=stop_ids)
        assert alone.tokens == row.tokens
        assert alone.rows == [row]
    assert together.rows[2].finish == "stop"
    assert {row.finish for row in together.rows} == {"stop", "length"}


@pytest.mark.parametrize("family", ["converted", "sdar"])
def test_a_shorter_text_is_a_prefix_of_a_longer_one(tiny_lm, prompts, family):
    lm = tiny_lm(family, block_size=8)
    (prompt,) = prompts((13,))
    longest = lm.generate(prompt, max_new_tokens=20, stop_ids=()).tokens
    assert len(longest) == 20
    for new in (1, 2, 3, 4, 8, 11, 12, 19):
        assert lm.generate(prompt, max_new_tokens=new, stop_ids=()).tokens == longest[:new]


def test_a_stop_token_ends_and_is_kept(tiny_lm, prompts):
    lm = tiny_lm(block_size=8)
    (prompt,) = prompts((13,))
    free = lm.generate(prompt, max_new_tokens=20, stop_ids=()).tokens
    for stop in set(free):
        out = lm.generate(prompt, max_new_tokens=20, stop_ids=(stop,))
        assert out.tokens == free[: free.index(stop) + 1]
        assert out.rows[0].finish == "stop"
    # A stop token of the prompt does not count.
    assert lm.generate([*prompt[:12], 33], max_new_tokens=1, stop_ids=(33,)).rows[0].tokens


def test_steps_are_as_many_as_asked(tiny_lm, prompts):
    lm = tiny_lm("sdar", block_size=8)
    (prompt,) = prompts((16,))
    for steps in (1, 2, 3, 8):
        out = lm.generate(prompt, max_new_tokens=16, steps=steps, acceptance="static", stop_ids=())
        assert out.forwards == {"prefill": 1, "exact": 2 * steps, "sparse": 0, "commit": 1}
        assert out.forwards_per_block == steps
    assert lm.generate(prompt, max_new_tokens=16, threshold=0.0, stop_ids=()).forwards["exact"] == 2
    assert lm.generate(prompt, max_new_tokens=16, threshold=1.0, stop_ids=()).forwards["exact"] == 16


def test_sampling_depends_on_the_seed_alone(tiny_lm, prompts):
    lm = tiny_lm(block_size=8)
    (prompt,) = prompts((13,))
    options = {"max_new_tokens": 24, "stop_ids": (), "temperature": 2.0}
    one, again, other = (lm.generate(prompt, **options, seed=seed).tokens for seed in (5, 5, 6))
    assert one == again
    assert one != other
    both = lm.generate([prompt, prompt], **options, seed=[5, 6])
    assert both.tokens == [one, other]
    assert lm.generate([prompt, prompt], **options, seed=5).tokens == [one, one]
    assert torch.initial_seed() == torch.initial_seed()


@pytest.mark.parametrize("family", ["fast_dllm_v2", "sdar"])
@pytest.mark.parametrize("attention", ["exact", "mage"])
def test_the_in_block_cache_is_exact_for_one_layer(tiny_lm, prompts, family, attention):
    # A layer's keys of the rest of the block can only be stale where the layer before saw the change.
    lm = tiny_lm(family, torch.float64, block_size=8, num_layers=1)
    options = {
        "sub_block": 4,
        "max_new_tokens": 18,
        "stop_ids": (),
        "attention": attention,
        "budget": 9,
        "dense_layers": 0,
    }
    batch = prompts(LENGTHS)
    plain = lm.generate(batch, **options)
    cached = lm.generate(batch, block_cache=True, **options)
    assert cached.tokens == plain.tokens
    assert cached.forwards == plain.forwards


def test_the_in_block_cache_is_an_approximation(tiny_lm, prompts):
    lm = tiny_lm("sdar", block_size=8)
    options = {"sub_block": 4, "max_new_tokens": 40, "stop_ids": ()}
    batch = prompts(LENGTHS)
    assert lm.generate(batch, block_cache=True, **options).tokens != lm.generate(batch, **options).tokens


def test_counts_and_settings(tiny_lm, prompts):
    lm = tiny_lm(block_size=8)
    long, short = prompts((40, 3))
    out = lm.generate([long, short], max_new_tokens=16, attention="mage", budget=30, stop_ids=(), threshold=1.0)
    # Both write 16 tokens: 40 + 16 are two blocks after the prompt, 3 + 16 are three with the tail.
    assert [row.blocks for row in out.rows] == [2, 3]
    assert out.rows[0].forwards == {"prefill": 1, "exact": 2, "sparse": 12, "commit": 1}
    assert out.rows[1].forwards == {"prefill": 0, "exact": 14, "sparse": 0, "commit": 2}
    assert out.forwards == {"prefill": 1, "exact": 16, "sparse": 12, "commit": 3}
    assert out.blocks == 5
    assert out.sparse_share == pytest.approx(2 / 5)
    assert out.keys_kept == 30
    assert out.rows[1].keys_kept is None
    assert out.text is None or isinstance(out.text, list)
    settings = json.loads(json.dumps(out.settings))
    assert settings["attention"]["rule"] == "mage"
    assert settings["attention"]["budget"] == 30
    assert settings["acceptance"]["threshold"] == 1.0


def test_a_rule_object_is_taken_as_it_is(tiny_lm, prompts):
    lm = tiny_lm(block_size=8)
    (prompt,) = prompts((40,))
    rule = make_rule("quest", budget=16, page_size=4)
    by_object = lm.generate(prompt, max_new_tokens=9, attention=rule)
    by_name = lm.generate(prompt, max_new_tokens=9, attention="quest", budget=16, rule_options={"page_size": 4})
    assert by_object.tokens == by_name.tokens
    assert by_object.settings == by_name.settings


def test_kinds_of_prompts(tiny_lm, prompts):
    lm = tiny_lm(block_size=4, vocab_size=264)
    lm.family = lm.family.with_overrides(stop_ids=(3,))
    text = "How deep?"
    ids = lm.tokenizer(text)["input_ids"]
    expected = lm.generate(ids, max_new_tokens=6).tokens
    assert isinstance(expected[0], int)
    assert lm.generate(text, max_new_tokens=6).tokens == expected
    assert lm.generate(torch.tensor(ids), max_new_tokens=6).tokens == expected
    assert lm.generate(np.array(ids), max_new_tokens=6).tokens == expected
    assert lm.generate(torch.tensor([ids, ids]), max_new_tokens=6).tokens == [expected, expected]
    assert lm.generate([text, ids, torch.tensor(ids)], max_new_tokens=6).tokens == [expected] * 3
    messages = [{"role": "user", "content": "Hi"}]
    chat = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    said = lm.generate(chat, max_new_tokens=6)
    assert lm.generate(messages, max_new_tokens=6).tokens == said.tokens
    assert lm.generate([messages, text], max_new_tokens=6).tokens == [said.tokens, expected]
    assert said.text == lm.tokenizer.decode(said.tokens, skip_special_tokens=True)


def test_stop_strings_cut_text_and_tokens(tiny_lm, prompts):
    lm = tiny_lm(block_size=4, vocab_size=264)
    (prompt,) = prompts((9,), vocab=250)
    free = lm.generate(prompt, max_new_tokens=24, stop_ids=())
    letters = [lm.tokenizer.decode([token]) for token in free.tokens]
    string = "".join(letters[9:11])
    assert string in free.text
    out = lm.generate(prompt, max_new_tokens=24, stop_ids=(), stop_strings=[string, "never said"])
    assert out.rows[0].finish == "stop_string"
    assert string in lm.tokenizer.decode(out.tokens)
    assert string not in lm.tokenizer.decode(out.tokens[:-1])
    assert out.tokens == free.tokens[: len(out.tokens)]
    assert out.text == free.text[: free.text.index(string)]


def test_a_kept_cache_reads_only_what_is_new(tiny_lm, prompts):
    lm = tiny_lm(block_size=4)
    (prompt,) = prompts((22,))
    cache = PrefixCache.for_model(lm.model, 1, 8)
    options = {"max_new_tokens": 9, "stop_ids": (), "prefill_chunk": 4}
    first = lm.generate(prompt, cache=cache, **options)
    assert first.forwards["prefill"] == 5
    longer = [*prompt, *first.tokens, *prompts((6,), seed=1)[0]]
    second = lm.generate(longer, cache=cache, **options)
    # 22 + 9 tokens: blocks 0..6 are whole; the last one was never committed; 37 tokens are nine whole blocks.
    assert second.forwards["prefill"] == 2
    assert second.tokens == lm.generate(longer, **options).tokens
    other = prompts((30,), seed=2)[0]
    assert lm.generate(other, cache=cache, **options).tokens == lm.generate(other, **options).tokens
    with pytest.raises(ValueError, match="1 rows for 2 prompts"):
        lm.generate([prompt, prompt], cache=cache)


def test_a_batch_keeps_a_cache_too(tiny_lm, prompts):
    lm, options = tiny_lm(block_size=8), {"max_new_tokens": 12, "stop_ids": (), "prefill_chunk": 8}
    batch = list(prompts((40, 13)))
    cache = PrefixCache.for_model(lm.model, 2, 8)
    first = lm.generate(batch, cache=cache, **options)
    longer = [[*prompt, *row.tokens, 7] for prompt, row in zip(batch, first.rows, strict=True)]
    second = lm.generate(longer, cache=cache, **options)
    assert [row.tokens for row in second.rows] == [row.tokens for row in lm.generate(longer, **options).rows]
    assert [row.forwards["prefill"] for row in first.rows] == [5, 1]
    assert all(row.forwards["prefill"] <= 2 for row in second.rows)


def test_a_block_that_is_done_at_its_first_step_needs_no_refresh(tiny_lm, prompts):
    lm = tiny_lm(block_size=8)
    (prompt,) = prompts((40,))
    options = {"attention": "mage", "budget": 4, "dense_layers": 1, "refresh": "draft", "stop_ids": ()}
    at_once = lm.generate(prompt, max_new_tokens=16, threshold=0.0, **options)
    assert at_once.forwards["exact"] == at_once.blocks, "one exact step each, and none for a draft nobody reads"
    slowly = lm.generate(prompt, max_new_tokens=16, threshold=1.0, **options)
    assert slowly.forwards["exact"] == 2 * slowly.blocks


def test_progress_tells_every_step(tiny_lm, prompts):
    lm = tiny_lm(block_size=4)
    (prompt,) = prompts((10,))
    seen = []
    out = lm.generate(prompt, max_new_tokens=9, on_step=seen.append, threshold=1.0)
    mask_id = lm.family.mask_id
    for before, after in pairwise(seen):
        if after.step:
            undecided = [sum(token == mask_id for token in p.block) for p in (before, after)]
            assert after.written == before.written
            assert undecided[1] < undecided[0] or after.is_finished
        else:
            assert before.is_finished
            assert after.written == before.written + before.block
    assert list(seen[-1].written + seen[-1].block) == out.tokens
    assert sum(p.is_finished for p in seen) == out.blocks


def test_training_mode_is_left_as_it_was(tiny_lm, prompts):
    lm = tiny_lm(block_size=4)
    lm.model.train()
    try:
        lm.generate(prompts((5,))[0], max_new_tokens=3)
        assert lm.model.training
    finally:
        lm.model.eval()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([[5, 6], []], {}, "prompt 1 is empty"),
        ([5, 64], {}, "token 64, outside the vocabulary of 64"),
        ([5, -1], {}, "token -1, outside"),
        ([5, 63], {}, r"holds the mask token \(63\) at position 1"),
        ([5] * 500, {}, "500 tokens plus max_new_tokens 128 exceed the context of 512"),
        ("text", {}, "no tokenizer: give token ids"),
        ([{"role": "user", "content": "hi"}], {}, "no tokenizer: give token ids"),
        (3.5, {}, "token ids, text or chat messages .*, got 3.5"),
        ([{"role": "user"}], {}, r"\(role and content\), got \[\{'role'"),
        (torch.tensor([1.5]), {}, "got \\[1.5\\]"),
        (torch.zeros(1, 2, 3), {}, "1 or 2 dimensions, got 3"),
        ([5], {"stop_strings": ["x"]}, "no tokenizer: stop strings"),
        ([5], {"attention": "qest"}, "unknown selection rule 'qest'; did you mean 'quest'"),
        ([5], {"budget": 0}, "budget 0"),
        ([5], {"attention": "mage", "budget": -4}, "budget -4"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens 0 must be at least 1"),
        ([5], {"sub_block": 3}, "sub_block 3 does not divide the block size 8"),
        ([5], {"steps": 9}, "steps 9 must be between 1"),
        ([5], {"steps": 1, "sub_block": 2}, "steps 1 must be between 4"),
        ([5], {"threshold": 1.5}, "threshold 1.5 is not a probability"),
        ([5], {"temperature": -1.0}, "temperature -1.0"),
        ([5], {"top_p": 0.0}, "top_p 0.0"),
        ([5], {"top_k": -1}, "top_k -1"),
        ([5], {"acceptance": "greedy"}, "unknown acceptance 'greedy'"),
        ([5], {"acceptance": "entropy", "entropy_bound": -1.0}, "entropy_bound -1.0"),
        ([5], {"refresh": "daft", "attention": "mage"}, "unknown refresh 'daft'"),
        ([5], {"residual": True}, "chooses once per block, not 'exact'"),
        ([5], {"refresh": "draft", "attention": "quest"}, "chooses once per block, not 'quest'"),
        ([5], {"reselect_at": 0, "attention": "mage"}, r"reselect_at \[0\]"),
        ([[5], [6]], {"seed": [1]}, "1 seeds for 2 prompts"),
        ([5], {"prefill_chunk": 0}, "prefill_chunk 0"),
        ([5], {"block_cache": True}, "give a sub_block smaller than the block"),
        (
            [5],
            {"block_cache": True, "sub_block": 4, "attention": "mage", "residual": True},
            "block_cache and residual exclude each other",
        ),
    ],
)
def test_bad_input(tiny_lm, prompt, options, message):
    lm = tiny_lm(block_size=8)
    with pytest.raises(ValueError, match=message) as caught:
        lm.generate(prompt, **options)
    assert "\n" not in str(caught.value)


def test_nan_logits(tiny_backbone, prompts):
    lm = from_backbone(tiny_backbone(block_size=4))
    (prompt,) = prompts((10,))
    cache = PrefixCache.for_model(lm.model, 1, 32)
    with torch.no_grad():
        lm.model.model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN"):
        lm.generate(prompt, max_new_tokens=4, cache=cache)
    assert cache.lengths == [8]


def test_an_adapter_writes_as_its_merged_weights_do(tiny_backbone, tiny_adapter, prompts):
    backbone = tiny_backbone(block_size=4)
    batch = prompts((21, 6))
    plain = from_backbone(backbone).generate(batch, max_new_tokens=12, stop_ids=()).tokens
    adapted = BlockDiffusionLM(tiny_adapter(backbone, train_mask_embedding=True), None, backbone.family)
    options = {"max_new_tokens": 12, "stop_ids": (), "attention": "mage", "budget": 8, "dense_layers": 1}
    attached = adapted.generate(batch, **options)
    merged = BlockDiffusionLM(adapted.model.merge_and_unload(), None, backbone.family)
    assert merged.generate(batch, **options).tokens == attached.tokens
    assert attached.tokens != plain
