"""What a memory of a graft is: settings, a module with weights, a state, and how it reads a text."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from titans.hf.graft.base import WindowedBase
from titans.nn.adaptation import LinearHead
from titans.nn.packing import Packed

# Sizes that a module gets from the base, and that are no settings.
_SIZES = ("hidden_size", "vocab_size")


@dataclass(frozen=True)
class Call:
    """One forward pass of a graft, as its memories see it.

    ids: (batch, time), packed by `rows`. keep: for how many of the last columns, in the order before packing,
    logits are wanted, 0 for all, or for which. frozen: whether no memory learns. surprise: whether it is
    asked for.
    """

    head: LinearHead
    ids: Tensor
    rows: Packed
    keep: int | Tensor
    frozen: bool
    surprise: bool

    def kept(self, x: Tensor) -> Tensor:
        """Of packed x (batch, time, ...) the columns whose logits are wanted, each where it stood."""
        unpacked = self.rows.unpack(x)
        return unpacked[:, -self.keep :] if isinstance(self.keep, int) else unpacked[:, self.keep]


@dataclass(frozen=True)
class Found:
    """What a memory did in one call.

    state: after it. logits: (batch, kept, vocab_size), instead of the base's; or None. mix: changes such
    logits, whoever has predicted them; or None. surprise: (batch, time, n) where tokens stood before packing;
    or None.
    """

    state: Any
    logits: Tensor | None = None
    mix: Callable[[Tensor], Tensor] | None = None
    surprise: Tensor | None = None


class Inside(ABC):
    """What a memory does between the base's layers in one call, a `layers.Change`.

    layers: the layers after which it changes the states.
    """

    layers: Sequence[int]

    @abstractmethod
    def __call__(self, layer: int, states: Tensor, rows: Sequence[int] | None) -> Tensor:
        """The states of the next tokens of these rows, (rows, time, hidden_size), changed; None: all rows."""


class GraftMemory(ABC):
    """One kind of memory, with its module, in one graft.

    To add one, write a class, and name it in `MEMORIES`.

    module_type: a module with weights of (hidden_size, vocab_size, **settings). layers: those of the base
    whose states `read` gets.
    """

    name: ClassVar[str]
    module_type: ClassVar[Callable[..., nn.Module]]
    layers: tuple[int, ...] = ()

    def __init__(self, module: Any, base: WindowedBase) -> None:
        self.module = module

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """All settings; `inspect.Parameter.empty` for one without a default."""
        known = inspect.signature(cls.module_type).parameters
        return {name: known[name].default for name in known if name not in _SIZES}

    @classmethod
    def measured(cls, base: WindowedBase) -> dict[str, Any]:
        """Settings that depend on the base, unless they are given."""
        return {}

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings of a saved graft, with those that were not known when it was saved as they were then."""
        return settings

    @classmethod
    def make(cls, hidden_size: int, vocab_size: int, settings: Mapping[str, Any]) -> nn.Module:
        """The module; ValueError for a setting outside its domain."""
        return cls.module_type(hidden_size, vocab_size, **settings)

    @classmethod
    @abstractmethod
    def state_fields(cls, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        """What two grafts must share to understand each other's states; None: without this memory."""

    @classmethod
    def limits(cls, vocab_size: int) -> dict[str, tuple[float, float]]:
        """For numbers of a state, by the name of the tensor, the least and the greatest that a text gives."""
        return {}

    @staticmethod
    @abstractmethod
    def fast_weights(state: Any) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Fast weights and their momentum, of each network that the state has."""

    def initial_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> Any:
        """The state of rows that have read nothing; float32 at least."""
        return self.module.initial_state(rows, device, dtype)

    @abstractmethod
    def whiten(self, hidden: Tensor, states: Sequence[Tensor]) -> None:
        """Take mean and covariance of the inputs from a text.

        hidden: (1, n, hidden_size), the head's input. states: the same after each of `layers`.
        """

    def inside(self, call: Call, state: Any) -> Inside | None:
        """What it does while the base reads."""
        return None

    @abstractmethod
    def read(self, call: Call, state: Any, hidden: Tensor, states: Sequence[Tensor], inside: Any) -> Found:
        """Predict and learn, once the base has read.

        Args:
            hidden: (batch, time, hidden_size), the head's input, packed; states: the same, of `layers`.
            inside: what the method of this name gave.
        """
