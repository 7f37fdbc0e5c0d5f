"""The blocks in work, on the device, and how a step fills them: everything a CUDA graph reads and writes.

The rules are those of `decode.sampler` at temperature 0: threshold and static acceptance, sub-blocks, quotas. Which
sub-block is in work, how many tokens its step asks for and which draws are the surest are all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mage_kernels.fill_block import fill_block
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
        "follow": settings.rule.follow > 0,
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

    def __init__(self, settings: Settings, batch: int, device: torch.device, impl: str) -> None:
        assert settings.family.mask_id is not None
        self.settings, self.impl, self.mask_id = settings, impl, settings.family.mask_id
        self.ids = torch.full((batch, settings.family.block_size), self.mask_id, device=device)
        """(batch, B) int64, the mask token where undecided."""
        self.progress = torch.zeros(batch, 3, dtype=torch.int64, device=device)
        """Sub-block in work and its steps so far; steps the block has taken with a mask token in it."""
        self.left = torch.zeros(batch, dtype=torch.int64, device=device)
        """Mask tokens left in each row; -1 once a confidence was NaN."""
        self.quotas = torch.tensor([settings.quota(step) for step in range(settings.window)], device=device)

    @property
    def state(self) -> list[Tensor]:
        """What a step changes."""
        return [self.ids, self.progress, self.left]

    def lay_out(self, ids: Tensor) -> None:
        """Open a block in every row: ids (batch, B) int64, what is decided already and masks."""
        self.ids.copy_(ids)
        self.progress.zero_()
        self.progress[:, 0] = -1

    def accept(self, token: Tensor, confidence: Tensor) -> None:
        """Fill in what this step decides.

        Args:
            token: (batch * B,) int64 draws, as the logits come: with a token shift each one for the place after it.
            confidence: (batch * B,) float32, their probabilities.
        """
        acceptance = self.settings.acceptance
        fill_block(
            self.ids,
            token.view(self.ids.shape),
            confidence.view(self.ids.shape),
            self.progress,
            self.left,
            self.quotas,
            mask_id=self.mask_id,
            window=self.settings.window,
            shift=int(self.settings.family.token_shift),
            threshold=acceptance.threshold if acceptance.name == "threshold" else None,
            impl=self.impl,
        )

    def are_done(self) -> bool:
        """Wait for the steps queued so far; whether no row has a mask token left.

        Raises:
            ValueError: a logit was NaN or infinite.
        """
        left = self.left.tolist()
        if min(left) < 0:
            raise ValueError("the model's logits are NaN or infinite: check the weights, the adapter and the dtype")
        return max(left) == 0
