"""Products of gates and the rule's coefficients: exact at closed gates, precise for slow ones."""

from __future__ import annotations

import math

import pytest
import torch

from titans.memory import UPDATE_RULES
from titans.memory.decay import decay_products

from ..tolerances import assert_close


def by_hand(gates: torch.Tensor) -> torch.Tensor:
    size = gates.shape[-1]
    rows = []
    for t in range(size):
        row = [
            gates[..., i + 1 : t + 1].prod(-1) if i <= t else torch.zeros_like(gates[..., 0])
            for i in range(size)
        ]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize(
    "gates", [[0.5, 0.3, 0.9, 0.7], [0.5, 0.0, 0.9, 0.0, 0.0, 1.0], [0.0] * 5, [1.0] * 4, [0.2]]
)
def test_products_and_their_gradient(gates):
    """`prod` has a gradient of its own, right at zeros, one or many; finite differences are the third."""
    gates = torch.tensor([gates, gates[::-1]], dtype=torch.float64, requires_grad=True)
    products, expected = decay_products(gates), by_hand(gates)
    assert_close(products, expected, 1e-15, "products")
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(
        *(torch.autograd.grad(x, gates, cotangent)[0] for x in (products, expected)), 1e-14, "gradient"
    )
    assert torch.autograd.gradcheck(decay_products, gates)


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("half_life", [10.0, 1e6])
def test_a_slow_gate_keeps_its_half_life_in_float32(rule, half_life):
    """1 − alpha in float32 is off by 4 % of alpha at a half-life of a million tokens."""
    alpha = -math.expm1(-math.log(2) / half_life)
    size = 16
    forget = torch.full((size,), alpha)
    none = torch.zeros(size)
    change = UPDATE_RULES[rule]().coefficients(forget, none, none, None).end_weights
    expected = math.expm1(size * math.log1p(-forget[0].item()))
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_coefficients_are_the_step_repeated(rule):
    """The rule is stated twice; here both are applied to scalars, with unwritten tokens in between."""
    rng = torch.Generator().manual_seed(0)
    size = 9
    forget, momentum, step_size, gradient = torch.rand(4, size, generator=rng, dtype=torch.float64)
    forget[2], momentum[4], momentum[7] = 1.0, 0.0, 1.0
    written = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    c = UPDATE_RULES[rule]().coefficients(forget, momentum, step_size, written)
    start, start_momentum = weight, state = torch.tensor([0.7, -0.4], dtype=torch.float64)
    for t in range(size):
        if written[t]:
            gates = forget[t], momentum[t], step_size[t]
            weight, state = UPDATE_RULES[rule]().step(weight, state, gradient[t], *gates)
            closed = c.read_weights[t, 0] * start + c.read_momentum[t, 0] * start_momentum
            assert_close(closed - c.read_steps[t] @ gradient, weight, 1e-14, f"weight after token {t}")
    end = start + c.end_weights[0, 0] * start + c.end_momentum[0, 0] * start_momentum
    assert_close(end - c.end_steps[:, 0] @ gradient, weight, 1e-14, "weight at the end")
    end = c.momentum_momentum[0, 0] * start_momentum
    assert_close(end - c.momentum_steps[:, 0] @ gradient, state, 1e-14, "momentum at the end")
