"""Models to compare with that need no gradient: counted or computed from the training text.

A baseline is one class with the two methods of `Baseline` and one entry in `BASELINES`; experiments that
compare with baselines then report it. Baselines that are networks are elsewhere: blocks without a memory in
`titans.nn.blocks`, and any causal model of transformers through `titans.stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from titans.baselines.ngram import InterpolatedNgram


class Baseline(Protocol):
    """A model of token ids. Documents are arrays of shape (tokens,)."""

    def fit(self, documents: Sequence[np.ndarray], /) -> Any:
        """Learn from the training documents."""
        ...

    def bits_per_token(self, documents: Sequence[np.ndarray], /) -> float:
        """Mean bits over all tokens but the first of each document, each given those before it."""
        ...


# Name → what makes a baseline for a vocabulary of so many tokens.
BASELINES: dict[str, Callable[[int], Baseline]] = {
    "unigram": partial(InterpolatedNgram, 1),
    "trigram": partial(InterpolatedNgram, 3),
}


def held_out_bits(
    train: Sequence[np.ndarray], held_out: Sequence[np.ndarray], vocab_size: int = 256
) -> dict[str, float]:
    """Name of every baseline → its bits per token of `held_out` after it was fit to `train`."""
    found = {}
    for name, make in BASELINES.items():
        baseline = make(vocab_size)
        baseline.fit(train)
        found[name] = baseline.bits_per_token(held_out)
    return found


__all__ = ["BASELINES", "Baseline", "InterpolatedNgram", "held_out_bits"]
