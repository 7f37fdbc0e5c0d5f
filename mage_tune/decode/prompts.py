"""From what a user gives to token ids: prompts as ids, text or chat messages, one or a batch, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mage_tune.backbone import causal_lm
from mage_tune.decode.settings import Settings

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM


def read_prompts(lm: BlockDiffusionLM, prompt: Any) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether a batch was given (see `generate.generate`).

    Raises:
        ValueError: not a prompt, an empty one, or one that needs a tokenizer where there is none.
    """
    if isinstance(prompt, (Tensor, np.ndarray)):
        if prompt.ndim not in (1, 2):
            raise ValueError(f"a prompt array has 1 or 2 dimensions, got {prompt.ndim}")
        is_batch, prompt = prompt.ndim == 2, prompt.tolist()
    else:
        is_batch = isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], (int, Mapping))
    return [_prompt_ids(lm, one) for one in (prompt if is_batch else [prompt])], is_batch


def _prompt_ids(lm: BlockDiffusionLM, prompt: Any) -> list[int]:
    if isinstance(prompt, (Tensor, np.ndarray)):
        prompt = prompt.tolist()
    is_text, is_list = isinstance(prompt, str), isinstance(prompt, (list, tuple))
    if is_list and all(isinstance(token, int) for token in prompt):
        return list(prompt)
    if not is_text and not (is_list and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in prompt)):
        raise ValueError(f"a prompt is token ids, text or chat messages (role and content), got {prompt!r:.60}")
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: give token ids")
    if is_text:
        return list(lm.tokenizer(prompt)["input_ids"])
    if not getattr(lm.tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: give text or token ids")
    return list(lm.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False))


def check_prompts(lm: BlockDiffusionLM, prompts: list[list[int]], settings: Settings) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        ValueError: empty, a token outside the vocabulary, the mask token, or too long for the context; or stop strings
            without a tokenizer.
    """
    config = causal_lm(lm.model).config
    if not isinstance(settings.seed, int) and len(settings.seed) != len(prompts):
        raise ValueError(f"{len(settings.seed)} seeds for {len(prompts)} prompts")
    if settings.stop_strings and lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: stop strings cannot be found, give stop_ids")
    for i, ids in enumerate(prompts):
        which = f"prompt {i}" if len(prompts) > 1 else "the prompt"
        if not ids:
            raise ValueError(f"{which} is empty")
        outside = [token for token in ids if not 0 <= token < config.vocab_size]
        if outside:
            raise ValueError(f"{which} holds token {outside[0]}, outside the vocabulary of {config.vocab_size}")
        if lm.family.mask_id in ids:
            at = ids.index(lm.family.mask_id)
            raise ValueError(f"{which} holds the mask token ({lm.family.mask_id}) at position {at}")
        if len(ids) + settings.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{which} of {len(ids)} tokens plus max_new_tokens {settings.max_new_tokens} exceed the context of "
                f"{config.max_position_embeddings}: shorten one, or extend the context (decode.context.extend_context)"
            )
