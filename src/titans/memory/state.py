"""The memory's state as a value: what one sequence has learned so far. It goes in as an argument and comes
out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.state import map_state, state_nbytes

Weights = tuple[Tensor, ...]


@dataclass(frozen=True, init=False, eq=False)
class MemoryState:
    """Everything a memory carries from one call to the next.

    An anchor that is the weights, as whenever position % chunk_size == 0, is not stored: one set of tensors
    is carried then, and one gradient. `expanded` and `compact` go from one form to the other.

    Args:
        weights: W_1 … W_L of every sequence and head, each (batch, heads, out, in).
        momentum: S_1 … S_L, past surprise, the same shapes (equation 14).
        anchor: the weights at the start of the running chunk, at which every gradient of the chunk is taken;
            None, or the very tuple given as `weights`, where these are the same. Read, it is always weights.
        position: (batch,) int64, real tokens written so far. Inside a backend, where sequences and heads are
            one dimension of rows, there is none.
        extra: what else the update rule carries, (batch, heads, …) each; see `UpdateRule.extra_shapes`.
    """

    _anchor: ClassVar[Weights | None]
    weights: Weights
    momentum: Weights
    anchor: Weights
    position: Tensor
    extra: Weights

    def __init__(
        self,
        weights: Weights,
        momentum: Weights,
        anchor: Weights | None = None,
        position: Tensor | None = None,
        extra: Weights = (),
    ) -> None:
        # A compiled graph does not know whether two tuples are one, and has every anchor written out anyway.
        if not torch.compiler.is_compiling() and anchor is weights:
            anchor = None
        given = (weights, momentum, anchor, position, extra)
        for name, value in zip(("weights", "momentum", "_anchor", "position", "extra"), given, strict=True):
            object.__setattr__(self, name, value)

    def __setstate__(self, fields: dict[str, Any]) -> None:
        # States pickled before an anchor could be absent hold it under its own name.
        self.__init__(**{name.removeprefix("_"): value for name, value in fields.items()})  # type: ignore[misc]

    @classmethod
    def initial(cls, weights: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> MemoryState:
        """A memory that has read nothing: the given weights, each (batch, heads, out, in), and no momentum.

        Fast weights are kept in at least float32, whatever the dtype of the model. For a rule with tensors of
        its own, `InnerProblem.initial_state` knows `extra`.
        """
        raised = tuple(w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights)
        position = torch.zeros(raised[0].shape[0], dtype=torch.int64, device=raised[0].device)
        return cls(raised, tuple(torch.zeros_like(w) for w in raised), None, position, tuple(extra))

    @property
    def is_shared(self) -> bool:
        """Whether the anchor is the weights, and not stored."""
        return self._anchor is None

    def map(self, function: Callable[[Tensor], Tensor], position: Tensor | None = None) -> MemoryState:
        """The same state with another position, and a function applied to every other tensor."""
        parts = (self.weights, self.momentum, self._anchor, self.extra)
        weights, momentum, anchor, extra = (None if x is None else tuple(map(function, x)) for x in parts)
        return MemoryState(weights, momentum, anchor, position, extra)  # type: ignore[arg-type]

    def expanded(self) -> MemoryState:
        """The same state with an anchor that is stored, the same tensors where it was shared."""
        if not self.is_shared:
            return self
        state = replace(self)
        object.__setattr__(state, "_anchor", self.weights)
        return state

    def compact(self) -> MemoryState:
        """The same state without an anchor of its own where that is equal to the weights; reads values."""
        if self._anchor is None or not all(map(torch.equal, self._anchor, self.weights)):
            return self
        return replace(self, anchor=self.weights)

    def detach(self) -> MemoryState:
        """The same values, cut off from the autograd graph."""
        return map_state(Tensor.detach, self)

    def nbytes(self) -> int:
        """Bytes held."""
        return state_nbytes(self)


def _anchor_or_weights(state: MemoryState) -> Weights:
    return state.weights if state._anchor is None else state._anchor


# A field for `dataclasses.replace`, and read through `_anchor`, where None stands for the weights.
MemoryState.anchor = property(_anchor_or_weights)  # type: ignore[assignment]


def _flatten(state: MemoryState) -> tuple[list[Any], tuple[str, ...]]:
    """What is there, and its names: the one order in which a state's tensors enter a backend, a graph or a
    file, and leave it."""
    parts = dict(weights=state.weights, momentum=state.momentum, anchor=state._anchor)
    parts |= dict(position=state.position, extra=state.extra or None)
    there = {name: part for name, part in parts.items() if part is not None}
    return list(there.values()), tuple(there)


def _flatten_with_keys(state: MemoryState) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    parts, names = _flatten(state)
    return [(pytree.GetAttrKey(name), part) for name, part in zip(names, parts, strict=True)], names


def _unflatten(parts: Iterable[Any], names: tuple[str, ...]) -> MemoryState:
    return MemoryState(**dict(zip(names, parts, strict=True)))


pytree.register_pytree_node(
    MemoryState, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="titans.memory.MemoryState",
)  # fmt: skip
