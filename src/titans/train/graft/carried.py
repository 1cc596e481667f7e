"""States as named tensors of a checkpoint."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf.state_cache import named_leaves
from titans.state import compact, expanded

State = TypeVar("State")


def to_tensors(state: object) -> dict[str, Tensor]:
    """Every tensor of a state by its name; none twice in memory, as a file needs it."""
    return {name: leaf.clone() for name, leaf in named_leaves(state)}


def from_tensors(tensors: dict[str, Tensor], like: State) -> State:
    """The state that `to_tensors` was given, on the device of one of the same kind."""
    template = expanded(like)
    found = [tensors[name].to(leaf.device) for name, leaf in named_leaves(template)]
    return compact(pytree.tree_unflatten(found, pytree.tree_structure(template)))
