"""`mage-tune chat`: a conversation whose cache is kept, with blocks shown while they are denoised.

On a terminal the block in work is drawn live: what is decided in colour, what is still masked as shades, and below it
the step and what attention it used. Piped, each line of input is a question and the answers come as plain text.

    /stats   numbers of the last answer       /reset   forget the conversation
    /help    this list                        /quit    leave (so does the end of input)
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mage_tune.backbone import causal_lm
from mage_tune.decode.cache import PrefixCache
from mage_tune.decode.generate import Generation, Progress, generate
from mage_tune.decode.rules import make_rule

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM

COMMANDS = {
    "/stats": "numbers of the last answer",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "leave",
}
MASK_SHADE = "░"


@dataclass(frozen=True)
class Turn:
    """One answer and what it took."""

    generation: Generation
    seconds: float
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens that were in the cache already."""

    def numbers(self) -> dict[str, str]:
        """Label and value of everything worth telling."""
        out = self.generation
        count = len(out.tokens)
        numbers = {
            "prompt": f"{self.prompt_tokens} tokens, {self.reused_tokens} of them cached",
            "answer": f"{count} tokens in {self.seconds:.1f} s, {count / self.seconds:.1f} tokens/s",
            "blocks": f"{out.blocks}, {out.forwards_per_block:.1f} steps each",
            "forwards": ", ".join(f"{n} {kind}" for kind, n in out.forwards.items() if n),
            "attention": str(out.settings["attention"]["rule"]),
        }
        if out.keys_kept is not None:
            numbers["sparse"] = f"{out.sparse_share:.0%} of the blocks, {out.keys_kept:.0f} keys per KV head"
        return numbers


@dataclass
class Chat:
    """A conversation: messages, the cache that holds them, and the options of every answer (see `generate`).

    Raises:
        ValueError: the checkpoint has no tokenizer or no chat template, or an option cannot be.
    """

    lm: BlockDiffusionLM
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(init=False)
    last: Turn | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.lm.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer: nothing to chat with")
        if not getattr(self.lm.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: use `mage-tune generate --raw`")
        make_rule(
            self.options.get("attention", "exact"), budget=self.options.get("budget")
        )  # before the first question
        self.cache = PrefixCache.for_model(self.lm.model, 1, 0)
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, on_step: Callable[[Progress], None] | None = None) -> Turn:
        """Say something; the answer joins the conversation.

        Raises:
            ValueError: no room is left for an answer, or see `generate`; the conversation is as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        assert self.lm.tokenizer is not None
        prompt = self.lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        context = causal_lm(self.lm.model).config.max_position_embeddings
        room = context - len(prompt)
        if room < 1:
            raise ValueError(f"the conversation has {len(prompt)} tokens, the model's context {context}: /reset it")
        options = self.options | {"max_new_tokens": min(room, self.options.get("max_new_tokens", 512))}
        reused = self.cache.keep_common(0, prompt, self.lm.family.block_size)
        began = time.perf_counter()
        out = generate(self.lm, list(prompt), cache=self.cache, on_step=on_step, **options)
        self.last = Turn(out, time.perf_counter() - began, len(prompt), reused)
        self.messages = [*messages, {"role": "assistant", "content": out.text}]
        return self.last


def chat(
    lm: BlockDiffusionLM,
    *,
    system: str | None = None,
    console: Console | None = None,
    lines: Iterable[str] | None = None,
    **options: Any,
) -> None:
    """Talk until /quit or the end of input.

    Args:
        lm: the model.
        system: system prompt.
        console: where answers go; standard output by default.
        lines: what is said; by default typed on a terminal, or read from standard input.
        options: of `generate`, for every answer.

    Raises:
        ValueError: see `Chat`.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    talk = Chat(lm, system, options)
    for line in _typed(console) if lines is None else lines:
        said = line.strip()
        if said == "/quit":
            return
        if said.startswith("/"):
            _obey(talk, said, console)
        elif said:
            _answer(talk, said, console)


def _typed(console: Console) -> Iterator[str]:
    """Lines from a terminal, with a prompt, or from a pipe."""
    if not (console.is_terminal and sys.stdin.isatty()):
        yield from sys.stdin
        return
    console.print(Text(f"{', '.join(COMMANDS)}; Ctrl-C stops an answer", style="dim"))
    while True:
        try:
            yield console.input("[bold]> [/]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def _obey(talk: Chat, command: str, console: Console) -> None:
    if command == "/reset":
        talk.reset()
        console.print(Text("forgotten", style="dim"))
    elif command == "/help":
        console.print(_pairs(COMMANDS))
    elif command == "/stats" and talk.last is None:
        console.print(Text("nothing was said yet", style="dim"))
    elif command == "/stats":
        assert talk.last is not None
        console.print(_pairs(talk.last.numbers()))
    else:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f" (there are {', '.join(COMMANDS)})"
        console.print(Text(f"no command {command}{hint}", style="dim"))


def _pairs(pairs: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for left, right in pairs.items():
        table.add_row(Text(left, style="dim"), right)
    return table


def _answer(talk: Chat, said: str, console: Console) -> None:
    screen = _LiveAnswer(talk, console) if console.is_terminal else _PlainAnswer(talk, console)
    try:
        with screen:
            turn = talk.ask(said, screen.show)
    except KeyboardInterrupt:
        console.print(Text("(stopped; this question is forgotten)", style="dim"))
    except ValueError as error:
        console.print(Text(str(error), style="red"))
    else:
        screen.finish(turn.generation)


class _PlainAnswer:
    """Text as its blocks are done, for pipes."""

    def __init__(self, talk: Chat, console: Console) -> None:
        self.talk = talk
        self.console = console
        self.printed = ""

    def __enter__(self) -> _PlainAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Text of tokens, special ones left out."""
        assert self.talk.lm.tokenizer is not None
        return self.talk.lm.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def show(self, progress: Progress) -> None:
        """Print what a finished block adds, less a character whose last bytes are still to come."""
        # With stop strings the end may be cut back: wait for it.
        if progress.is_finished and not self.talk.options.get("stop_strings"):
            self._print_up_to(self.decode(progress.written + progress.block).rstrip("\ufffd"))

    def finish(self, out: Generation) -> None:
        """Print the rest."""
        self._print_up_to(out.text)
        self.console.print()
        if out.rows[0].finish == "length":
            self.console.print(Text(f"(cut at {len(out.tokens)} tokens)", style="dim"))

    def _print_up_to(self, text: str) -> None:
        self.console.print(Text(text[len(self.printed) :]), end="")
        self.printed = text


class _LiveAnswer(_PlainAnswer):
    """The line in work and its block, redrawn at every step; lines that are done scroll away above."""

    def __init__(self, talk: Chat, console: Console) -> None:
        super().__init__(talk, console)
        self.live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> _LiveAnswer:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, progress: Progress) -> None:
        """Draw one step."""
        written = self.decode(progress.written)
        done = written.rfind("\n") + 1
        if done > len(self.printed) and not self.talk.options.get("stop_strings"):
            self._print_up_to(written[:done])
        drawing = Text(written[len(self.printed) :])
        drawing.append_text(self._block(progress.block))
        kind = "sparse" if progress.is_sparse else "exact"
        state = f"step {progress.step}, {kind}" if progress.step else "new block"
        shown = Text("\n").join([drawing, Text(state, style="dim")])
        shown.no_wrap, shown.overflow = False, "fold"  # whatever the console does with finished lines
        self.live.update(shown, refresh=True)

    def _block(self, block: tuple[int, ...]) -> Text:
        """Decided tokens in colour, masked ones as shades."""
        drawing = Text()
        for is_masked, run in groupby(block, lambda token: token == self.talk.lm.family.mask_id):
            tokens = tuple(run)
            drawing.append(
                MASK_SHADE * len(tokens) if is_masked else self.decode(tokens), "dim" if is_masked else "cyan"
            )
        return drawing
