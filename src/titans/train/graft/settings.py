"""Everything that decides the training of a graft's association, as one value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GraftTraining:
    """How a graft's memory is trained on cached features."""

    steps: int = 1500
    """Optimizer steps."""
    tokens_per_step: int = 4096
    """About so many tokens are learned from in a step."""
    distance: int = 4096
    """Most tokens of text between facts and questions; at first a tenth, growing over half of the steps."""
    projection_rate: float = 1e-3
    """Peak learning rate of projections."""
    gate_rate: float = 3e-3
    """Peak learning rate of gates."""
    scale_rate: float = 5e-2
    """Peak learning rate of the memory's scale."""
    answer_weight: float = 10.0
    """How much a token of an answer counts in the loss; other tokens count 1."""
    write_price: float = 0.02
    """What a write gate of 1 costs, in nats a token, once half of the held-out answers are recalled."""
    evaluate_every: int = 100
    """Steps from one evaluation on held-out facts and text to the next."""
    patience: int = 8
    """Training ends after so many evaluations without a better one."""
    save_every: int = 50
    """Steps from one checkpoint to the next."""
    minutes: float | None = None
    """Stop after so many minutes, at a checkpoint; the same command continues."""
    seed: int = 0
    """Seed of the order and the composition of the examples."""

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            ValueError: naming the first setting, its value and what it may be.
        """
        whole = ("steps", "tokens_per_step", "evaluate_every", "patience", "save_every")
        for name, value in dataclasses.asdict(self).items():
            if value is None and name == "minutes":
                continue
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r}: give a number")
            if name in (*whole, "distance", "seed") and type(value) is not int:
                raise ValueError(f"{name}={value!r}: give a whole number")
            if name in whole and value < 1:
                raise ValueError(f"{name}={value!r}: give at least 1")
            if value < 0 or (value == 0 and name in ("answer_weight", "minutes")):
                raise ValueError(f"{name}={value!r}: give a positive number")
