"""A training step recorded once as a CUDA graph and replayed.

The chunks of a memory run one after the other, each as hundreds of small kernels, which take longer to launch
than to run. A graph is launched as a whole and makes training of small models several times as fast
(`benchmarks/gpu.py` measures it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.memory.chunkwise.columns import assume_aligned
from titans.state import compact

Inputs = dict[str, Tensor]
# (inputs, states before) → (loss to minimise, loss to report, states after).
LossOf = Callable[[Inputs, Any], tuple[Tensor, Tensor, Any]]


class RecordedStep:
    """Loss and gradient of training steps of one shape, as a callable.

    The constructor records the step with the given inputs; inputs and `states` are copied. Whenever a step
    begins, every row must be at the start of a chunk and of a segment. Each replay draws new random numbers.

    Args:
        model: its parameters' gradients are set by every call.
        loss_of: the step. It must not read any tensor's values on the host. It returns detached states, with
            which the next call begins, or None if it is given None.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf, inputs: Inputs, states: Any) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss_of = loss_of
        self._inputs = {name: x.clone() for name, x in inputs.items()}
        # At the start of a chunk the weights are their own anchor, before and after a step.
        states = compact(states)
        self._states = pytree.tree_map_only(Tensor, _copied, states)
        # At the first call libraries compile, allocate and choose kernels, which a recording does not allow.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self._clear()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory meanwhile: only this thread is recorded.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            *self._results, _ = self._run()
        self._gradients = [p.grad for p in self._parameters]
        _set(self._states, states)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The loss to minimise and the loss to report, both overwritten by the next call; sets gradients."""
        for name, x in self._inputs.items():
            x.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        loss, reported = self._results
        return loss, reported

    @property
    def states(self) -> Any:
        """The states with which the next call begins; that call overwrites them."""
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
    # Rows of an expanded tensor share memory; those of its copy must not.
    return x.detach().clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _set(into: Any, states: Any) -> None:
    for old, new in zip(pytree.tree_leaves(into), pytree.tree_leaves(states), strict=True):
        if isinstance(old, Tensor):
            old.copy_(new)
