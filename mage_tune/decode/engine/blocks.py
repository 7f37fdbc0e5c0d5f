"""The blocks in work, on the device, and how a step fills them: everything a CUDA graph reads and writes.

The rules are those of `decode.sampler` at temperature 0 (threshold and static acceptance, sub-blocks, quotas), written
without a single value that the host has to see: which sub-block is in work, how many tokens its step asks for and which
draws are the surest are all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mage_tune.decode.settings import Settings


def check_settings(settings: Settings) -> None:
    """Refuse what the engine has no form of.

    Raises:
        ValueError: a setting that only the plain decoder knows.
    """
    family = settings.family
    refused = {
        "temperature above 0": settings.sampling.temperature > 0.0,
        "acceptance by entropy": settings.acceptance.name == "entropy",
        "refresh, reselect_at and residual": settings.levers.is_used,
        "block_cache": settings.block_cache,
        "a family that shifts tokens and does not seed its blocks": family.token_shift and not family.seed_token,
        "a family without a mask token": family.mask_id is None,
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ValueError(f"the decode engine does not support {what}")


def most_steps(settings: Settings, masked: Sequence[int]) -> int:
    """Steps after which a block has no mask token left, whatever the confidences; exact for static acceptance.

    Args:
        settings: window, steps and block size.
        masked: places of the block that hold the mask token.
    """
    total = 0
    for begin in range(0, settings.family.block_size, settings.window):
        left, step = sum(begin <= place < begin + settings.window for place in masked), 0
        while left > 0:
            left -= settings.quota(step)
            step += 1
        total += step
    return total


class Blocks:
    """One block per row of the batch, denoised in place."""

    def __init__(self, settings: Settings, batch: int, device: torch.device) -> None:
        assert settings.family.mask_id is not None
        size = settings.family.block_size
        self.acceptance, self.window, self.mask_id = settings.acceptance, settings.window, settings.family.mask_id
        self.ids = torch.full((batch, size), self.mask_id, device=device)
        """(batch, B) int64, the mask token where undecided."""
        self.window_start = torch.full((batch, 1), -1, device=device)
        self.window_step = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.taken = torch.zeros(batch, dtype=torch.int64, device=device)
        """Steps that each row has taken part in: those before which it had a mask token."""
        self.is_done = torch.zeros(1, dtype=torch.bool, device=device)
        """Whether no row has a mask token left."""
        self.is_sane = torch.ones(1, dtype=torch.bool, device=device)
        """False once a confidence was NaN."""
        self.quotas = torch.tensor([settings.quota(step) for step in range(self.window)], device=device)
        self.places = torch.arange(size, device=device)

    def lay_out(self, ids: Tensor) -> None:
        """Open a block in every row: ids (batch, B) int64, what is decided already and masks."""
        self.ids.copy_(ids)
        self.window_start.fill_(-1)
        self.window_step.zero_()
        self.taken.zero_()

    def accept(self, tokens: Tensor, confidence: Tensor) -> None:
        """Fill in what this step decides.

        Args:
            tokens: (batch, B) int64 draws for every place, masked or not.
            confidence: (batch, B) float32, their probabilities.
        """
        window = self.window
        is_masked = self.ids == self.mask_id
        begin = is_masked.int().argmax(-1, keepdim=True) // window * window  # the first sub-block that has any
        step = torch.where(begin == self.window_start, self.window_step, 0)
        quota = self.quotas[step.clamp(max=len(self.quotas) - 1)]
        is_open = is_masked & (self.places >= begin) & (self.places < begin + window)
        sure = confidence.masked_fill(~is_open, float("-inf"))
        accepted = is_open & (rank_of(sure) < quota)
        if self.acceptance.name == "threshold":
            accepted |= is_open & (sure > self.acceptance.threshold)
        self.ids.copy_(torch.where(accepted, tokens, self.ids))
        self.window_start.copy_(begin)
        self.window_step.copy_(step + 1)
        self.taken.add_(is_masked.any(-1))
        self.is_done.copy_((self.ids != self.mask_id).all().view(1))
        self.is_sane.logical_and_(~confidence.isnan().any())

    @property
    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.ids, self.window_start, self.window_step, self.taken, self.is_done, self.is_sane]

    def read_done(self) -> bool:
        """Wait for the steps queued so far; whether the blocks are finished."""
        return bool(self.is_done)

    def check(self) -> None:
        """Complain about NaN.

        Raises:
            ValueError: a logit was NaN or infinite.
        """
        if not bool(self.is_sane):
            raise ValueError("the model's logits are NaN or infinite: check the weights, the adapter and the dtype")


def rank_of(score: Tensor) -> Tensor:
    """(batch, n) -> (batch, n) int64: how many entries of the row are better; equal ones go by position."""
    earlier = torch.ones(score.shape[-1], score.shape[-1], dtype=torch.bool, device=score.device).tril(-1)
    mine, other = score[:, :, None], score[:, None, :]
    return ((other > mine) | ((other == mine) & earlier)).sum(-1)
