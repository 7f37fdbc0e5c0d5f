"""The denoising forwards of one block per row: which are exact, which choose keys, which are sparse.

With a rule that chooses once, a block runs

    exact ... exact+choose | draft? | sparse ... sparse        (again exact+choose at each step of `reselect_at`)

with a rule that chooses every step all steps are sparse (the oracle's exact looks are free: it is no method but a
bound). A batch whose prefixes all fit in the budget runs the exact code throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mage_tune.decode.attention import (
    LayerView,
    Residual,
    Selection,
    Window,
    attention_with_log_mass,
    block_forward,
    observe_forward,
)
from mage_tune.decode.cache import OwnBlock, Prefix
from mage_tune.decode.rules import Observed, Rule, merge_observed


@dataclass(frozen=True, kw_only=True)
class Levers:
    """What may be added to a rule that chooses once per block."""

    refresh: Literal["draft", "union"] | None = None
    """After the choosing step, one more exact forward on the block's argmax draft: choose from that alone ("draft"), or
    by the larger of a key's two scores ("union"). The budget stays; the forward counts as an exact step."""
    reselect_at: tuple[int, ...] = ()
    """Later steps (from 0) that are exact again and choose anew."""
    residual: bool = False
    """Keep output and log-sum-exp of the keys not selected at the choosing step; merge them into every sparse step."""

    def __post_init__(self) -> None:
        if self.refresh not in (None, "draft", "union"):
            raise ValueError(f"unknown refresh {self.refresh!r} (known: draft, union)")
        if any(step < 1 for step in self.reselect_at):
            raise ValueError(f"reselect_at {list(self.reselect_at)}: steps count from 0, and step 0 always chooses")

    @property
    def is_used(self) -> bool:
        """Whether any lever is pulled."""
        return self != Levers()

    def settings(self) -> dict[str, Any]:
        """Every lever, for results."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """What a choosing forward leaves behind."""

    selection: Selection
    residual: Residual | None
    observed: list[Observed]
    """What it was chosen from; only for a refresh right after it."""

    def take(self, batch_rows: Sequence[int]) -> Choice:
        """The choice for some rows of the batch."""
        batch_rows = list(batch_rows)
        residual = None if self.residual is None else self.residual.take(batch_rows)
        observed = [
            Observed(seen.score[batch_rows], None if seen.strength is None else seen.strength[batch_rows])
            for seen in self.observed
        ]
        return Choice(self.selection.take(batch_rows), residual, observed)


def choose_forward(
    model: nn.Module,
    prefix: Prefix,
    block_ids: Tensor,
    rule: Rule,
    *,
    residual: bool = False,
    merge_with: Sequence[Observed] | None = None,
    how: Literal["draft", "union"] = "draft",
    window: Window | None = None,
) -> tuple[Tensor, Choice]:
    """An exact peek after which `rule` chooses the keys of later ones.

    Args:
        model, prefix, block_ids: as for `attention.block_forward`.
        rule: any but exact; one that chooses inside a step is asked what these exact queries would make it choose.
        residual: also keep the attention of these queries over the keys not selected.
        merge_with: what an earlier forward of the same block observed, merged by `how`.
        window: of whole blocks, to keep their keys and values.

    Returns:
        (batch, B, hidden) and the choice.
    """

    def look(view: LayerView) -> tuple[Observed, LayerView | None]:
        return rule.observe(view), view if residual else None

    hidden, looks = observe_forward(model, prefix, block_ids, look, first_layer=rule.dense_layers, window=window)
    if not looks:
        raise ValueError(f"dense_layers {rule.dense_layers} leave no layer of the model to be sparse")
    observed = [seen for seen, _ in looks]
    if merge_with is not None:
        observed = merge_observed(merge_with, observed, how)
    selection = rule.choose(observed, prefix.lengths)
    views = [view for _, view in looks if view is not None]
    return hidden, Choice(selection, _residual(prefix, selection, views) if residual else None, observed)


def _residual(prefix: Prefix, selection: Selection, views: Sequence[LayerView]) -> Residual:
    unselected = prefix.is_visible[:, None] & ~selection.as_mask(prefix.longest)  # (layers, batch, KV heads, N)
    parts = [
        attention_with_log_mass(view.rows, view.key, prefix.read(view.layer)[1], mask.unsqueeze(-2), view.scaling)
        for view, mask in zip(views, unselected, strict=True)
    ]
    return Residual(tuple(out for out, _ in parts), tuple(log_mass for _, log_mass in parts))


class BlockSteps:
    """State of the rows that denoise one block each, from its first step until the last of them is done."""

    def __init__(
        self,
        model: nn.Module,
        prefix: Prefix,
        rule: Rule,
        levers: Levers,
        max_steps: int,
        own: OwnBlock | None = None,
    ) -> None:
        self.model = model
        self.prefix = prefix
        self.rule = rule
        self.levers = levers
        self.own = own
        self.rows = list(range(len(prefix)))
        self.step = 0
        self.choice: Choice | None = None
        self.choosing_steps = {rule.select_at(max_steps), *levers.reselect_at}

    def forward(self, block_ids: Tensor, starts: Sequence[int | None] = (), size: int = 0) -> tuple[Tensor, list[bool]]:
        """The next step.

        Args:
            block_ids: (batch, B) int64.
            starts: with an in-block cache, for each row the first place of the sub-block, of `size` tokens, that is
                enough to recompute; None where the whole block is due.

        Returns:
            (batch, B, hidden), zeros where nothing was recomputed, and which rows saw less than their whole prefix.
        """
        step, self.step = self.step, self.step + 1
        shorter = [self.rule.is_sparse(n) for n in self.prefix.lengths]
        exact = [False] * len(shorter)
        if any(shorter) and self.rule.chooses == "once" and step in self.choosing_steps:
            window = self._window(range(len(shorter)), block_ids.device)
            hidden, self.choice = choose_forward(
                self.model, self.prefix, block_ids, self.rule, residual=self.levers.residual, window=window
            )
            return hidden, exact
        if any(shorter) and self.rule.chooses == "step":
            _, self.choice = choose_forward(self.model, self.prefix, block_ids, self.rule)
        is_sparse = any(shorter) and (self.choice is not None or self.rule.chooses == "layer")
        windows = [None] * len(shorter) if self.own is None or step == 0 else starts
        hidden = self._peek_windows(block_ids, windows, size, is_sparse)
        return hidden, shorter if is_sparse else exact

    def _peek_windows(self, ids: Tensor, starts: Sequence[int | None], size: int, is_sparse: bool) -> Tensor:
        """(batch, B, hidden): whole blocks where the start is None, else only `size` tokens from the start on."""
        whole = [i for i, start in enumerate(starts) if start is None]
        parts = [i for i, start in enumerate(starts) if start is not None]
        if not parts:
            return self._peek(whole, ids, None, is_sparse)
        start = torch.tensor([starts[i] for i in parts], device=ids.device)
        places = start[:, None] + torch.arange(size, device=ids.device)
        part = self._peek(parts, ids[parts].gather(1, places), start, is_sparse)
        hidden = part.new_zeros(*ids.shape, part.shape[-1])
        hidden[torch.tensor(parts, device=ids.device)[:, None], places] = part
        if whole:
            hidden[whole] = self._peek(whole, ids[whole], None, is_sparse)
        return hidden

    def _window(self, batch_rows: Sequence[int], device: torch.device, start: Tensor | None = None) -> Window | None:
        if self.own is None:
            return None
        return Window(self.own, torch.tensor([self.rows[i] for i in batch_rows], device=device), start)

    def _peek(self, batch_rows: Sequence[int], ids: Tensor, start: Tensor | None, is_sparse: bool) -> Tensor:
        """One forward of some rows of the batch, of the tokens `ids` from `start` on."""
        is_all = len(batch_rows) == len(self.prefix)
        prefix = self.prefix if is_all else self.prefix.take(batch_rows)
        window = self._window(batch_rows, ids.device, start)
        if not is_sparse:
            return block_forward(self.model, prefix, ids, window=window)
        if self.rule.chooses == "layer":
            return block_forward(self.model, prefix, ids, rule=self.rule, window=window)
        assert self.choice is not None
        choice = self.choice if is_all else self.choice.take(batch_rows)
        return block_forward(
            self.model, prefix, ids, selection=choice.selection, residual=choice.residual, window=window
        )

    @property
    def wants_draft(self) -> bool:
        """Whether `refresh` is due now, after the step that first chose."""
        return self.levers.refresh is not None and self.choice is not None and self.step - 1 == min(self.choosing_steps)

    def refresh(self, draft_ids: Tensor) -> list[bool]:
        """Choose again on the block filled with its argmax draft, (batch, B) int64: one exact forward.

        Returns:
            Which rows needed it: the others see their whole prefix anyway.
        """
        assert self.choice is not None
        assert self.levers.refresh is not None
        _, self.choice = choose_forward(
            self.model,
            self.prefix,
            draft_ids,
            self.rule,
            residual=self.levers.residual,
            merge_with=self.choice.observed,
            how=self.levers.refresh,
        )
        return [self.rule.is_sparse(n) for n in self.prefix.lengths]

    def keys_kept(self) -> list[float]:
        """Prefix keys per KV head that each row's sparse steps see, averaged over sparse layers and heads."""
        if self.choice is not None:
            return self.choice.selection.keys_kept().tolist()
        return [float(min(n, self.rule.num_pages(n) * self.rule.page)) for n in self.prefix.lengths]

    def take(self, batch_rows: Sequence[int]) -> None:
        """Go on with some of the rows, by their place in the batch."""
        self.prefix = self.prefix.take(batch_rows)
        self.rows = [self.rows[i] for i in batch_rows]
        if self.choice is not None:
            self.choice = self.choice.take(batch_rows)
