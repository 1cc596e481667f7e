"""State as an immutable pytree: frozen dataclasses of tensors whose dimension 0 is the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

State = TypeVar("State")


def register_state(cls: type[State]) -> type[State]:
    """Register a frozen dataclass of tensors and states as a pytree, so that it can be mapped, moved and
    saved."""
    pytree.register_dataclass(cls)
    return cls


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply a function to every tensor of any state; batch is dimension 0 of every one of them.

    A tensor that stands in two places, as weights that are their own anchor, does so in the result too.
    """
    done: dict[int, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = function(x)
        return done[id(x)]

    return pytree.tree_map_only(Tensor, once, state)


def state_nbytes(state: object) -> int:
    """Bytes held by every tensor of any state, counting a tensor that stands in two places once."""
    tensors = {id(t): t.nbytes for t in pytree.tree_leaves(state) if isinstance(t, Tensor)}
    return sum(tensors.values())


def where_rows(rows: Tensor, chosen: State, otherwise: State) -> State:
    """For each batch row, `chosen` where `rows` (batch,) is true, else `otherwise`.

    A leaf of `chosen` that is shorter in dimension 1, as the keys of a row that has read less, is filled up
    with
    zeros: what a row has not reached is never looked at.
    """

    # What stands in two places in both does so in the result.
    picked: dict[tuple[int, int], Tensor] = {}

    def pick(a: Tensor, b: Tensor) -> Tensor:
        if (id(a), id(b)) not in picked:
            picked[id(a), id(b)] = choose(a, b)
        return picked[id(a), id(b)]

    def choose(a: Tensor, b: Tensor) -> Tensor:
        if a.shape != b.shape:
            a = torch.cat([a, a.new_zeros(a.shape[0], b.shape[1] - a.shape[1], *a.shape[2:])], 1)
        return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)

    return pytree.tree_map(pick, chosen, otherwise)
