"""Let an instruction-tuned model write conversations with itself, as training data that keeps its own chat abilities.

    python scripts/build_chat.py models/smollm2-135m recipes/data/smollm2-chat

Turning an autoregressive model into a block-diffusion one teaches it to fill masks; without conversations among what it
reads it forgets how to answer. No public chat data set is needed for that: its own answers are what it should keep.

1. *Questions.* Given the opening of a user's turn and nothing else, an instruction-tuned model writes what users ask
   (Magpie's idea, arXiv 2406.08464). Plain questions about everyday topics are added, which it rarely asks itself.
2. *Answers.* Greedy, as the sharpest target. Answers that do not end, or that go round in circles, are dropped.
3. *Conversations.* Question and answer pairs are strung together up to `--tokens` tokens, so that training rows are
   full; a fifth stays single, as most chats begin.

train.jsonl is written, and heldout.jsonl, single pairs of other questions to measure with. Every record is
{"messages": [{"role", "content"}, ...]}. On one H100: 10,000 questions in two and a half minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]
"""(question, answer)."""

COUNTRIES = (
    "France Germany Italy Spain Portugal Greece Poland Sweden Norway Finland Ireland England Japan China India Egypt "
    "Kenya Canada Mexico Brazil Argentina Chile Peru Australia Turkey Russia Austria Hungary Denmark Cuba"
)
TOPICS = (
    "gravity,photosynthesis,the moon,the sun,a rainbow,a volcano,an earthquake,the ocean,a desert,a rainforest,climate,"
    "electricity,a battery,magnetism,sound,light,energy,an atom,a molecule,DNA,evolution,a virus,the heart,the brain,"
    "sleep,exercise,a healthy breakfast,bread,coffee,tea,chocolate,cheese,rice,an apple,a banana,honey,a dog,a cat,"
    "a horse,an elephant,a whale,a penguin,a bee,a butterfly,a tree,a flower,a computer,the internet,a programming "
    "language,Python,a database,an operating system,Linux,a robot,artificial intelligence,machine learning,a neural "
    "network,an algorithm,encryption,a bicycle,a train,an airplane,a bridge,a telescope,a microscope,a piano,a guitar,"
    "jazz,a novel,a poem,Shakespeare,a museum,democracy,history,money,inflation,a bank,marketing,friendship,kindness,"
    "patience,creativity,teamwork,leadership,a good teacher,mathematics,a prime number,a triangle,geometry,algebra,"
    "chess,football,swimming,yoga,meditation,gardening,recycling,solar power,water,winter,summer"
)
FORMS = (
    "What is {}?",
    "Explain {} in one sentence.",
    "Why is {} important?",
    "Tell me something interesting about {}.",
    "Write a short poem about {}.",
)


def plain_questions() -> list[str]:
    """Everyday questions that a newcomer would try first."""
    capitals = [f"What is the capital of {country}?" for country in COUNTRIES.split()]
    return capitals + [form.format(topic) for topic, form in product(TOPICS.split(","), FORMS)]


def is_question(text: str) -> bool:
    """Whether a self-written user turn is worth answering."""
    return 3 <= len(text.split()) <= 60 and "<|" not in text and text[0].isalpha()


def is_circular(text: str) -> bool:
    """Whether an answer repeats itself: a line that comes back, or a stretch of eight words that does."""
    lines = [line.strip() for line in text.splitlines() if len(line.split()) >= 4]
    words = text.split()
    runs = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    return len(set(lines)) < len(lines) or len(set(runs)) < len(runs)


def string_together(pairs: Sequence[tuple[Pair, int]], limit: int, rng: random.Random) -> Iterator[list[Pair]]:
    """Conversations of several pairs each, of at most `limit` tokens; one pair in five stays alone.

    Args:
        pairs: each with its length in tokens.
        limit: most tokens of a conversation.
        rng: decides which stay alone.
    """
    current: list[Pair] = []
    used = 0
    for pair, tokens in pairs:
        if rng.random() < 0.2:
            yield [pair]
            continue
        if current and used + tokens > limit:
            yield current
            current, used = [], 0
        current.append(pair)
        used += tokens
    if current:
        yield current


def as_record(conversation: Sequence[Pair]) -> dict[str, list[dict[str, str]]]:
    """The conversation in the shape that chat sources read."""
    messages = []
    for question, answer in conversation:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


class Writer:
    """The model, writing many texts at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        tokenizer.padding_side = "left"
        probe = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False)
        self.opening, closing = probe.split("\0")
        self.stop_id = tokenizer(closing, add_special_tokens=False).input_ids[0]
        tokenizer.pad_token_id = self.stop_id  # some tokenizers name none

    def questions(self, count: int) -> list[str]:
        """Up to `count` user turns out of nothing."""
        return [text for text in self._write([self.opening] * count, 64, sample=True) if text and is_question(text)]

    def answers(self, questions: Sequence[str], max_tokens: int) -> list[str | None]:
        """Greedy answers; None where one did not end in time."""
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        return self._write(prompts, max_tokens, sample=False)

    @torch.no_grad()
    def _write(self, prompts: Sequence[str], max_tokens: int, sample: bool) -> list[str | None]:
        batch = self.tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95} if sample else {"do_sample": False}
        written = self.model.generate(
            **batch.to(self.model.device),
            max_new_tokens=max_tokens,
            eos_token_id=self.stop_id,
            pad_token_id=self.stop_id,
            **how,
        )[:, batch.input_ids.shape[1] :]
        return [
            self.tokenizer.decode(row, skip_special_tokens=True).strip() if self.stop_id in row else None
            for row in written
        ]


def main() -> int:
    """Write the file; refuses to overwrite one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an instruction-tuned autoregressive model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--pairs", type=int, default=10_000, help="questions to ask (some answers are dropped)")
    parser.add_argument("--batch", type=int, default=1024, help="texts written at a time")
    parser.add_argument("--answer-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--tokens", type=int, default=1900, help="longest conversation")
    parser.add_argument("--heldout", type=int, default=256, help="pairs kept apart")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"error: {arguments.out} exists; remove it or choose another name", file=sys.stderr)
        return 2
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    writer = Writer(model.to(device), AutoTokenizer.from_pretrained(arguments.model))
    questions = set(plain_questions())
    batches = range(0, arguments.pairs - len(questions), arguments.batch)
    for _ in track(batches, "questions"):
        questions.update(writer.questions(arguments.batch))
    asked = sorted(questions)
    rng.shuffle(asked)
    del asked[arguments.pairs :]
    pairs: list[tuple[Pair, int]] = []
    for start in track(range(0, len(asked), arguments.batch), "answers"):
        part = asked[start : start + arguments.batch]
        for question, answer in zip(part, writer.answers(part, arguments.answer_tokens), strict=True):
            if answer and not is_circular(answer):
                pairs.append(((question, answer), len(writer.tokenizer(question + answer).input_ids) + 12))
    heldout, pairs = pairs[: arguments.heldout], pairs[arguments.heldout :]
    conversations = list(string_together(pairs, arguments.tokens, rng))
    arguments.out.mkdir(parents=True)
    for name, part in (("train", conversations), ("heldout", [[pair] for pair, _ in heldout])):
        lines = [json.dumps(as_record(conversation), ensure_ascii=False) + "\n" for conversation in part]
        (arguments.out / f"{name}.jsonl").write_text("".join(lines))
    tokens = sum(count for _, count in pairs)
    print(f"{len(asked)} questions, {len(pairs)} answers in {len(conversations)} conversations, {tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
