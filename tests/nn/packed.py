"""Cuts rows into calls of packed, NaN-padded stretches: a stateful layer must not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from titans.nn.packing import Packed

# step(inputs (batch, time, ...), which of them are real, positions (batch,), state) → (outputs, state)
Step = Callable[[Tensor, Packed, Tensor, Any], tuple[Tensor, Any]]

# Two or three rows; every call gives each row 0 to 7 tokens and is up to two tokens wider than the longest.
plans = st.integers(1, 3).flatmap(
    lambda batch: st.lists(
        st.tuples(st.lists(st.integers(0, 7), min_size=batch, max_size=batch), st.integers(0, 2)),
        min_size=1,
        max_size=4,
    )
)
Plan = list[tuple[list[int], int]]


def totals(plan: Plan) -> list[int]:
    return [sum(counts) for counts in zip(*(counts for counts, _ in plan), strict=True)]


def random_rows(plan: Plan, width: int, seed: int) -> list[Tensor]:
    """One float64 leaf (tokens, width) per row of the plan."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(total, width, generator=generator, dtype=torch.float64).requires_grad_()
        for total in totals(plan)
    ]


def run_in_calls(
    step: Step,
    rows: list[Tensor],
    plan: Plan,
    state: Any,
    room: Callable[[int], int] = lambda position: 10**9,
) -> tuple[list[Tensor], Any]:
    """Feed `rows` by the plan, at most room(position) tokens of a row at once; returns the real outputs."""
    positions = [0] * len(rows)
    outputs: list[list[Tensor]] = [[] for _ in rows]
    for counts, extra in plan:
        left = list(counts)
        while True:
            now = [min(n, room(p)) for n, p in zip(left, positions, strict=True)]
            time = max(now) + extra
            stretch = torch.stack(
                [
                    torch.cat([row[p : p + n], row.new_full((time - n, *row.shape[1:]), torch.nan)])
                    for row, p, n in zip(rows, positions, now, strict=True)
                ]
            )
            ragged = extra > 0 or len(set(now)) > 1
            packed = Packed.first(torch.tensor(now) if ragged else None, time)
            y, state = step(stretch, packed, torch.tensor(positions), state)
            assert y.shape[:2] == (len(rows), time) and y.isfinite().all()
            for b, n in enumerate(now):
                assert not y[b, n:].any()
                outputs[b].append(y[b, :n])
                positions[b] += n
                left[b] -= n
            if not any(left):
                break
    return [torch.cat(parts) for parts in outputs], state


def gradients(outputs: list[Tensor], inputs: list[Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of a fixed random projection of `outputs`; zeros for inputs that do not matter."""
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
