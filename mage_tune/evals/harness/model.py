"""A block-diffusion model as lm-evaluation-harness sees one: registered there as "mage_tune".

    python -m mage_tune.evals.harness run --model mage_tune --tasks gsm8k \\
        --model_args pretrained=me/model,adapter=runs/7b,attention=mage,budget=512

`generate_until` decodes block by block in batches; `loglikelihood` is the estimator of `likelihood`. A prompt that does
not fit is refused, never cut.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mage_tune.backbone import causal_lm
from mage_tune.decode.generate import generate
from mage_tune.decode.result import Generation, RowResult
from mage_tune.decode.rules import make_rule
from mage_tune.evals.harness.likelihood import ContinuationScorer
from mage_tune.lm import BlockDiffusionLM, load

OURS = {"lm", "prompt", "max_new_tokens", "stop_strings", "temperature", "cache", "on_step"}
"""Arguments of `generate` that a request sets, or that a harness cannot."""
RULE_OPTIONS = ("budget", "dense_layers", "sinks", "recent")


@dataclass(frozen=True)
class Answer:
    """What answering one generation request took."""

    row: RowResult
    prompt_tokens: int
    seconds: float
    """Its share of the batch's wall time."""

    @property
    def forwards_per_block(self) -> float:
        """Denoising forwards (exact and sparse) per block written."""
        return (self.row.forwards["exact"] + self.row.forwards["sparse"]) / max(1, self.row.blocks)

    @property
    def sparse_share(self) -> float:
        """Share of the denoising forwards that were sparse."""
        forwards = self.row.forwards
        return forwards["sparse"] / max(1, forwards["exact"] + forwards["sparse"])


@register_model("mage_tune")
class HarnessLM(TemplateLM):
    """A block-diffusion model behind lm-eval's interface.

    Args:
        pretrained: a loaded model, or checkpoint or adapter folder or Hub id.
        adapter, family, dtype, device, revision, block_size, mask_id: as for `mage_tune.load`.
        batch_size: most prompts that decode together.
        batch_tokens: most tokens, prompts and answers, that a batch holds; one prompt always goes.
        max_length: most tokens of prompt and answer; the model's positions by default.
        max_gen_toks: tokens of an answer where a task does not say.
        max_batch_size: lm-eval's command line passes it; batches here have one size.
        decoding: further arguments of `lm.generate`: attention, budget, threshold, steps, ...

    Raises:
        ValueError: no tokenizer, or an option that does not exist or cannot work.
    """

    def __init__(
        self,
        pretrained: str | BlockDiffusionLM,
        adapter: str | None = None,
        family: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        block_size: int | None = None,
        mask_id: int | None = None,
        batch_size: int | str = 8,
        batch_tokens: int = 131_072,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        unknown = decoding.keys() - (inspect.signature(generate).parameters.keys() - OURS)
        if unknown:
            raise ValueError(f"mage_tune: generation has no option {sorted(unknown)[0]!r}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"mage_tune: batch_size {batch_size!r} is not a number of prompts")
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"mage_tune: no GPU here for {device!r}, which is lm-eval's default; give --device cpu")
        if isinstance(pretrained, str):
            facts = {"revision": revision, "block_size": block_size, "mask_id": mask_id}
            pretrained = load(
                pretrained, family=family, adapter=adapter, dtype=dtype, device=device or "auto", **cast(Any, facts)
            )
        if pretrained.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it can answer no benchmark")
        self.lm = pretrained
        self.tokenizer = pretrained.tokenizer
        self.decoding = decoding
        self.batch_size, self.batch_tokens = int(batch_size), batch_tokens
        positions = causal_lm(pretrained.model).config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= positions:
            raise ValueError(
                f"mage_tune: max_length {max_length} is not between 2 and the model's {positions} positions"
            )
        self.max_length: int = max_length or positions
        self.max_gen_toks = max_gen_toks
        self.answers: dict[int, Answer] = {}
        """By the id of the request (a request asked several times keeps its last)."""
        self.settings: dict[str, Any] = {}
        """Decoding settings of the last generation."""
        self.advance: Callable[[], None] = lambda: None
        self._device = pretrained.device

    # -- text and tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.lm.family.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What an unconditional text is conditioned on."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache."""
        return str(getattr(self.tokenizer, "name_or_path", type(self.tokenizer).__name__)).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as text; without a generation prompt the last message is left open, to be continued.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template: evaluate without one (chat: false)")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text begins with them already."""
        if add_special_tokens is None:
            bos = getattr(self.tokenizer, "bos_token", None)
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, **kwargs)["input_ids"])

    # -- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue every prompt; longest first, so that memory runs out at once if it does.

        Raises:
            ValueError: a prompt and its answer do not fit in `max_length`.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        wishes = [
            normalize_gen_kwargs(dict(request.args[1]), default_max_gen_toks=self.max_gen_toks) for request in requests
        ]
        for request in requests:
            self.check_request(request)
        texts: dict[int, str] = {}
        for batch in self.batches(prompts, wishes):
            started = time.perf_counter()
            out = self.generate([prompts[i] for i in batch], wishes[batch[0]])
            seconds = (time.perf_counter() - started) / len(batch)
            for i, row in zip(batch, out.rows, strict=True):
                texts[i] = row.text or ""
                self.answers[id(requests[i])] = Answer(row, len(prompts[i]), seconds)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                self.advance()
        return [texts[i] for i in range(len(requests))]

    def check_request(self, request: Instance, length: int | None = None) -> None:
        """Make sure that a generation's prompt and answer fit in the model, or in `length` tokens.

        Raises:
            ValueError: they do not.
        """
        wish = normalize_gen_kwargs(dict(request.args[1]), default_max_gen_toks=self.max_gen_toks)
        what = f"{request.task_name} sample {request.doc_id}"
        self._check_length(len(self.tok_encode(request.args[0])), wish["max_gen_toks"], what, length)

    def _check_length(self, prompt: int, new: int, what: str, length: int | None = None) -> None:
        length = self.max_length if length is None else length
        if prompt + new > length:
            raise ValueError(
                f"{what}: a prompt of {prompt} tokens and an answer of {new} exceed {length} tokens; "
                "nothing is cut silently, so choose shorter prompts (lengths, fewer shots) or a longer context"
            )

    def batches(self, prompts: Sequence[Sequence[int]], wishes: Sequence[Any]) -> list[list[int]]:
        """Numbers of the requests that decode together: same wishes, similar lengths, within rows and tokens."""
        order = sorted(range(len(prompts)), key=lambda i: (_key(wishes[i]), -len(prompts[i])))
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else []
            longest = len(prompts[last[0]]) + wishes[last[0]]["max_gen_toks"] if last else 0
            is_full = len(last) >= self.batch_size or longest * (len(last) + 1) > self.batch_tokens
            if not last or is_full or _key(wishes[i]) != _key(wishes[last[0]]):
                batches.append([i])
            else:
                last.append(i)
        return batches

    def generate(self, prompts: list[list[int]], wish: Any) -> Generation:
        """One batch of token ids, as a request's normalised keyword arguments wish."""
        asked: dict[str, Any] = {
            "max_new_tokens": wish["max_gen_toks"],
            "stop_strings": [s for s in wish["until"] if s],
        }
        if wish["do_sample"]:
            asked |= {name: wish[name] for name in ("temperature", "top_p", "top_k") if name in wish}
        out = self.lm.generate(prompts, **(self.decoding | asked))
        self.settings = out.settings
        return out

    # -- likelihood

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval splits and scores text; its bar is off, as `advance` says where we are."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores of (texts, context ids, continuation ids), in order; shared contexts are read once."""
        for (context, _), before, after in requests:
            self._check_length(len(before), len(after), f"a request that begins with {context[:40]!r}")
        scorer = self._scorer(max((len(before) + len(after) for _, before, after in requests), default=1))
        found: dict[int, tuple[float, bool]] = {}
        for i in sorted(range(len(requests)), key=lambda i: requests[i][1:]):
            score = scorer.score(*requests[i][1:])
            found[i] = (score.log_probability, score.is_greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            self.advance()
        return [found[i] for i in range(len(requests))]

    def _scorer(self, capacity: int) -> ContinuationScorer:
        levers = [name for name in ("refresh", "reselect_at", "residual") if self.decoding.get(name)]
        if levers:
            raise ValueError(f"likelihoods are not defined under {levers[0]}: it changes what later steps see")
        options = {name: self.decoding.get(name) for name in RULE_OPTIONS} | (self.decoding.get("rule_options") or {})
        rule = make_rule(self.decoding.get("attention", "exact"), **options)
        self.settings = {"attention": rule.settings(), "likelihood": "left to right inside each block"}
        return ContinuationScorer(self.lm, rule, capacity)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in lm-eval's windows of `max_length` tokens: each token is scored once."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            # The prefix token counts, so that window and context never exceed the model's positions.
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, 1)
            scorer = self._scorer(self.max_length)
            pairs = [make_disjoint_window(window) for window in windows]
            total = sum(scorer.score(before, after).log_probability for before, after in pairs)
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            self.advance()
        return totals


def _key(wish: Any) -> str:
    """Requests with the same key may decode together."""
    return repr(sorted(wish.items()))
