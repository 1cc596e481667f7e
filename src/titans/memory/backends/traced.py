"""A scan as one operator of a compiled graph, whichever backend runs it.

torch.compile takes the operator whole; traced, a scan would be the oracle, token by token. Going backward the
operator scans once more, so that between the two passes a graph keeps a scan's arguments and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from titans.memory.backends import choose_backend
from titans.memory.inner import InnerProblem
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState

# A graph holds numbers and words: the inner problem goes as its description.
_REST = "bool[] there, str inner, int chunk_size, bool read_anchor, str backend"


def traced_scan(problem: ScanProblem, backend: str) -> tuple[Tensor, MemoryState, Tensor]:
    """What the backend of that name makes of a problem, as one node of the graph."""
    p, depth = problem, problem.inner.network.depth

    def layers(tensors: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        return [None] * depth if tensors is None else tensors

    flat = [
        p.queries, p.keys, p.values, p.forget, p.momentum, p.step_size,
        *p.state.weights, *p.state.momentum, *p.state.anchor, p.state.position,
        p.gain, p.bias, p.mask, p.reset, *layers(p.initial), *layers(p.initial_momentum), *layers(p.base),
    ]  # fmt: skip
    there = [x is not None for x in flat]
    inner = problem.inner.describe()
    found = torch.ops.titans.scan(
        [x for x in flat if x is not None], there, inner, p.chunk_size, p.read_anchor, backend
    )
    reads, surprise, *state, position = found
    weights, momentum, anchor = (tuple(state[i : i + depth]) for i in range(0, 3 * depth, depth))
    return reads, MemoryState(weights, momentum, anchor, position), surprise


def _run(flat: Sequence[Tensor], rest: Sequence[Any]) -> list[Tensor]:
    """Reads, surprise, weights, momentum, anchor and position."""
    there, description, chunk_size, read_anchor, backend = rest
    inner = InnerProblem.described(description)
    given = iter(flat)
    found: Any = (next(given) if is_there else None for is_there in there)

    def layers() -> tuple[Any, ...]:
        return tuple(next(found) for _ in range(inner.network.depth))

    def optional() -> tuple[Tensor, ...] | None:
        taken = layers()
        return None if taken[0] is None else taken

    tokens = [next(found) for _ in range(6)]
    state = MemoryState(layers(), layers(), layers(), next(found))
    affine_and_flags = [next(found) for _ in range(4)]
    fresh_and_base = [optional() for _ in range(3)]
    arguments: list[Any] = [*tokens, state, chunk_size, *affine_and_flags, *fresh_and_base, read_anchor]
    problem = ScanProblem(inner, *arguments)
    with torch.autocast(problem.keys.device.type, enabled=False):
        reads, after, surprise = choose_backend(backend, problem).scan(problem)
    return [reads, surprise, *after.weights, *after.momentum, *after.anchor, after.position]


def _apart(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """As a graph's nodes have to be: sharing memory neither with what was given nor with each other."""
    taken = {x.untyped_storage().data_ptr() for x in given}
    apart = []
    for x in map(Tensor.contiguous, results):
        apart.append(x.clone() if x.untyped_storage().data_ptr() in taken else x)
        taken.add(apart[-1].untyped_storage().data_ptr())
    return apart


def _fresh_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


@library.custom_op("titans::scan", mutates_args=(), schema=f"(Tensor[] flat, {_REST}) -> Tensor[]")
def _scan(flat: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return _apart(_run(flat, rest), flat)


@_scan.register_fake
def _(flat: Sequence[Tensor], there: Sequence[bool], inner: str, *rest: Any) -> list[Tensor]:
    depth = InnerProblem.described(inner).network.depth
    return _fresh_like([flat[0], flat[0][..., 0], *flat[6 : 7 + 3 * depth]])


@library.custom_op(
    "titans::scan_backward",
    mutates_args=(),
    schema=f"(Tensor[] grads, bool[] wanted, Tensor[] flat, {_REST}) -> Tensor[]",
)
def _scan_backward(
    grads: Sequence[Tensor], wanted: Sequence[bool], flat: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    """The gradients of the tensors that are wanted, for those of everything that `_scan` returns."""
    # Inside an operator autograd is off altogether, which enable_grad does not change.
    on = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with on, torch.enable_grad():
        inputs = [x.detach().requires_grad_(want) for x, want in zip(flat, wanted, strict=True)]
        pairs = [(y, grad) for y, grad in zip(_run(inputs, rest), grads, strict=True) if y.requires_grad]
        outputs, of_outputs = zip(*pairs, strict=True)
        wanting = [x for x in inputs if x.requires_grad]
        found = torch.autograd.grad(outputs, wanting, of_outputs, materialize_grads=True)
    return _apart(found, [*grads, *flat])


@_scan_backward.register_fake
def _(grads: Sequence[Tensor], wanted: Sequence[bool], flat: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return _fresh_like([x for x, want in zip(flat, wanted, strict=True) if want])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    flat, *ctx.rest = inputs
    ctx.save_for_backward(*flat)


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[0])
    found = iter(torch.ops.titans.scan_backward(grads, wanted, ctx.saved_tensors, *ctx.rest))
    return [next(found) if want else None for want in wanted], *(None for _ in ctx.rest)


_scan.register_autograd(_backward, setup_context=_setup)
