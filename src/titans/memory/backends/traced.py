"""A scan as one operator of a compiled graph, whichever backend runs it.

torch.compile takes the operator whole; traced, a scan would be the oracle, token by token. Going backward the
operator scans once more, so that between the two passes a graph keeps a scan's arguments and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils import _pytree as pytree

from titans.memory.backends import choose_backend
from titans.memory.inner import InnerProblem
from titans.memory.precision import autocast_device
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState

# A graph holds numbers and words: the inner problem goes as its description.
_REST = "bool[] there, str inner, int chunk_size, bool read_anchor, str backend"


def _sizes(inner: InnerProblem) -> tuple[int, int]:
    """How many layers a state has, and how many tensors of the rule's own."""
    shapes = inner.network.weight_shapes
    return len(shapes), len(inner.rule.extra_shapes(shapes))


def _structure(inner: InnerProblem) -> pytree.TreeSpec:
    """Of the states on both sides of an operator. A graph knows no values, and so not whether weights and
    anchor have become the same: the anchor is always there."""
    depth, extra = _sizes(inner)
    layers = (torch.empty(0),) * depth
    return pytree.tree_structure(
        MemoryState(layers, layers, None, torch.empty(0), (torch.empty(0),) * extra).expanded()
    )


def traced_scan(problem: ScanProblem, backend: str) -> tuple[Tensor, MemoryState, Tensor]:
    """What the backend of that name makes of a problem, as one node of the graph."""
    p = problem
    depth, extra = _sizes(p.inner)
    leaves, structure = pytree.tree_flatten(p.state.expanded())
    flat = [*leaves, p.queries, p.keys, p.values, p.forget, p.momentum, p.step_size]
    flat += [p.norm_weight, p.norm_bias, p.mask, p.reset]
    slow = ((p.initial, depth), (p.initial_momentum, depth), (p.initial_extra, extra), (p.base, depth))
    for tensors, count in slow:
        flat += [None] * count if tensors is None else tensors
    reads, surprise, *after = torch.ops.titans.scan(
        [x for x in flat if x is not None], [x is not None for x in flat], p.inner.describe(),
        p.chunk_size, p.read_anchor, backend,
    )  # fmt: skip
    return reads, pytree.tree_unflatten(after, structure), surprise


def _run(flat: Sequence[Tensor], rest: Sequence[Any]) -> list[Tensor]:
    """Reads, surprise, and the leaves of the state."""
    there, description, chunk_size, read_anchor, backend = rest
    inner = InnerProblem.described(description)
    structure, (depth, extra) = _structure(inner), _sizes(inner)
    given = iter(flat)
    found: Any = (next(given) if is_there else None for is_there in there)

    def several(count: int) -> list[Any]:
        return [next(found) for _ in range(count)]

    def optional(count: int) -> list[Any] | None:
        taken = several(count)
        return None if any(x is None for x in taken) else taken

    state = pytree.tree_unflatten(several(structure.num_leaves), structure)
    tokens, flags = several(6), several(4)
    slow = [optional(count) for count in (depth, depth, extra, depth)]
    arguments: list[Any] = [*tokens, state, chunk_size, *flags, *slow, read_anchor]
    problem = ScanProblem(inner, *arguments)
    with torch.autocast(autocast_device(problem.keys), enabled=False):
        reads, after, surprise = choose_backend(backend, problem).scan(problem)
    return [reads, surprise, *pytree.tree_leaves(after.expanded())]


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
    problem = InnerProblem.described(inner)
    leaves = _structure(problem).num_leaves
    # Without the inputs of the objective.
    values = flat[leaves + 2][..., : problem.network.head_dim]
    return _fresh_like([values, values[..., 0], *flat[:leaves]])


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
