"""State as an immutable pytree: frozen dataclasses of tensors whose dimension 0 is the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

State = TypeVar("State")


class GrowingState(Protocol):
    """A state that grows with what has been read: slots in dimension 1, empty ones where a row has read less.

    growing: names of the fields whose tensors have slots.
    """

    growing: ClassVar[tuple[str, ...]]

    def trimmed(self: State) -> State:
        """The same without the slots at the end that are empty in every row."""
        ...

    def is_whole(self) -> bool:
        """Whether the slots are those that such a state has; False for one that no reading leads to."""
        ...


def grows(state: object) -> bool:
    """Whether a part of a state is a `GrowingState`."""
    return hasattr(state, "growing")


def register_state(cls: type[State]) -> type[State]:
    """Register a frozen dataclass of tensors and states as a pytree, so that it can be mapped, moved and
    saved."""
    pytree.register_dataclass(cls)
    return cls


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of any state; batch is dimension 0 of every one of them."""
    return pytree.tree_map_only(Tensor, function, state)


def state_nbytes(state: object) -> int:
    """Bytes held by every tensor of any state; memory that two tensors share counts once."""
    tensors = (leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor))
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def expanded(states: State) -> State:
    """States in which everything is written out that a class leaves out where it equals another part: such a
    class has a method `expanded`, as `MemoryState` has."""
    return pytree.tree_map(
        lambda part: part.expanded() if hasattr(part, "expanded") else part,
        states,
        is_leaf=lambda part: hasattr(part, "expanded"),
    )


def compact(states: State) -> State:
    """The inverse of `expanded`: what equals another part is left out. Reads values."""
    return pytree.tree_map(
        lambda part: part.compact() if hasattr(part, "compact") else part,
        states,
        is_leaf=lambda part: hasattr(part, "compact"),
    )


def flatten_alike(states: Sequence[State]) -> tuple[list[list[Tensor]], pytree.TreeSpec]:
    """The leaves of several states and their common structure: `expanded` where the structures differ."""
    leaves, structures = zip(*map(pytree.tree_flatten, states), strict=True)
    if any(structure != structures[0] for structure in structures[1:]):
        leaves, structures = zip(*(pytree.tree_flatten(expanded(state)) for state in states), strict=True)
    return list(leaves), structures[0]


def where_rows(rows: Tensor, chosen: State, otherwise: State) -> State:
    """For each batch row, `chosen` where `rows` (batch,) is true, else `otherwise`.

    A leaf of `chosen` that is shorter in dimension 1, as the keys of a row that has read less, is filled up
    with zeros: what a row has not reached is never looked at.
    """

    def pick(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            a = torch.cat([a, a.new_zeros(a.shape[0], b.shape[1] - a.shape[1], *a.shape[2:])], 1)
        return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    (mine, theirs), structure = flatten_alike((chosen, otherwise))
    return pytree.tree_unflatten([pick(a, b) for a, b in zip(mine, theirs, strict=True)], structure)


def stacked(states: Sequence[Any]) -> Any:
    """Rows of several states; whoever holds fewer slots than another has empty ones after them."""
    leaves, structure = flatten_alike(states)

    def together(parts: tuple[Tensor, ...]) -> Tensor:
        if not isinstance(parts[0], Tensor):
            return parts[0]
        if parts[0].dim() < 2:
            return torch.cat(parts)
        most = max(part.shape[1] for part in parts)
        padding = [(0, 0) * (part.dim() - 2) + (0, most - part.shape[1]) for part in parts]
        return torch.cat([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)])

    return pytree.tree_unflatten([together(parts) for parts in zip(*leaves, strict=True)], structure)


def with_rows(state: State, rows: Tensor, new: State) -> State:
    """The state with `new` in these rows (n,) int64."""
    (old, leaves), structure = flatten_alike((state, new))
    return pytree.tree_unflatten(
        [x.index_copy(0, rows, y) for x, y in zip(old, leaves, strict=True)], structure
    )
