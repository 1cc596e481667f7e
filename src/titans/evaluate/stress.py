"""Stability under hostile input (`hostile.py`): what it does to a memory.

A memory that learns while it reads is a dynamical system driven by its input. It is stable if a small change
of its weights or of a key stays small (otherwise one stream read in two ways gives two answers), if the
gradient of a loss with respect to a key does not grow with the distance, and if its state is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.evaluate.hostile import Cases, StressedMemory
from titans.memory import MemoryState, MomentumRule, memory_scan
from titans.nn.norm import shorten

# Read in pieces of a prime number of tokens, so that the state is looked at in every phase of a chunk.
PIECE = 61


def scan(memory: StressedMemory, cases: Cases, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """Read the cases, every key being its own query: reads (rows, time, 1, head_dim) and the new state."""
    keys, values, forget, momentum, step_size = cases.tokens
    if memory.features is not None:
        keys = memory.features(keys)
    return memory_scan(
        memory.inner,
        keys,
        keys,
        values,
        forget,
        momentum,
        step_size,
        state,
        memory.chunk_size,
        norm_weight=memory.norm_weight,
        base=memory.base,
        objective_inputs=memory.objective_inputs(keys),
    )


def _pieces(cases: Cases) -> Iterable[Cases]:
    for start in range(0, cases.keys.shape[1], PIECE):
        yield Cases(cases.names, *(x[:, start : start + PIECE] for x in cases.tokens))


def _lengths(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean length of each row's weights, (rows,)."""
    return torch.cat([x.flatten(1) for x in tensors], 1).norm(dim=1)


def _perturbed(memory: StressedMemory, cases: Cases, size: float, seed: int = 0) -> tuple[Cases, MemoryState]:
    """Three copies of each case: unchanged, with other weights, and with another first key."""
    generator = torch.Generator().manual_seed(seed)
    rows, dtype = cases.keys.shape[0], cases.keys.dtype
    fast = memory.fast(rows)
    noise = [torch.randn(w.shape[1:], generator=generator, dtype=torch.float64).to(dtype) for w in fast]
    length = float(_lengths([x.unsqueeze(0) for x in noise]))
    state = memory.inner.initial_state(
        [torch.cat([w, w + size / length * x, w]) for w, x in zip(fast, noise, strict=True)]
    )
    direction = torch.randn(cases.keys.shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    key = cases.keys[:, :1] + size * direction / direction.norm()
    keys = torch.cat([cases.keys, cases.keys, torch.cat([key, cases.keys[:, 1:]], 1)])
    others = (torch.cat([x, x, x]) for x in cases.tokens[1:])
    return Cases(cases.names * 3, keys, *others), state


@dataclass(frozen=True)
class Growth:
    """What became of a small change, and of the memory itself.

    weights, first_key: the largest distance, over time, between the fast weights of the disturbed memory and
        of the other, divided by the size of the disturbance, (rows,) each.
    longest_weights, longest_momentum: the longest row of fast weights and of momentum, (rows, depth) each.
    All are the largest at the end of any piece of the stream, and inf if ever not finite.
    """

    weights: Tensor
    first_key: Tensor
    longest_weights: Tensor
    longest_momentum: Tensor


@torch.no_grad()
def perturbation_growth(memory: StressedMemory, cases: Cases, size: float = 1e-9) -> Growth:
    """Read each case three times: unchanged, with the weights disturbed, and with the first key disturbed.

    Args:
        memory: in float64, for a disturbance of the default size.
        cases: what it reads.
        size: Euclidean length of the disturbance.
    """
    rows, depth = cases.keys.shape[0], memory.network.depth
    copies, state = _perturbed(memory, cases, size)
    growth = cases.keys.new_zeros(2, rows)
    longest = cases.keys.new_zeros(2, rows, depth)

    def larger(old: Tensor, new: Tensor) -> Tensor:
        return torch.maximum(old, new.nan_to_num(nan=math.inf, posinf=math.inf))

    for piece in _pieces(copies):
        _, state = scan(memory, piece, state)
        apart = [
            _lengths([w[i * rows : (i + 1) * rows] - w[:rows] for w in state.weights]) / size for i in (1, 2)
        ]
        growth = larger(growth, torch.stack(apart))
        lengths = [
            torch.stack([x[:rows].norm(dim=-1).amax((1, 2)) for x in part], -1)
            for part in (state.weights, state.momentum)
        ]
        longest = larger(longest, torch.stack(lengths))
    return Growth(*growth, *longest)


def key_gradients(
    memory: StressedMemory, cases: Cases, distances: Sequence[int], window: int = 32, last: int = 16
) -> tuple[Tensor, bool]:
    """How much a loss depends on the keys read long before it.

    The loss of a row is the mean of ‖read − value‖² over its `last` tokens, each asked for its own key.

    Args:
        memory, cases: of more than max(distances) + last tokens.
        distances: from the loss back to the keys.
        window: the largest gradient of this many keys counts, the ones at the distance and just behind.
        last: tokens in the loss.

    Returns:
        The largest |d loss / d key|, (rows, len(distances)), and whether the gradients of everything (keys,
        values, gates, initial weights) are finite. Not finite counts as inf.
    """

    def cut_off(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.detach().clone().requires_grad_() for x in tensors)

    leaves, initial = cut_off(cases.tokens), cut_off(memory.initial)
    base = None if memory.base is None else cut_off(memory.base)
    cases, memory = Cases(cases.names, *leaves), replace(memory, initial=initial, base=base)
    reads, _ = scan(memory, cases, memory.inner.initial_state(memory.fast(leaves[0].shape[0])))
    loss = (reads[:, -last:] - cases.values[:, -last:]).square().sum(-1).mean(1).sum()
    grads = torch.autograd.grad(loss, [*leaves, *initial, *(base or ())])
    lengths = grads[0].squeeze(2).norm(dim=-1).nan_to_num(nan=math.inf, posinf=math.inf)
    end = lengths.shape[1] - last
    found = [lengths[:, max(0, end - d) : max(0, end - d) + window].amax(1) for d in distances]
    return torch.stack(found, 1), all(bool(g.isfinite().all()) for g in grads)


@dataclass(frozen=True)
class StateBound:
    """No row of fast weights or of momentum is ever longer than this; one number per layer.

    step: what one token adds to the momentum, at most. momentum: the momentum. weights: the fast weights at
    any token (at the end of a chunk they are at most `row_limit`).
    """

    step: list[float]
    momentum: list[float]
    weights: list[float]


def state_bound(memory: StressedMemory, longest_value: float | None = None) -> StateBound:
    """The documented constant: how large the state of a memory of the stable form can get on any input.

    For keys of any width and length and values no longer than V = √head_dim, with A_l = base + fast weights
    at the start of a chunk, H = ‖h_{l−1}‖, e = M(k) − v, and s_l = ∏_{j>l} 1.13 ‖A_j‖, one token steps
    θ ‖u_l‖ / normalizer ≤ θ · 2 ‖e‖ s_l H / (L · 2 κ_l² max(H, 1)²), where κ_l ≥ s_l and κ_l ≥ 1: keys and
    hidden vectors shorter than 1, such as features, count as 1 long.
    (One 2 is the squared error's gradient, the other its curvature: for the other objectives of the package
    their quotient is at most 1 as well.) The answer is no longer than ‖M(k)‖ ≤ s_l ‖A_l‖ H
    because |SiLU(x)| ≤ |x|, as of GELU and sin, so the step is at most

        step_l = θ/L (V + ‖A_l‖), with ‖A_l‖ ≤ ‖base_l‖_F + row_limit · √out_l,

    and for a row of the last layer, whose error is its own answer less its own value, ‖A_l‖ is the length of
    that row: ‖A_L‖ ≤ max ‖row of base_L‖ + row_limit. Momentum sums to at most step_l / (1 − η), and within
    a chunk rows that began it no longer than `row_limit` gain at most chunk_size times that. With
    θ ≤ 2 (1 − η)/chunk_size:

        momentum_l ≤ 2 (V + ‖A_l‖) / (L · chunk_size),   weights_l ≤ row_limit + 2 (V + ‖A_l‖) / L,

    and weights_l ≤ row_limit at every end of a chunk. No forgetting is needed for this, and the gates may do
    what they like within their limits.

    Args:
        memory: without norm and residual, with normalize_step, a row_limit and a length_floor of at least 1,
            and a rule that carries the weights themselves.
        longest_value: V, by default √head_dim.

    Raises:
        ValueError: for a form that has no such bound.
    """
    net, rule = memory.network, memory.inner.rule
    row_limit = rule.row_limit if isinstance(rule, MomentumRule) else None
    bounded = rule.normalize_step and rule.length_floor >= 1 and not rule.maps_weights
    if net.norm or net.residual or not bounded or row_limit is None:
        raise ValueError(
            "no bound is known for this form: give normalize_step=True, a row_limit, length_floor of at "
            "least 1, norm=False and residual=False, and the rule 'momentum'"
        )
    value = net.head_dim**0.5 if longest_value is None else longest_value
    step, limits = [], []
    bases = memory.base or [torch.zeros_like(w) for w in memory.initial]
    for layer, (start, base) in enumerate(zip(memory.initial, bases, strict=True)):
        # Nothing has shortened the rows with which the fast weights begin.
        limit = max(row_limit, float(start.norm(dim=-1).max()))
        if layer == net.depth - 1:
            total = limit + float(base.norm(dim=-1).max())
        else:
            total = limit * start.shape[-2] ** 0.5 + float(base.norm())
        step.append(memory.max_step_size / net.depth * (value + total))
        limits.append(limit)
    momentum = [s / (1 - memory.max_momentum) for s in step]
    weights = [limit + memory.chunk_size * m for limit, m in zip(limits, momentum, strict=True)]
    return StateBound(step, momentum, weights)


def search_growth(
    memory: StressedMemory,
    tokens: int,
    steps: int,
    rows: int,
    *,
    period: int | None = None,
    seed: int = 0,
    size: float = 1e-7,
) -> tuple[float, Cases]:
    """An enemy that learns: gradient ascent on the growth of a disturbance over keys, values and all gates.

    Half the rows begin with one key repeated, which is where resonance is found most easily, half at random.

    Args:
        memory: in float64.
        tokens: length of the streams.
        steps: of Adam.
        rows: streams that are improved side by side.
        period: tokens after which a stream repeats itself: look for growth that goes on, rather than
            for one great push. By default it never does.
        seed: of where they start.
        size: of the disturbance of the weights.

    Returns:
        The largest growth found, and the stream with its gates, one row.
    """
    generator = torch.Generator().manual_seed(seed)
    key_dim, head_dim, depth = memory.key_dim, memory.network.head_dim, memory.network.depth

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, period or tokens, 1, *shape, generator=generator, dtype=torch.float64)

    keys, values, gates = normal(key_dim), normal(head_dim), 2 * normal(3, depth)
    keys[: rows // 2] = keys[: rows // 2, :1] + 0.1 * keys[: rows // 2]
    # What is forgotten cannot grow, and gives no gradient to start from; but to forget now and then can help.
    gates[::2, ..., 0, :] -= 4
    gates[1::2, ..., 0, :] -= 8
    leaves = [x.requires_grad_() for x in (keys, values, gates)]
    optimizer = torch.optim.Adam(leaves, lr=0.1)

    def cases() -> Cases:
        forget, momentum, step_size = torch.sigmoid(gates).unbind(3)
        return Cases(
            ["found by gradient ascent"] * rows,
            F.normalize(keys, dim=-1),
            shorten(values, head_dim**0.5),
            forget,
            memory.max_momentum * momentum,
            memory.max_step_size * step_size,
        ).repeated(tokens)

    best, found = 0.0, cases().row(0)
    for _ in range(steps):
        current = cases()
        copies, state = _perturbed(memory, current, size)
        # The copy with another first key is left out: the search is for the weights' sake.
        pair = Cases(copies.names[: 2 * rows], *(x[: 2 * rows] for x in copies.tokens))
        state = memory.inner.initial_state([w[: 2 * rows] for w in state.weights])
        _, state = scan(memory, pair, state)
        growth = _lengths([w[rows:] - w[:rows] for w in state.weights]) / size
        top = int(growth.detach().nan_to_num(0).argmax())
        if growth[top] > best:
            best = growth[top].item()
            found = Cases(
                ["found by gradient ascent"], *(x.detach().clone() for x in current.row(top).tokens)
            )
        optimizer.zero_grad()
        (-growth.clamp_min(1e-30).log().sum()).backward()
        for leaf in leaves:
            # One row of a chaotic memory must not silence the others, nor its own earlier tokens.
            assert leaf.grad is not None
            leaf.grad.nan_to_num_(0, 0, 0)
            scale = leaf.grad.flatten(1).norm(dim=1).clamp_min(1e-30)
            leaf.grad.div_(scale.view(-1, *[1] * (leaf.dim() - 1)))
        optimizer.step()
    return best, found
