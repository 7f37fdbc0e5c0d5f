"""The run of one generation: rows walk their blocks together through prefill, steps and commits (see `generate`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mage_tune.backbone import output_head
from mage_tune.blocks import round_up
from mage_tune.decode.attention import extend
from mage_tune.decode.cache import OwnBlock, PrefixCache
from mage_tune.decode.result import FORWARDS, Finish, Progress, RowResult
from mage_tune.decode.sampler import Sampling, cut_at_string, entropy_of, first_stop
from mage_tune.decode.settings import Settings
from mage_tune.decode.steps import BlockSteps

if TYPE_CHECKING:
    from mage_tune.lm import BlockDiffusionLM


@dataclass
class Row:
    """One prompt being continued."""

    index: int
    """Its row in the cache."""
    prompt: list[int]
    limit: int
    """Length at which the text ends, prompt included."""
    seed: int
    tokens: list[int] = field(init=False)
    """Prompt and what is decided after it without a gap."""
    block: list[int] = field(default_factory=list)
    """The block in work, the mask token where undecided."""
    start: int = 0
    """Position of its first token."""
    window_start: int = -1
    """Sub-block in work, from the start of the block, and the steps it has taken."""
    window_steps: int = 0
    finish: Finish | None = None
    forwards: Counter[str] = field(default_factory=Counter)
    blocks: int = 0
    sparse_blocks: int = 0
    keys_kept: float = 0.0
    """Summed over sparse steps."""

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def new_tokens(self) -> list[int]:
        """The continuation so far."""
        return self.tokens[len(self.prompt) :]

    def lay_out(self, block_size: int, mask_id: int) -> None:
        """Open the next block: what is decided of it already, then masks."""
        self.start = len(self.tokens) // block_size * block_size
        head = self.tokens[self.start :]
        self.block = head + [mask_id] * (block_size - len(head))
        self.window_start, self.window_steps = -1, 0
        self.blocks += 1

    def masked_window(self, window: int, mask_id: int) -> list[int]:
        """Masked places of the first sub-block that has any."""
        begin = self.block.index(mask_id) // window * window
        if begin != self.window_start:
            self.window_start, self.window_steps = begin, 0
        return [i for i in range(begin, begin + window) if self.block[i] == mask_id]

    def settle(self, settings: Settings) -> bool:
        """Move what is decided without a gap into `tokens`; True when the block, or the text, is done."""
        mask_id, size = settings.family.mask_id, len(self.block)
        decided = self.block.index(mask_id) if mask_id in self.block else size
        self.tokens = self.tokens[: self.start] + self.block[:decided]
        self.end_if_due(settings)
        return self.finish is not None or decided == size

    def end_if_due(self, settings: Settings) -> None:
        """Finish at the limit or at the first stop token of this block, whichever comes first."""
        begin = max(self.start, len(self.prompt))
        stop = first_stop(self.tokens[begin : self.limit], settings.stop_ids)
        if stop is not None:
            self.tokens, self.finish = self.tokens[: begin + stop + 1], "stop"
        elif len(self.tokens) >= self.limit:
            self.tokens, self.finish = self.tokens[: self.limit], "length"

    def progress(self, step: int, is_sparse: bool, is_finished: bool) -> Progress:
        """The row's state for whoever watches."""
        begin = max(self.start, len(self.prompt))
        block = self.block if self.finish is None else self.tokens[self.start :]
        written = self.tokens[len(self.prompt) : begin]
        return Progress(self.index, step, tuple(written), tuple(block[begin - self.start :]), is_sparse, is_finished)

    def result(self, lm: BlockDiffusionLM, settings: Settings) -> RowResult:
        """What the finished row gave."""
        assert self.finish is not None
        text = None
        if lm.tokenizer is not None:
            text = lm.tokenizer.decode(self.new_tokens, skip_special_tokens=True)
            if self.finish == "stop_string":
                text = text[: min((text.find(s) for s in settings.stop_strings if s in text), default=None)]
        sparse = self.forwards["sparse"]
        return RowResult(
            tokens=self.new_tokens,
            text=text,
            finish=self.finish,
            blocks=self.blocks,
            forwards={kind: self.forwards[kind] for kind in FORWARDS},
            sparse_blocks=self.sparse_blocks,
            keys_kept=self.keys_kept / sparse if sparse else None,
        )


class Writer:
    """Model, cache and rows of one `generate`."""

    def __init__(
        self,
        lm: BlockDiffusionLM,
        settings: Settings,
        rows: list[Row],
        cache: PrefixCache | None,
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        assert lm.family.mask_id is not None
        self.lm = lm
        self.settings = settings
        self.rows = rows
        self.on_step = on_step
        self.mask_id = lm.family.mask_id
        self.block_size = lm.family.block_size
        self.head = output_head(lm.model)
        capacity = round_up(max(row.limit for row in rows), self.block_size)
        self.cache = PrefixCache.for_model(lm.model, len(rows), capacity) if cache is None else cache
        self.cache.reserve(capacity)

    def run(self) -> None:
        """Write every row to its end."""
        for row in self.rows:
            self.cache.keep_common(row.index, row.prompt, self.block_size)
        self._append(self.rows, "prefill")
        while rows := [row for row in self.rows if row.finish is None]:
            for row in rows:
                row.lay_out(self.block_size, self.mask_id)
                self._report(row, 0, False, False)
            self._denoise(rows)
            self._end_at_strings(rows)
            self._append([row for row in rows if row.finish is None], "commit")
            self._end_at_strings(rows)  # a seed may have completed one

    def _append(self, rows: list[Row], kind: str) -> None:
        """Cache the whole blocks that rows have and the cache has not; seed the next block where the family does."""
        if not rows:
            return
        size, held = self.block_size, self.cache.lengths
        index = [row.index for row in rows]
        new = [row.tokens[held[row.index] : len(row.tokens) // size * size] for row in rows]
        hidden, passes = extend(self.lm.model, self.cache, new, size, rows=index, chunk=self.settings.prefill_chunk)
        for row, count in zip(rows, passes, strict=True):
            row.forwards[kind] += count
        if self.lm.family.seed_token:
            full = [i for i, row in enumerate(rows) if len(row.tokens) % size == 0]
            self._seed([rows[i] for i in full], hidden[full])

    def _seed(self, rows: list[Row], hidden: Tensor) -> None:
        """Open the next block of each row with the greedy next token after (rows, hidden), whatever the sampling."""
        if not rows:
            return
        tokens, _ = self._draw(Sampling(), self._logits(hidden), None)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.start = len(row.tokens)
            row.tokens.append(token)
            row.end_if_due(self.settings)
            if row.finish is not None:
                self._report(row, 0, False, True)

    def _denoise(self, rows: list[Row]) -> None:
        """All steps of one block of each row."""
        prefix = self.cache.prefix([row.index for row in rows])
        max_steps = self.settings.steps or self.block_size
        own = OwnBlock() if self.settings.block_cache else None
        steps = BlockSteps(self.lm.model, prefix, self.settings.rule, self.settings.levers, max_steps, own)
        turned_sparse: set[int] = set()
        while rows:
            windows = [row.masked_window(self.settings.window, self.mask_id) for row in rows]
            # A sub-block is done alone once its first token is known: until then its predictor is outside of it.
            starts = [
                None if row.window_start in places else row.window_start
                for row, places in zip(rows, windows, strict=True)
            ]
            hidden, is_sparse = steps.forward(self._ids(rows), starts, self.settings.window)
            kept = steps.keys_kept() if any(is_sparse) else []
            for i, row in enumerate(rows):
                row.forwards["sparse" if is_sparse[i] else "exact"] += 1
                if is_sparse[i]:
                    row.keys_kept += kept[i]
                    row.sparse_blocks += row.index not in turned_sparse
                    turned_sparse.add(row.index)
            draft = self._draft(rows, hidden) if steps.wants_draft else None
            self._accept(rows, hidden, windows)
            is_done = [row.settle(self.settings) for row in rows]
            for row, sparse, done in zip(rows, is_sparse, is_done, strict=True):
                self._report(row, steps.step, sparse, done)
            going = [i for i, done in enumerate(is_done) if not done]
            if going and len(going) < len(rows):
                steps.take(going)
            rows = [rows[i] for i in going]
            if draft is not None and rows:
                for row, refreshed in zip(rows, steps.refresh(draft[going]), strict=True):
                    row.forwards["exact"] += refreshed

    def _ids(self, rows: list[Row]) -> Tensor:
        return torch.tensor([row.block for row in rows], device=self.lm.device)

    def _accept(self, rows: list[Row], hidden: Tensor, windows: list[list[int]]) -> None:
        """Draw a token at each masked place of the rows' windows and keep what the acceptance rule keeps."""
        settings = self.settings
        logits = self._logits_at(hidden, windows)
        uniform = None
        if settings.sampling.temperature > 0.0:  # on the CPU, row by row: the same on any device, in any batch
            draws = [torch.rand(len(w), generator=row.generator) for row, w in zip(rows, windows, strict=True)]
            uniform = torch.cat(draws).double().to(logits.device)
        tokens, confidence = self._draw(settings.sampling, logits, uniform)
        entropy = entropy_of(logits).cpu() if settings.acceptance.name == "entropy" else None
        drawn, offset = tokens.tolist(), 0
        for row, window in zip(rows, windows, strict=True):
            mine = slice(offset, offset + len(window))
            offset = mine.stop
            places = torch.tensor(window) - row.window_start
            sure = torch.full((settings.window,), float("-inf")).index_copy(0, places, confidence[mine])
            unsure = None
            if entropy is not None:
                unsure = torch.full((settings.window,), float("inf")).index_copy(0, places, entropy[mine])
            accepted = settings.acceptance.accept(sure, unsure, settings.quota(row.window_steps))
            row.window_steps += 1
            for place, token in zip(window, drawn[mine], strict=True):
                if accepted[place - row.window_start]:
                    row.block[place] = token

    def _draft(self, rows: list[Row], hidden: Tensor) -> Tensor:
        """(rows, B) int64: the blocks with every masked place filled by its most probable token."""
        masked = [[i for i, token in enumerate(row.block) if token == self.mask_id] for row in rows]
        tokens, _ = self._draw(Sampling(), self._logits_at(hidden, masked), None)
        ids = self._ids(rows)
        ids[ids == self.mask_id] = tokens
        return ids

    def _logits_at(self, hidden: Tensor, places: list[list[int]]) -> Tensor:
        """(n, vocab) logits that predict the given places of each row's block, row after row."""
        shift = int(self.lm.family.token_shift)  # a seeded block's first token is never masked, so place >= shift
        batch_row = [i for i, row_places in enumerate(places) for _ in row_places]
        return self._logits(hidden[batch_row, [place - shift for row_places in places for place in row_places]])

    def _logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, vocab) float32."""
        logits = self.head(hidden).float()
        if self.lm.family.name == "converted":
            # Never a target in training, so its mass means nothing; published families count it in the normalisation.
            logits[:, self.mask_id] = float("-inf")
        return logits

    def _draw(self, sampling: Sampling, logits: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and, on the CPU, their confidences; see `Sampling.draw`."""
        tokens, confidence = sampling.draw(logits, uniform, self.mask_id)
        confidence = confidence.cpu()
        if confidence.isnan().any():
            raise ValueError("the model's logits are NaN or infinite: check the weights, the adapter and the dtype")
        return tokens, confidence

    def _end_at_strings(self, rows: list[Row]) -> None:
        """Cut the rows whose text holds a stop string after the token that completes it."""
        if not self.settings.stop_strings:
            return
        assert self.lm.tokenizer is not None
        for row in rows:
            end = cut_at_string(row.new_tokens, self.settings.stop_strings, self.lm.tokenizer.decode)
            if end is not None:
                row.tokens, row.finish = row.tokens[: len(row.prompt) + end], "stop_string"

    def _report(self, row: Row, step: int, is_sparse: bool, is_finished: bool) -> None:
        if self.on_step is not None:
            self.on_step(row.progress(step, is_sparse, is_finished))
