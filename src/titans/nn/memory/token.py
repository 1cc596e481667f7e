"""The next token of every row as a memory reads it, in one compiled pass (`titans.nn.kernels.token`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titans.memory import MemoryState
from titans.memory.backends.known import refuses_inner
from titans.memory.backends.native import operator_sizes
from titans.nn import kernels
from titans.nn.kernels import token
from titans.nn.memory.half_lives import DecayRate
from titans.nn.memory.learner import Learner
from titans.nn.norm import ReadNorm

# No vector register is wider.
_VECTOR_BYTES = 64
# In the order of the operator's arguments; of the last three any may be None.
_GATES = ("gate_weight", "gate_bias", "gate_key_weight", "gate_up_weight", "gate_down_weight")


class _Known(NamedTuple):
    """What the operators need of a memory in addition to tensors, or None where they do not know it.

    It is found once; key: what it depends on.
    """

    key: tuple[object, ...]
    sizes: tuple[list[int], list[float]] | None


def _sizes(learner: Learner, backend: str, x: Tensor) -> tuple[list[int], list[float]] | None:
    """The inner problem as the operators take it, or None where they do not know it, or may not run."""
    if not token.allows(x):
        return None
    key = learner.inner, learner.form, backend, x.dtype
    known: _Known | None = learner.__dict__.get("_known_to_operators")
    if known is None or any(a is not b for a, b in zip(known.key, key, strict=True)):
        inner = learner.inner
        knows = (
            kernels.allows(backend, "native")
            and inner.network.key_dim is None
            and inner.network.head_dim * x.element_size() % _VECTOR_BYTES == 0
            and not learner.form.forget_by_row
            and not learner.read_anchor
            and refuses_inner(inner) is None
        )
        known = _Known(key, operator_sizes(inner) if knows else None)
        learner.__dict__["_known_to_operators"] = known
    return known.sizes


def _norm_weights(norm: ReadNorm, has_base: bool, x: Tensor) -> list[Tensor | None] | None:
    """Of the update and of the prior, if there is one; None where they are not all that is applied."""
    if (norm.prior is not None) != has_base or not token.is_plain(norm):
        return None
    if norm.prior is not None:
        return token.weights_of(x, norm.taught, norm.prior)  # type: ignore[return-value]
    weights = token.weights_of(x, norm.taught)
    return None if weights is None else [weights[0], None]


def _slow_weights(learner: Learner) -> tuple[list[Tensor], list[Tensor | None]]:
    """The base, empty without one, and gain and bias of the network's norm, from where a module keeps them:
    asking it for an attribute takes ten times as long."""
    base = list(learner.initial_weights._parameters.values()) if learner.form.decay_to_initial else []
    return base, [learner._parameters.get(name) for name in ("norm_weight", "norm_bias")]  # type: ignore[return-value]


def _are_tensors(parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return all([type(part) is Tensor and part.dtype is dtype and part.is_cpu for part in parts])


class _Parts(NamedTuple):
    """What both operators take of a layer: sizes, and the weights of projections, memory and norms."""

    sizes: tuple[list[int], list[float]]
    weights: list[Tensor]
    base: list[Tensor]
    affine: list[Tensor | None]
    norms: list[Tensor | None]


def _parts(
    learner: Learner, projections: Sequence[nn.Module], norm: ReadNorm, backend: str, x: Tensor, tail: Tensor
) -> _Parts | None:
    """The parts of a layer that reads x (batch, 1, hidden_size), or None where no operator knows one."""
    if (sizes := _sizes(learner, backend, x)) is None:
        return None
    base, affine = _slow_weights(learner)
    weights, norms = token.weights_of(x, *projections), _norm_weights(norm, bool(base), x)
    if weights is None or norms is None or not token.alike(x, *base, *affine, tail):
        return None
    return _Parts(sizes, weights, base, affine, norms)


def learn_token(
    learner: Learner,
    projections: Sequence[nn.Module],
    norm: ReadNorm,
    backend: str,
    x: Tensor,
    tail: Tensor,
    state: MemoryState,
    frozen: bool,
) -> tuple[Tensor, Tensor, MemoryState] | None:
    """What a `NeuralMemory` makes of x (batch, 1, hidden_size), or None where no operator computes it.

    Args:
        projections: its input projection, convolution and output projection.
        norm: of its answers.

    Returns:
        The answer (batch, 1, hidden_size), the convolution's new tail, and the new state.
    """
    if (parts := _parts(learner, projections, norm, backend, x, tail)) is None:
        return None
    forget_gate, step_size_gate = learner.forget_gate, learner.step_size_gate
    if type(forget_gate) is not DecayRate or type(step_size_gate) is not nn.Sigmoid:
        return None
    if not token.is_plain(forget_gate) or not token.is_plain(step_size_gate):
        return None
    gates = [learner._parameters.get(name) for name in _GATES]
    carried = [*state.weights, *state.momentum, *(() if state.is_shared else state.anchor)]
    if not token.alike(x, *gates) or not _are_tensors(carried, x.dtype):
        return None
    limits = [learner.form.max_momentum, learner.max_step_size, *(forget_gate.bounds or ())]
    found, anchor = torch.ops.titans_native.memory_token(
        x, tail, state.position.contiguous(), carried, state.is_shared, *parts.sizes,
        learner.chunk_size, frozen, parts.weights, *gates, limits, parts.base, *parts.affine, *parts.norms,
        norm.taught.eps,
    )  # fmt: skip
    if not found:
        return None
    y, tail, position, *leaves = found
    depth = learner.network.depth
    written, momentum, anchors = (tuple(leaves[i : i + depth]) for i in range(0, 3 * depth, depth))
    kept = (state.anchor, written, anchors)[anchor]
    return y, tail, MemoryState(written, momentum, kept, position)


def recall_token(
    learner: Learner,
    projections: Sequence[nn.Module],
    norm: ReadNorm,
    backend: str,
    x: Tensor,
    tail: Tensor,
    snapshot: Sequence[Tensor],
) -> tuple[Tensor, Tensor] | None:
    """What a `MACBlock` recalls for x (batch, 1, hidden_size), or None where no operator computes it.

    Args:
        projections: query projection, convolution and output projection.
        norm: of what is recalled.
        snapshot: the weights that are asked, (batch, heads, out, in) each.

    Returns:
        The context tokens (batch, 1, hidden_size) and the convolution's new tail.
    """
    parts = _parts(learner, projections, norm, backend, x, tail)
    if parts is None or not _are_tensors(snapshot, x.dtype):
        return None
    recalled, tail = torch.ops.titans_native.recall_token(
        x, tail, *parts.sizes, snapshot, *parts.weights, parts.base, *parts.affine, *parts.norms,
        norm.taught.eps,
    )  # fmt: skip
    return recalled, tail
