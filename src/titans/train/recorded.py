"""A training step recorded once as a CUDA graph and replayed.

Chunks of a memory come one after the other, and each is hundreds of small kernels: on a GPU launching them
takes longer than running them. A graph is launched whole, so a small model learns several times as fast;
`benchmarks/gpu.py` says how much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.memory.chunkwise.columns import assume_aligned

Inputs = dict[str, Tensor]
# Inputs and the states before them to the loss, what is reported of it, and the states after.
LossOf = Callable[[Inputs, Any], tuple[Tensor, Tensor, Any]]


class RecordedStep:
    """Loss and gradient of steps of one shape, as a call.

    Recorded at once, from the inputs given; these and `states` are copied. Rows must stand at the start of a
    chunk and of a segment whenever a step begins. Random numbers, if any, are drawn anew in every replay.

    Args:
        model: its parameters' gradients are set by every call.
        loss_of: the step, without a look at any value on the host. States it returns are detached, and where
            the next call begins; None in, None out.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, inputs: Inputs, states: Any) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss_of = loss_of
        self._inputs = {name: x.clone() for name, x in inputs.items()}
        self._states = pytree.tree_map_only(Tensor, _copied, states)
        # Libraries compile, allocate and choose at the first call, which a recording does not allow. What the
        # states share is known only after a step, and what is compiled depends on it.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._states = _sharing(states, self._run()[-1])
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._clear()
        self._graph = torch.cuda.CUDAGraph()
        # Others may pin memory meanwhile: only what this thread does is recorded.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            *self._results, _ = self._run()
        self._gradients = [p.grad for p in self._parameters]
        _set(self._states, states)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The loss and what is reported of it, which the next call overwrites, and gradients in place of
        others."""
        for name, x in self._inputs.items():
            x.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        loss, reported = self._results
        return loss, reported

    @property
    def states(self) -> Any:
        """Where the next call begins; overwritten by it."""
        return self._states

    def _run(self) -> tuple[Tensor, Tensor, Any]:
        self._clear()
        with assume_aligned():
            loss, reported, states = self._loss_of(self._inputs, self._states)
            loss.backward()
        _set(self._states, states)
        return loss.detach(), reported, states

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _copied(x: Tensor) -> Tensor:
    # Expanded tensors share memory between rows: copies do not.
    return x.detach().clone(memory_format=torch.contiguous_format)


def _sharing(states: Any, after: Any) -> Any:
    """A copy of the states in which one tensor stands in two places, as weights that are their own anchor,
    where one does before a step and after it."""
    leaves, structure = pytree.tree_flatten(states)
    copies: dict[tuple[int, int], Any] = {}
    for x, y in zip(leaves, pytree.tree_leaves(after), strict=True):
        if (id(x), id(y)) not in copies:
            copies[id(x), id(y)] = _copied(x) if isinstance(x, Tensor) else x
    shared = [copies[id(x), id(y)] for x, y in zip(leaves, pytree.tree_leaves(after), strict=True)]
    return pytree.tree_unflatten(shared, structure)


@torch.no_grad()
def _set(into: Any, states: Any) -> None:
    for old, new in zip(pytree.tree_leaves(into), pytree.tree_leaves(states), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
