"""The public calls: check, promote, choose a backend, run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from titans.memory.backends import choose_backend
from titans.memory.backends.traced import traced_scan
from titans.memory.checks import check_read, check_scan, has_no_values, targets
from titans.memory.inner import InnerProblem
from titans.memory.network import MemoryNetwork
from titans.memory.precision import autocast_device
from titans.memory.problem import ScanProblem, compute_dtype
from titans.memory.state import MemoryState


@overload
def memory_scan(
    *args: Any, return_surprise: Literal[True], **options: Any
) -> tuple[Tensor, MemoryState, Tensor]: ...
@overload
def memory_scan(*args: Any, **options: Any) -> tuple[Tensor, MemoryState]: ...
def memory_scan(
    inner: MemoryNetwork | InnerProblem,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    forget: Tensor,
    momentum: Tensor,
    step_size: Tensor,
    state: MemoryState,
    chunk_size: int = 16,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mask: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Sequence[Tensor] | None = None,
    initial_momentum: Sequence[Tensor] | None = None,
    initial_extra: Sequence[Tensor] | None = None,
    base: Sequence[Tensor] | None = None,
    objective_inputs: Tensor | None = None,
    backend: str = "auto",
    return_surprise: bool = False,
    read_anchor: bool = False,
) -> tuple[Tensor, MemoryState] | tuple[Tensor, MemoryState, Tensor]:
    """Read a stretch of tokens: learn every key → value pair, and answer every query with what is known by
    then.

    At token t, with W' the weights at the end of the previous chunk (chunks are counted from the start of the
    sequence, not of the call):  u = ∂‖M(k_t; W') − v_t‖²/∂W';  S ← eta S − theta u  (14);
    W ← (1 − alpha) W + S  (13);  y_t = M(q_t; W)  (15).

    Args:
        inner: the inner problem of one head; or its network alone, which means the squared error and the
            momentum rule.
        queries, keys: (batch, time, heads, key_dim), any floating dtype; key_dim is head_dim unless the
            network has one of its own.
        values: (batch, time, heads, head_dim).
        forget, momentum, step_size: alpha, eta, theta, (batch, time, heads, depth); the first two in the
            closed interval [0, 1], the third not negative. `forget` may also have one number for each row of
            the weights, layer after layer: (batch, time, heads, Σ out), W ← diag(1 − alpha) W + S.
        state: what the rows have learned so far; see `MemoryState.initial`.
        chunk_size: tokens that share one set of gradient weights. Part of the model, not a speed knob.
        norm_weight, norm_bias: gain and bias of the network's LayerNorm, (heads, head_dim).
        mask: (batch, time) bool; a False token neither writes nor advances the chunk; its inputs may be NaN.
        reset: (batch, time) bool; before such a token the row starts afresh, with weights `initial`, momentum
            `initial_momentum` and position 0.
        initial: (heads, out, in) for each layer; needed with `reset`.
        initial_momentum: (heads, out, in) for each layer; zero by default.
        initial_extra: what else the rule carries, (heads, …) each; `UpdateRule.fresh_extra` by default.
        base: (heads, out, in) for each layer: slow weights on which the fast ones are offsets. The network is
            run with their sum, so that what is forgotten decays towards `base` and not towards 0.
        objective_inputs: (batch, time, heads, num_inputs), the numbers of each token that the objective
            takes, such as its threshold; needed if it takes any.
        backend: "auto", or a name in `BACKENDS`: "native", "triton", "chunkwise", "reference",
            "native_bfloat16" (products on bfloat16 operands).
        return_surprise: also return ‖M(k_t; W') − v_t‖², (batch, time, heads), outside the autograd graph.
        read_anchor: answer with the weights the running chunk began with, y_t = M(q_t; W'), and not with
            those just written. Then nothing grows with the square of `chunk_size`, which may be thousands;
            every backend but the oracle runs the same code, `plain.py`. Rules that write at chunk ends alone
            always do so.

    Returns:
        Reads (batch, time, heads, head_dim) in the queries' dtype, 0 where masked, and the new state. State
        and arithmetic are in promote_types(dtype, float32), autocast or not.

    Raises:
        ValueError: for a wrong shape, dtype or range, or a backend that refuses, naming the argument.
    """
    inner = InnerProblem.of(inner)
    values = targets(inner, values, objective_inputs, mask)
    problem = ScanProblem(
        inner, queries, keys, values, forget, momentum, step_size, state, chunk_size,
        norm_weight, norm_bias, mask, reset, initial, initial_momentum, initial_extra, base,
        read_anchor or inner.rule.reads_anchor,
    )  # fmt: skip
    check_scan(problem)
    with torch.autocast(autocast_device(queries), enabled=False):
        problem = problem.promoted()
        if torch.compiler.is_compiling() or has_no_values(queries):
            # As one operator, which knows the shapes of its results.
            reads, new_state, surprise = traced_scan(problem, backend)
        else:
            reads, new_state, surprise = choose_backend(backend, problem).scan(problem)
    reads = reads.to(queries.dtype)
    return (reads, new_state, surprise) if return_surprise else (reads, new_state)


def memory_read(
    inner: MemoryNetwork | InnerProblem,
    queries: Tensor,
    state: MemoryState,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    base: Sequence[Tensor] | None = None,
) -> Tensor:
    """Ask without learning: M(q; W) with the state's weights, M* of equation 15.

    Args:
        inner: as in `memory_scan`.
        queries: (batch, time, heads, key_dim).
        norm_weight, norm_bias: (heads, head_dim).
        base: as in `memory_scan`.

    Returns:
        (batch, time, heads, head_dim) in the queries' dtype.

    Raises:
        ValueError: for a wrong shape or dtype, naming the argument.
    """
    inner = InnerProblem.of(inner)
    net = inner.network
    check_read(net, queries, state, norm_weight, norm_bias, base)
    with torch.autocast(autocast_device(queries), enabled=False):
        dtype = compute_dtype(queries, *state.weights)
        gain, bias = (None if x is None else x.to(dtype).unsqueeze(1) for x in (norm_weight, norm_bias))
        raised_base = None if base is None else [b.to(dtype) for b in base]
        weights = inner.network_weights([w.to(dtype) for w in state.weights], raised_base)
        answers = net(weights, queries.to(dtype).transpose(1, 2), gain, bias)
    return answers.transpose(1, 2).to(queries.dtype)
