"""Everything that decides the trainings of a graft, one value for each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

SETTINGS_FILE = "graft-training.json"


@dataclass(frozen=True)
class LoopSettings:
    """How long a training takes, and when it looks at what was held out."""

    steps: int = 200
    """Optimizer steps."""
    evaluate_every: int = 20
    """Steps from one evaluation on what was held out to the next."""
    patience: int = 5
    """Training ends after so many evaluations without a better one."""
    save_every: int = 20
    """Steps from one checkpoint to the next."""
    minutes: float | None = None
    """Stop after so many minutes, at a checkpoint; the same command continues."""
    seed: int = 0
    """Seed of the order and the composition of the examples."""

    may_be_zero: ClassVar[tuple[str, ...]] = ("seed",)

    def check(self) -> None:
        """Refuse what cannot be trained with.

        Raises:
            ValueError: naming the first setting, its value and what it may be.
        """
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            zero = name in self.may_be_zero
            if type(field.default) is int:
                if type(value) is not int or value < (0 if zero else 1):
                    raise ValueError(f"{name}={value!r}: give a whole number of at least {0 if zero else 1}")
            elif type(value) not in (int, float) or not 0 <= value < math.inf or not (value or zero):
                wanted = "finite number of at least 0" if zero else "finite number above 0"
                raise ValueError(f"{name}={value!r}: give a {wanted}")


@dataclass(frozen=True)
class GraftTraining(LoopSettings):
    """How a graft's association is trained on cached features."""

    steps: int = 400
    """Optimizer steps."""
    tokens_per_step: int = 5120
    """About so many tokens are learned from in a step."""
    distance: int = 6144
    """Most tokens of other text that a memory has read before facts are stated."""
    projection_rate: float = 2.5e-3
    """Peak learning rate of the keys' projection."""
    gate_rate: float = 3e-3
    """Peak learning rate of gates."""
    number_rate: float = 5e-3
    """Peak learning rate of the weights of words in a key, and of their salience."""
    sharpness_rate: float = 5e-2
    """Peak learning rate of the sharpness of what is recalled."""
    answer_weight: float = 5.0
    """How much a token of an answer counts in the loss; other tokens count 1."""
    write_price: float = 0.1
    """Price of writing what is no stated value, of softplus(logit of the write gate + 4), in nats a token."""
    evaluate_every: int = 25
    """Steps from one evaluation on held-out facts and text to the next."""
    patience: int = 8
    """Training ends after so many evaluations without a better one."""
    save_every: int = 25
    """Steps from one checkpoint to the next."""

    may_be_zero: ClassVar[tuple[str, ...]] = (
        "seed", "distance", "projection_rate", "gate_rate", "number_rate", "sharpness_rate", "write_price",
    )  # fmt: skip


@dataclass(frozen=True)
class FeatureSettings:
    """What is cached before a graft is trained."""

    episodes: int = 2400
    """Blocks that state facts, each with one that asks for them; rounded up to a multiple of 16."""
    block_tokens: int = 128
    """Tokens of such a block."""
    facts: int = 4
    """Most facts in a block."""
    held_out_episodes: int = 64
    """Such blocks for evaluation with the wordings of training, and as many with others."""
    text_tokens: int = 500_000
    """Most tokens of documents."""
    document_tokens: int = 8192
    """Longer documents are cut into parts of so many tokens."""

    def check(self) -> None:
        """Refuse what cannot be cached.

        Raises:
            ValueError: naming the first setting, its value and what it may be.
        """
        least = {"block_tokens": 64, "document_tokens": 2 * self.block_tokens}
        for name, value in vars(self).items():
            if type(value) is not int or value < least.get(name, 1):
                raise ValueError(f"{name}={value!r}: give a whole number of at least {least.get(name, 1)}")


@dataclass(frozen=True)
class TextSettings(LoopSettings):
    """How a training reads text, and the text that is held out."""

    rows: int = 2
    """Texts that are read side by side."""
    tokens: int = 512
    """Tokens of each text in a step; gradients go back so far, memories are carried on."""
    held_out_tokens: int = 4096
    """Tokens of each held-out document that are read in an evaluation."""


@dataclass(frozen=True)
class AdaptationTraining(TextSettings):
    """How a graft's adaptation is trained on cached features."""

    number_rate: float = 0.03
    """Peak learning rate of the logits and logarithms of step, ratio, momentum and half-life."""
    weight_rate: float = 2e-5
    """Peak learning rate of the starting matrix."""
    bias_rate: float = 2e-3
    """Peak learning rate of the starting bias."""


@dataclass(frozen=True)
class ThroughTraining(TextSettings):
    """How a graft is trained through its base."""

    steps: int = 1000
    """Optimizer steps."""
    rows: int = 8
    """Texts that are read side by side."""
    branch_rate: float = 1e-3
    """Peak learning rate of residual branches."""
    lora_rate: float = 2e-4
    """Peak learning rate of low-rank changes of the base."""
    weight_decay: float = 0.01
    """Of the projections of branches."""
