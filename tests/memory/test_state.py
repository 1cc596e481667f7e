"""The state as a value: made, moved, counted and cut like any pytree of tensors with batch in front."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from titans.memory import MemoryState
from titans.state import map_state, where_rows

from .problems import make_problem, parts


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_new_memory(given, kept):
    weights = tuple(w.to(given) for w in make_problem().state.weights)
    state = MemoryState.initial(weights)
    assert {x.dtype for x in parts(state).values()} == {kept}
    assert state.position.tolist() == [0, 0] and state.position.dtype == torch.int64
    assert state.is_shared and state.anchor is state.weights
    for weight, momentum, w in zip(state.weights, state.momentum, weights, strict=True):
        assert torch.equal(weight, w.to(kept)) and not momentum.any()
    assert state.nbytes() == 2 * sum(w.nbytes for w in state.weights) + 2 * 8


def test_rows_are_picked_swapped_and_chosen():
    state = make_problem(batch=3, position="apart").state
    swapped = map_state(lambda x: x[[2, 0, 1]], state)
    assert torch.equal(swapped.position, state.position[[2, 0, 1]])
    chosen = where_rows(torch.tensor([True, False, True]), swapped, state)
    for name, leaf in parts(chosen).items():
        assert torch.equal(
            leaf, torch.stack([parts(x)[name][i] for i, x in enumerate((swapped, state, swapped))])
        )
    assert len(pytree.tree_leaves(state)) == 7


def test_detached():
    problem = make_problem().require_grad()
    state = problem.scan("auto")[1]
    assert all(x.requires_grad for x in parts(state).values())
    for name, leaf in parts(state.detach()).items():
        assert not leaf.requires_grad and torch.equal(leaf, parts(state)[name])
