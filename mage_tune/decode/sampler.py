"""From logits to accepted tokens: what is drawn at each masked position, and which draws stay.

A step draws one token per masked position of the current window (sub-block, or whole block) with a confidence, the
probability of the token drawn, and accepts

    threshold   every draw above the threshold, and at least as many as the schedule asks, the most confident first
                (Fast-dLLM v2; SDAR's low_confidence_dynamic)
    static      exactly as many as the schedule asks, the most confident first (SDAR's low_confidence_static)
    entropy     in order of entropy, while the sum of the entropies less the largest stays within a bound
                (EB-Sampler, arXiv 2505.24857), and at least as many as the schedule asks

The schedule spreads the window over `steps` steps, larger shares first. By default a step asks for one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

AcceptanceName = Literal["threshold", "static", "entropy"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the most probable one, its probability is its confidence, and top-k and
    top-p do not apply; SDAR's official "greedy" is temperature 1 with top_k 1, where every confidence is 1.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (off) or positive")

    def draw(self, logits: Tensor, uniform: Tensor | None, banned: int) -> tuple[Tensor, Tensor]:
        """One token for each position.

        Args:
            logits: (n, vocab) float32.
            uniform: (n,) float64 in [0, 1), one number per position; unused at temperature 0.
            banned: token that is never drawn (its probability still counts in the others' normalisation).

        Returns:
            tokens: (n,) int64.
            confidence: (n,) float32, the probability of the token in the distribution it was drawn from.
        """
        if self.temperature == 0.0:
            probability = logits.softmax(dim=-1)
            allowed = logits.clone()
            allowed[:, banned] = float("-inf")
            tokens = allowed.argmax(dim=-1)
        else:
            assert uniform is not None
            probability = filter_logits(logits / self.temperature, self.top_k, self.top_p).softmax(dim=-1)
            allowed = probability.double()
            allowed[:, banned] = 0.0
            allowed = torch.where(allowed.sum(-1, keepdim=True) > 0, allowed, _all_but(banned, logits))
            cumulative = allowed.cumsum(dim=-1)  # inverse of the distribution function: one number per position
            tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        return tokens, probability.gather(-1, tokens[:, None]).squeeze(-1)


def _all_but(banned: int, logits: Tensor) -> Tensor:
    """What is left to draw from when the filters left nothing but the banned token."""
    probability = logits.double().softmax(-1)
    probability[:, banned] = 0.0
    return probability


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(n, vocab) logits with -inf outside the top k tokens (0: all) and outside the top-p nucleus, in that order."""
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # mass of the more probable tokens
        before[:, 0] = 0.0
        is_outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(is_outside, float("-inf"))
    return logits


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Which draws of a step stay; see the module's docstring.

    Raises:
        ValueError: unknown name, or a number out of range.
    """

    name: AcceptanceName = "threshold"
    threshold: float = 0.9
    entropy_bound: float = 0.1
    """Nats."""

    def __post_init__(self) -> None:
        if self.name not in get_args(AcceptanceName):
            raise ValueError(f"unknown acceptance {self.name!r} (known: {', '.join(get_args(AcceptanceName))})")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold {self.threshold} is not a probability")
        if self.entropy_bound < 0.0:
            raise ValueError(f"entropy_bound {self.entropy_bound} is negative")

    def accept(self, confidence: Tensor, entropy: Tensor | None, quota: int) -> Tensor:
        """(w,) bool: positions of the window that are accepted, at least one.

        Args:
            confidence: (w,) float32, -inf where the window is not masked; at least one is.
            entropy: (w,) float32 in nats, +inf where not masked; only the entropy rule needs it.
            quota: positions the schedule asks for.
        """
        is_masked = confidence > float("-inf")
        quota = min(quota, int(is_masked.sum()))
        accepted = torch.zeros_like(is_masked)
        if self.name == "entropy":
            assert entropy is not None
            ascending, order = entropy.sort(stable=True)
            within = ascending.cumsum(0) - ascending <= self.entropy_bound  # the last one is the largest
            accepted[order[:quota]] = True
            accepted[order[within]] = True
            return accepted & is_masked
        # torch.topk, not a sort: among equal confidences it breaks ties as SDAR's own code does.
        accepted[confidence.topk(quota).indices] = True
        if self.name == "threshold":
            accepted |= confidence > self.threshold
        return accepted


def schedule(window: int, steps: int) -> list[int]:
    """Tokens each of `steps` steps accepts in a window of `window`, larger shares first."""
    share, extra = divmod(window, steps)
    return [share + (step < extra) for step in range(steps)]


def entropy_of(logits: Tensor) -> Tensor:
    """(n, vocab) float32 logits -> (n,) entropy in nats."""
    log_probability = logits.log_softmax(dim=-1)
    return -(log_probability.exp() * log_probability).nan_to_num(0.0).sum(dim=-1)


def first_stop(tokens: Sequence[int], stop_ids: frozenset[int]) -> int | None:
    """Index of the first stop token, or None."""
    return next((i for i, token in enumerate(tokens) if token in stop_ids), None)


def cut_at_string(tokens: Sequence[int], strings: Sequence[str], decode: Callable[[list[int]], str]) -> int | None:
    """Length of the shortest prefix of `tokens` whose text holds one of `strings`, or None."""
    text = decode(list(tokens))
    if not any(s in text for s in strings):
        return None
    low, high = 0, len(tokens)  # the text of a longer prefix holds it too
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if any(s in decode(list(tokens[:middle])) for s in strings) else (middle, high)
    return high
