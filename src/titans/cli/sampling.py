"""How new tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titans.cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options of a command that writes text."""

    max_new_tokens: int = 200
    """How many tokens to write."""
    temperature: float = 1.0
    """Below 1 safer, above 1 wilder."""
    top_k: int | None = None
    """Choose among the so many likeliest tokens; by default among all."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Seed of the choices; the same one gives the same text."""
    greedy: bool = False
    """Always take the likeliest token."""

    def check_sampling(self) -> None:
        """UsageError for an option out of range."""
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens}: give a whole number of at least 1")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature}: give a number above 0, or use --greedy")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k}: give a whole number of at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: give a number above 0 and at most 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"seed={self.seed}: give a whole number from 0 to 2^63 − 1")

    def seed_choices(self) -> None:
        """Begin the random choices anew, where a seed is given."""
        if self.seed is not None:
            import torch

            torch.manual_seed(self.seed)

    def sampling(self) -> dict[str, Any]:
        """The keywords for `generate` of transformers."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": not self.greedy}
        if not self.greedy:
            chosen |= {
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else self.top_p,
            }
        return chosen
