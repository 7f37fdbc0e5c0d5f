"""A byte tokenizer for models with random weights: ordinary to transformers, needs no files."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|im_end|>",
    "<|mask|>",
    "<|im_start|>",
    "<|reserved_4|>",
    "<|reserved_5|>",
    "<|reserved_6|>",
    "<|reserved_7|>",
)
PAD_ID, STOP_ID, MASK_ID = 0, 1, 2
FIRST_BYTE = len(SPECIAL_TOKENS)
VOCAB_SIZE = FIRST_BYTE + 256

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte b of the UTF-8 text is token 8 + b; tokens 0 to 7 are special (pad 0, stop 1, mask 2).

    Needs a vocabulary of at least 264. Has a ChatML template, so chat data works as it does with a
    real model. The stop token is not the padding token.
    """
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for byte, letter in enumerate(_byte_letters()):
        vocabulary[letter] = FIRST_BYTE + byte
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Splitting at words changes no id, as nothing is merged; it keeps the model's cache useful.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path="byte_tokenizer",
        pad_token=SPECIAL_TOKENS[PAD_ID],
        eos_token=SPECIAL_TOKENS[STOP_ID],
        mask_token=SPECIAL_TOKENS[MASK_ID],
        additional_special_tokens=list(SPECIAL_TOKENS[MASK_ID + 1 :]),
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte (GPT-2's table).

    Printable Latin-1 bytes stand for themselves; the others take the letters from 256 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
