"""The device side of decoding: prefill, the steps of a block, and its commit, with nothing read back inside a block.

Every step is a function of static buffers (tokens, lengths, cache, kept keys), so each kind is one CUDA graph:

    exact    every key of the prefix
    score    the same, and the rule takes notes
    select   keys of all layers chosen and copied together
    sparse   the chosen keys alone; its shapes do not depend on the context
    commit   the finished block, clean: keys and values into the cache, the next block's seed
    commit+exact, commit+score   a commit and the next block's first step in one pass over weights and cache

With static acceptance the number of steps is known beforehand and nothing is read back. With a threshold the host
waits for each step's "done" flag: an empty slot of tens of microseconds, where running ahead of the flag would cost one
whole step per block.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_kernels.confidence import confidence
from mage_kernels.layout import by_token
from mage_tune.decode.engine.attention import (
    CommittingAttention,
    ExactAttention,
    Frame,
    KeptAttention,
    QuestAttention,
    ScoringAttention,
    TidalAttention,
)
from mage_tune.decode.engine.blocks import Blocks, check_settings, most_steps
from mage_tune.decode.engine.cache import Cache
from mage_tune.decode.engine.choice import Chooser, make_chooser
from mage_tune.decode.engine.forward import Attend, Body, Normed, Projection
from mage_tune.decode.engine.graphs import Graphs
from mage_tune.decode.engine.kernels import make_kernel
from mage_tune.decode.engine.weights import Weights
from mage_tune.decode.rules import Quest, Tidal
from mage_tune.decode.settings import Settings

Step = Literal["exact", "score", "select", "sparse", "commit", "commit+exact", "commit+score"]


class Engine:
    """A model, its memory and the rule of its sparse steps, for a batch of a fixed size.

    Args:
        weights: see `weights.weights_of` and `weights.random_weights`.
        settings: how blocks are filled, and the selection rule.
        batch: rows that walk together.
        capacity: tokens per row, the block in work included; at most the model's context.
        exact_kernel: who does exact attention: "ours", "sdpa", "flashinfer-fa2" or "flashinfer-auto".
        quest_form: how Quest's page scores are computed: "rows" (as published), "matrix" or "mean".
        use_graphs: CUDA graphs; by default wherever there is a GPU.
        impl: of the kernels: "triton" or "reference"; by default Triton on a GPU. It is never changed silently.
        cache: memory to use instead of new one, for engines that are timed one after the other.

    Raises:
        ValueError: a setting, rule or kernel that the engine has no form of, or that cannot run on this device.
    """

    def __init__(
        self,
        weights: Weights,
        settings: Settings,
        batch: int,
        capacity: int,
        *,
        exact_kernel: str = "ours",
        quest_form: str = "matrix",
        use_graphs: bool | None = None,
        impl: str | None = None,
        cache: Cache | None = None,
    ) -> None:
        check_settings(settings)
        is_cuda = weights.device.type == "cuda"
        if use_graphs and not is_cuda:
            raise ValueError(f"CUDA graphs need a GPU, the weights are on {weights.device.type}")
        self.weights, self.settings = weights, settings
        self.impl = impl or ("triton" if is_cuda else "reference")
        self.block_size, self.rule = settings.family.block_size, settings.rule
        self.cache = Cache(weights, batch, capacity) if cache is None else cache
        self.body = Body(weights, self.impl)
        self.blocks = Blocks(settings, batch, weights.device, self.impl)
        self.seed = torch.zeros(batch, dtype=torch.int64, device=weights.device)
        """Greedy next token after the block committed last."""
        self.advance = torch.full_like(self.cache.lengths, self.block_size)
        """What a commit adds to each row's length; 0 for rows that are finished."""
        self.is_active = [True] * batch
        self.finished = self.blocks.ids.clone()
        """Blocks that the next commit writes into the cache."""
        self.is_deferred = False
        """Whether they are still to be written, by the next blocks' first step."""
        frame = Frame(weights, self.cache, self.block_size, self.impl)
        self.frame = frame
        self.kernel = make_kernel(exact_kernel, self.cache, weights.shape, self.block_size, self.impl)
        self.exact = ExactAttention(frame, self.kernel)
        self.chooser: Chooser | None = None
        self.quest: QuestAttention | None = None
        self._attend: dict[Step, Attend] = {"exact": self.exact}
        self._add_rule(quest_form)
        state = [*self.blocks.state, self.seed, self.cache.lengths]
        self.graphs = Graphs(is_cuda if use_graphs is None else use_graphs, state)
        self._planned: dict[Step, Hashable] = {}
        self._planned_for: list[int] | None = None

    def _add_rule(self, quest_form: str) -> None:
        rule, frame = self.rule, self.frame
        self._attend["commit+exact"] = CommittingAttention(frame, self.advance, None)
        if rule.chooses == "never":
            return
        if isinstance(rule, Quest):
            self.quest = QuestAttention(frame, rule, quest_form, self.exact)
            self._attend["sparse"] = self.quest
        elif isinstance(rule, Tidal):
            self._attend["sparse"] = TidalAttention(frame, rule, self.exact)
        else:
            self.chooser = make_chooser(rule, frame)
            self._attend["score"] = ScoringAttention(frame, self.chooser, self.exact)
            self._attend["commit+score"] = CommittingAttention(frame, self.advance, self.chooser)
            self._attend["sparse"] = KeptAttention(frame, self.chooser.kept, self.exact)

    # --- one block ---

    def denoise(self, steps: int) -> dict[str, int]:
        """The steps of the blocks laid out: exactly `steps` of them, or fewer where a threshold finishes them.

        Returns:
            How many were exact and sparse.
        """
        self.plan()
        counts = {"exact": 0, "sparse": 0}
        is_selected = False
        for step in range(steps):
            kind = self.kind(step)
            if kind == "sparse" and self.chooser is not None and not is_selected:
                self.run("select")
                is_selected = True
            if self.is_deferred:
                self.is_deferred = False
                self.run("commit+score" if kind == "score" else "commit+exact")
            else:
                self.run(kind)
            counts["sparse" if kind == "sparse" else "exact"] += 1
            if self.settings.acceptance.name == "threshold" and self.blocks.are_done():
                break
        return counts

    def kind(self, step: int) -> Step:
        """What the step (from 0) of a block is."""
        if not any(map(self.rule.is_sparse, self.cache.held)):
            return "exact"
        if self.chooser is None:
            return "sparse"
        chosen_at = self.rule.select_at(self.settings.steps or self.block_size)
        return "exact" if step < chosen_at else "score" if step == chosen_at else "sparse"

    def keys_kept(self, prefix_length: int) -> float:
        """Keys per KV head that a sparse step sees of such a prefix, mean over the sparse layers."""
        if self.chooser is not None:
            return self.chooser.keys_kept(prefix_length)
        return min(prefix_length, self.rule.num_pages(prefix_length) * self.rule.page)

    def commit(self, *, may_wait: bool = False) -> None:
        """Write the finished blocks of the active rows into the cache; `seed` then holds their next tokens.

        Args:
            may_wait: the next call is `denoise` of the blocks that follow these in the same rows, whose first step may
                do it in the same pass (`fuses_commits`).
        """
        self._commit_now()  # nothing was denoised since
        self.plan()
        self.finished.copy_(self.blocks.ids)
        self.is_deferred = True
        if not (may_wait and self.fuses_commits):
            self._commit_now()
        size = self.block_size
        self.cache.held = [n + size * active for n, active in zip(self.cache.held, self.is_active, strict=True)]

    def _commit_now(self) -> None:
        """If a commit is still to be done."""
        if self.is_deferred:
            self.is_deferred = False
            self.run("commit")

    @property
    def fuses_commits(self) -> bool:
        """Whether a commit can be part of the next block's first step: an exact step, by our kernel, without a seed."""
        is_exact = self.chooser is not None or self.rule.chooses == "never"
        return is_exact and self.kernel.name == "ours" and not self.settings.family.seed_token

    def set_active(self, is_active: Sequence[bool]) -> None:
        """Which rows a commit moves on; all by default."""
        if list(is_active) != self.is_active:
            self._commit_now()
        self.is_active = list(is_active)
        self.advance.copy_(torch.tensor(self.is_active, dtype=torch.int32) * self.block_size)

    def plan(self) -> None:
        """Tell the exact kernel and the rule how long the prefixes are, as far as they must know on the host.

        Raises:
            ValueError: no room for another block, or prefixes that the kernel or the rule cannot serve.
        """
        if self._planned_for == self.cache.held:
            return
        if max(self.cache.held) + self.block_size > self.cache.capacity:
            raise ValueError(f"no room for another block in a cache of {self.cache.capacity} tokens")
        self._planned_for = list(self.cache.held)
        exact = self.kernel.plan([n + self.block_size for n in self.cache.held])
        kept = self.chooser.plan(self.cache.held) if self.chooser is not None else None
        has_dense = self.rule.dense_layers > 0 or isinstance(self.rule, Tidal)
        self._planned = {
            "exact": exact,
            "score": exact if has_dense else None,
            "select": kept,
            "sparse": exact if has_dense else None,
            "commit": exact,
            "commit+exact": exact,
            "commit+score": exact,
        }

    def run(self, kind: Step) -> None:
        """One step, as a graph where graphs are used."""
        self.graphs.run(kind, self._planned[kind], lambda: self._step(kind))

    @torch.no_grad()
    def _step(self, kind: Step) -> None:
        if kind == "select":
            assert self.chooser is not None
            self.chooser.select()
        elif kind == "commit":
            self._commit()
        elif kind in ("commit+exact", "commit+score"):
            both = self.body.forward(torch.cat([self.finished, self.blocks.ids]), self._attend[kind])
            self.blocks.accept(*self._greedy(both.rows(slice(self.finished.numel(), None))))
        else:
            hidden = self.body.forward(self.blocks.ids, self._attend[kind])
            self.blocks.accept(*self._greedy(hidden))

    @torch.no_grad()
    def look(self, kind: Step) -> Tensor:
        """Logits (batch, B, vocab) of an "exact", "score" or "sparse" step whose tokens are not accepted; no graph."""
        self._commit_now()
        hidden = self.body.forward(self.blocks.ids, self._attend[kind])
        return self.body.logits(hidden).unflatten(0, (-1, self.block_size))

    def _commit(self) -> None:
        hidden = self.body.forward(self.finished, self.exact)
        self.cache.lengths.add_(self.advance)
        if self.quest is not None:
            self.quest.update(self.block_size)
        if self.settings.family.seed_token:
            last = slice(self.block_size - 1, None, self.block_size)
            self.seed.copy_(self._greedy(hidden.rows(last))[0])

    def _greedy(self, hidden: Normed) -> tuple[Tensor, Tensor]:
        """Of n rows: most probable token (n,) int64 and its probability (n,) float32."""
        logits, mask_id = self.body.logits(hidden), self.blocks.mask_id
        if self.settings.family.name == "converted":
            # Never a target in training, so its mass means nothing; published families count it in the normalisation.
            logits[:, mask_id] = float("-inf")
        return confidence(logits, exclude=mask_id, impl=self.impl)

    def most_steps(self, masked: Sequence[int]) -> int:
        """Steps after which no mask token is left at the given places of a block."""
        return most_steps(self.settings, masked)

    # --- prompts ---

    @torch.no_grad()
    def prefill(self, row: int, ids: Sequence[int]) -> tuple[int, int]:
        """Read whole blocks of clean tokens into a row, block-causally, in chunks.

        Returns:
            The greedy next token, and how many forward passes it took.

        Raises:
            ValueError: not whole blocks, or they do not fit.
        """
        self._commit_now()
        size, held = self.block_size, list(self.cache.held)
        if not ids or len(ids) % size:
            raise ValueError(f"only whole blocks of {size} tokens can be read in, got {len(ids)} tokens")
        if held[row] + len(ids) > self.cache.capacity:
            raise ValueError(f"{len(ids)} more tokens do not fit in a cache of {self.cache.capacity}")
        chunk = max(size, self.settings.prefill_chunk // size * size)
        for start in range(0, len(ids), chunk):
            part = torch.tensor([ids[start : start + chunk]], device=self.weights.device)
            hidden = self.body.forward(part, self._prefill_attention(row, held[row], part.shape[1]))
            held[row] += part.shape[1]
            self.cache.set_lengths(held)
        if self.quest is not None:
            self.quest.update(len(ids))
        return int(self._greedy(hidden.rows(slice(-1, None)))[0]), -(-len(ids) // chunk)

    def _prefill_attention(self, row: int, before: int, width: int) -> Attend:
        """Block-causal attention of `width` new tokens of one row, by PyTorch."""
        cache, frame, shape = self.cache, self.frame, self.weights.shape
        position = torch.arange(before, before + width, device=self.weights.device)
        key_block = torch.arange(before + width, device=self.weights.device) // self.block_size
        mask = (key_block <= (position // self.block_size)[:, None]).repeat(shape.group, 1)  # (R, before + width)

        def attend(layer: int, qkv: Tensor | Projection) -> Tensor:
            one = slice(row, row + 1)
            keys, values, start = cache.keys[layer, one], cache.values[layer, one], cache.lengths[one]
            rows = frame.append(layer, qkv, keys, values, start, positions=start)
            seen = slice(0, before + width)
            out = F.scaled_dot_product_attention(
                rows, keys[:, :, seen], values[:, :, seen], attn_mask=mask, scale=frame.scale
            )
            return by_token(out, width)

        return attend
