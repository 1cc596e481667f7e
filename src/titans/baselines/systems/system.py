"""What a system is, and how one of a wished number of parameters is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from titans.stream.reader import Reader, reader_of

# The largest allowed distance of a system's parameters from the number asked for, relative to it.
CLOSE = 0.02
# Tokens that attention sees in systems whose attention sees a window.
WINDOW = 64
HEAD_DIM = 32


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    width: of its residual stream, a multiple of the system's `step`. layers: half of a layer of a transformer
    is a layer of a system without MLP. inner: width of the MLP, or whatever `System.inner` describes. window:
    tokens that windowed attention sees.
    """

    vocab_size: int
    width: int
    layers: int
    inner: int
    window: int = WINDOW

    @property
    def heads(self) -> int:
        """Heads of 32 numbers."""
        return self.width // HEAD_DIM

    def as_a_transformer(self) -> dict[str, Any]:
        """Fields of a configuration of transformers whose layers have heads and an MLP."""
        return dict(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )


@dataclass(frozen=True)
class System:
    """A kind of sequence model, as configurations of different sizes.

    title: its name. source: where it is described, and whose code it is. config: the configuration of given
    sizes. step: widths are multiples of it. inner: a width's usual `Sizes.inner`, which is then changed in
    multiples of `inner_step` until the parameters agree. prepare: called with every model after it is built
    or loaded. reader: makes the reader of a model.
    """

    title: str
    source: str
    config: Callable[[Sizes], PreTrainedConfig]
    step: int = HEAD_DIM
    inner: Callable[[int], int] = lambda width: round(8 / 3 * width)
    inner_step: int = 4
    prepare: Callable[[PreTrainedModel], None] = lambda model: None
    reader: Callable[[Any], Reader] = reader_of

    def build(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model with random weights."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        self.prepare(model)
        return model

    def sized(
        self,
        parameters: int,
        vocab_size: int = 256,
        window: int = WINDOW,
        changes: Mapping[str, Any] | None = None,
    ) -> PreTrainedConfig:
        """The configuration with this number of parameters, to 2 %.

        Its depth depends on the number alone. Its width is the one whose `inner` is least unusual.

        Args:
            changes: further fields of the configuration that differ; they are counted, too.

        Raises:
            ValueError: for a field that the configuration does not have, and if no width comes close.
        """
        layers = depth_of(parameters)

        def config(width: int, inner: int) -> PreTrainedConfig:
            return changed(self.config(Sizes(vocab_size, width, layers, inner, window)), changes or {})

        def count(width: int, inner: int) -> int:
            return count_parameters(config(width, inner))

        low, high = 1, 2
        while count(high * self.step, self.inner(high * self.step)) <= parameters:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            few = count(middle * self.step, self.inner(middle * self.step)) <= parameters
            low, high = (middle, high) if few else (low, middle)
        found: list[tuple[float, int, int]] = []
        nearest = math.inf
        for width in (low * self.step, high * self.step):
            usual, some = self.inner(width), 4 * self.inner_step
            before = count(width, usual)
            each = (count(width, usual + some) - before) / some
            steps = round((parameters - before) / each / self.inner_step) if each else 0
            inner = max(usual + steps * self.inner_step, self.inner_step)
            off = abs(count(width, inner) / parameters - 1)
            nearest = min(nearest, off)
            if off <= CLOSE:
                found.append((abs(math.log(inner / usual)), width, inner))
        if not found:
            raise ValueError(
                f"parameters={parameters:,}: the nearest {self.title} is {nearest:.0%} away; give another "
                "number, which the embedding of the vocabulary must not fill"
            )
        _, width, inner = min(found)
        return config(width, inner)


def depth_of(parameters: int) -> int:
    """Layers of a model of so many parameters: 4 of a million, 6 of four, and at least 2."""
    return max(2, 4 + round(math.log2(max(parameters, 1) / 1e6)))


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model, which is not built for it."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration with fields replaced.

    Raises:
        ValueError: for a field that it does not have.
    """
    if not changes:
        return config
    fields = config.to_dict()
    if unknown := [name for name in changes if name not in fields]:
        raise ValueError(
            f"config sets {unknown[0]!r}: choose from the fields of {type(config).__name__}, such as "
            f"{', '.join(sorted(name for name in fields if not name.startswith('_'))[:8])}"
        )
    return type(config).from_dict(fields, **changes)


def parse_parameters(text: str) -> int:
    """A number of parameters such as 1M, 350k or 4000000.

    Raises:
        ValueError: for anything else.
    """
    number, factor = text.strip().lower(), 1
    for suffix, power in (("k", 1e3), ("m", 1e6), ("b", 1e9)):
        if number.endswith(suffix):
            number, factor = number[:-1], int(power)
    try:
        found = round(float(number) * factor)
    except (ValueError, OverflowError):
        found = 0
    if not 1_000 <= found <= 10**11:
        raise ValueError(f"parameters={text!r}: give a number from 1k on, such as 1M or 350k")
    return found
