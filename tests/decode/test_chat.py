"""The conversation, as a terminal and as a pipe see it."""

import io

import pytest
from rich.console import Console

from mage_tune.decode.chat import Chat, chat

OPTIONS = {"max_new_tokens": 11, "stop_ids": ()}


@pytest.fixture
def talker(tiny_lm):
    return tiny_lm(block_size=4, vocab_size=264)


def run(lm, *lines, terminal=False, width=200, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=40, highlight=False, soft_wrap=True)
    chat(lm, console=console, lines=lines, **OPTIONS | options)
    return out.getvalue()


def shown(text):
    """How a console writes text: without the control characters of random bytes."""
    out = io.StringIO()
    Console(file=out, force_terminal=False, soft_wrap=True, width=200).print(
        text, end="", markup=False, highlight=False
    )
    return out.getvalue()


def test_the_cache_is_kept_and_changes_nothing(talker):
    talk = Chat(talker, "Be brief.", OPTIONS)
    for question in ("Hello", "And then?", "Why?"):
        turn = talk.ask(question)
        messages = talk.messages[:-1]
        fresh = talker.generate(messages, **OPTIONS)
        assert fresh.tokens == turn.generation.tokens
        assert talk.messages[-1] == {"role": "assistant", "content": fresh.text}
        assert turn.prompt_tokens == len(
            talker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
        assert (turn.reused_tokens > 0) == (question != "Hello")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_piped_answers_are_the_plain_text(talker):
    first = talker.generate([{"role": "user", "content": "Hello"}], **OPTIONS)
    text = run(talker, "Hello", "", "/quit", "never asked")
    assert text == shown(first.text) + "\n(cut at 11 tokens)\n"
    assert "\x1b" not in text


def test_a_terminal_sees_blocks_being_denoised(talker):
    text = run(talker, "Hello", terminal=True)
    assert "░░░" in text
    assert "step 1, exact" in text
    assert text.rstrip("\x1b[m0").endswith("(cut at 11 tokens)\n") or "(cut at 11 tokens)" in text


def test_a_block_longer_than_the_line_is_drawn_whole(tiny_lm):
    lm = tiny_lm(block_size=32, vocab_size=264)
    text = run(lm, "Hello", terminal=True, width=10, max_new_tokens=40)
    second = text.split("new ")[1].rsplit("\x1b[2K", 1)[1]  # as it is laid out, after the first was erased
    assert second.count("░") == 31, "all its lines of shades (its first token is known), not one of ten"


def test_commands(talker):
    said = run(talker, "/stats", "Hello", "/stats", "/reset", "/help", "/stas", "/nonsense")
    assert "nothing was said yet" in said
    assert "11 tokens in" in said
    assert "of them cached" in said
    assert "forwards" in said
    assert "forgotten" in said
    assert "leave" in said
    assert "no command /stas; did you mean /stats?" in said
    assert "no command /nonsense (there are /stats" in said


def test_stats_of_a_sparse_answer(talker):
    said = run(talker, "Hello, what is it that you do?", "/stats", attention="mage", budget=8, dense_layers=1)
    assert "mage" in said
    assert "100% of the blocks, 8 keys per KV head" in said


def test_a_full_context_says_so_and_keeps_the_conversation(tiny_lm):
    lm = tiny_lm(block_size=4, vocab_size=264, max_positions=64)
    talk = Chat(lm, None, OPTIONS)
    turn = talk.ask("Hi")
    assert len(turn.generation.tokens) == 11
    before = list(talk.messages)
    with pytest.raises(ValueError, match="the model's context 64: /reset it"):
        talk.ask("x" * 40)
    assert talk.messages == before
    talk.reset()
    asked = talk.ask("x" * 37)
    assert len(asked.generation.tokens) == 64 - asked.prompt_tokens < 11  # what is left of the room


def test_a_bad_question_does_not_end_the_conversation(tiny_lm):
    said = run(tiny_lm(block_size=4, vocab_size=264, max_positions=64), "y" * 70, "Hi", "/stats")
    assert "/reset it" in said
    assert "11 tokens in" in said


def test_refuses(tiny_lm, talker):
    with pytest.raises(ValueError, match="no tokenizer"):
        chat(tiny_lm(), lines=[])
    with pytest.raises(ValueError, match="did you mean 'mage'"):
        chat(talker, lines=[], attention="mags")
    template, talker.tokenizer.chat_template = talker.tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            chat(talker, lines=[])
    finally:
        talker.tokenizer.chat_template = template
