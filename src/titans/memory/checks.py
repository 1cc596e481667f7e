"""Refusing wrong arguments of the public calls, each with one line that names it, its value and the
remedy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from titans.memory.inner import InnerProblem
from titans.memory.network import MemoryNetwork
from titans.memory.objectives import num_inputs
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState


def _expect_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give {tuple(shape)}, {meaning}")


def _expect_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: give a floating dtype, for example torch.float32")


def inside_transform() -> bool:
    """Whether vmap, grad or another transform of torch.func looks at this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone: on the meta device, or inside FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def hand_written_refuses() -> str | None:
    """Why a scan with an explicit backward cannot run here, or None."""
    if inside_transform():
        return "its backward is explicit code, and torch.func cannot pass through it; call it outside"
    return None


def _expect_range(
    name: str, gate: Tensor, mask: Tensor | None, highest: float | None, lowest: float = 0.0
) -> None:
    # On an accelerator, or in a compiled graph, looking at values would stop the stream; vmap forbids it.
    if gate.device.type != "cpu" or torch.compiler.is_compiling() or not gate.numel() or inside_transform():
        return
    if has_no_values(gate):
        return
    gate = gate.detach()
    if mask is not None:
        gate = torch.where(mask[..., None, None], gate, 0)
    low, high = (x.item() for x in gate.aminmax())
    domain = f"at least {lowest:g}" if highest is None else f"between {lowest:g} and {highest:g}"
    if low != low:
        raise ValueError(
            f"{name} holds NaN: give finite values {domain}; if a layer computed it, look for NaN in its "
            "input and its parameters"
        )
    if not (low >= lowest and high < float("inf") and (highest is None or high <= highest)):
        raise ValueError(f"{name} spans [{low:g}, {high:g}]: give finite values {domain}")


def check_read(
    net: MemoryNetwork,
    queries: Tensor,
    state: MemoryState,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    base: Sequence[Tensor] | None,
) -> None:
    """Checks shared by reading and scanning: queries against the network, the state against both."""
    if queries.dim() != 4 or queries.shape[-1] != net.input_dim:
        name = "head_dim" if net.key_dim is None else "key_dim"
        raise ValueError(
            f"queries has shape {tuple(queries.shape)}: give (batch, time, heads, {name}={net.input_dim})"
        )
    _expect_floating("queries", queries)
    batch, _, heads, _ = queries.shape
    for part in ("weights", "momentum", "anchor"):
        _check_weights(f"state.{part}", getattr(state, part), net, (batch, heads), "(batch, heads, out, in)")
    if state.position is None:
        raise ValueError("state.position=None: give (batch,) numbers of tokens read, 0 at first")
    _expect_shape("state.position", state.position, (batch,), "one position for each row")
    if state.position.dtype != torch.int64:
        raise ValueError(f"state.position has dtype {state.position.dtype}: give torch.int64")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None:
            if not net.norm:
                raise ValueError(f"{name} is given but the network has norm=False: leave it out")
            _expect_shape(name, tensor, (heads, net.head_dim), "(heads, head_dim)")
            _expect_floating(name, tensor)
    if base is not None:
        _check_weights("base", base, net, (heads,), "(heads, out, in)")


def _check_weights(
    name: str, weights: Sequence[Tensor], net: MemoryNetwork, leading: tuple[int, ...], meaning: str
) -> None:
    if len(weights) != net.depth:
        raise ValueError(f"{name} has {len(weights)} tensors: give one for each of the {net.depth} layers")
    for layer, (weight, shape) in enumerate(zip(weights, net.weight_shapes, strict=True)):
        _expect_shape(f"{name}[{layer}]", weight, (*leading, *shape), meaning)
        _expect_floating(f"{name}[{layer}]", weight)


def targets(inner: InnerProblem, values: Tensor, inputs: Tensor | None, mask: Tensor | None) -> Tensor:
    """What the objective compares answers with: the values, and after them its inputs, if it takes any.

    Raises:
        ValueError: for inputs that are missing, or that the objective does not take.
    """
    count, name = num_inputs(inner.objective), type(inner.objective).__name__
    if inputs is None:
        if count:
            raise ValueError(
                f"objective_inputs=None: {name} takes {count} for each token, give (batch, time, heads, "
                f"{count})"
            )
        return values
    if not count:
        raise ValueError(f"objective_inputs is given, and {name} takes none: leave it out")
    _expect_shape("values", values, (*values.shape[:-1], inner.network.head_dim), "(…, head_dim)")
    _expect_shape("objective_inputs", inputs, (*values.shape[:-1], count), "(batch, time, heads, num_inputs)")
    _expect_floating("objective_inputs", inputs)
    lowest, highest = inner.objective.input_range  # type: ignore[attr-defined]
    _expect_range("objective_inputs", inputs, mask, None if highest == float("inf") else highest, lowest)
    return torch.cat([values, inputs], -1)


def check_scan(problem: ScanProblem) -> None:
    """Raise ValueError for the first argument of `memory_scan` that is wrong."""
    p, queries, net = problem, problem.queries, problem.inner.network
    check_read(net, queries, p.state, p.norm_weight, p.norm_bias, p.base)
    batch, time, heads, _ = queries.shape
    _expect_shape("keys", p.keys, queries.shape, "the shape of queries")
    width = net.head_dim + num_inputs(p.inner.objective)
    _expect_shape("values", p.values, (batch, time, heads, width), "(batch, time, heads, head_dim)")
    for name, tensor in (("keys", p.keys), ("values", p.values)):
        _expect_floating(name, tensor)
    if type(p.chunk_size) is not int or p.chunk_size < 1:
        raise ValueError(f"chunk_size={p.chunk_size!r}: give a whole number of at least 1")
    for name, flags in (("mask", p.mask), ("reset", p.reset)):
        if flags is not None:
            _expect_shape(name, flags, (batch, time), "(batch, time)")
            if flags.dtype != torch.bool:
                raise ValueError(f"{name} has dtype {flags.dtype}: give torch.bool")
    for name, gate, highest in (
        ("forget", p.forget, 1.0),
        ("momentum", p.momentum, 1.0),
        ("step_size", p.step_size, None),
    ):
        if name == "forget" and p.forgets_by_row and gate.shape[-1:] == (sum(p.forget_sizes),):
            _expect_shape(name, gate, (batch, time, heads, gate.shape[-1]), "(batch, time, heads, rows)")
        else:
            _expect_shape(name, gate, (batch, time, heads, net.depth), "(batch, time, heads, depth)")
        _expect_floating(name, gate)
        _expect_range(name, gate, p.mask, highest)
    if p.reset is not None and p.initial is None:
        raise ValueError(
            "initial=None: with reset, give the weights to start afresh from, (heads, out, in) each"
        )
    for name, weights in (("initial", p.initial), ("initial_momentum", p.initial_momentum)):
        if weights is not None:
            _check_weights(name, weights, net, (heads,), "(heads, out, in)")
    shapes = p.inner.rule.extra_shapes(net.weight_shapes)
    _check_extra("state.extra", p.state.extra, shapes, (batch, heads))
    if p.initial_extra is not None:
        _check_extra("initial_extra", p.initial_extra, shapes, (heads,))


def _check_extra(
    name: str, extra: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], leading: tuple[int, ...]
) -> None:
    if len(extra) != len(shapes):
        raise ValueError(
            f"{name} has {len(extra)} tensors: the rule carries {len(shapes)}; see InnerProblem.initial_state"
        )
    for index, (tensor, shape) in enumerate(zip(extra, shapes, strict=True)):
        _expect_shape(f"{name}[{index}]", tensor, (*leading, *shape), "as the rule has it")
        _expect_floating(f"{name}[{index}]", tensor)
