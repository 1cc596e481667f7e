"""The short convolution against plain loops, over any split, ragged rows and resets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans.nn.conv import CausalConv

from . import naive
from .packed import gradients, plans, random_rows, run_in_calls, totals


@settings(max_examples=40)
@given(plan=plans, kernel_size=st.integers(1, 5), resets=st.booleans(), seed=st.integers(0, 999))
def test_any_split_is_the_plain_loop(plan, kernel_size, resets, seed):
    conv = CausalConv(3, kernel_size).double()
    rows = random_rows(plan, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    flags = [torch.rand(total, generator=generator) < 0.3 * resets for total in totals(plan)]
    # The flags travel as a fourth channel: at padding, NaN makes them resets that must not matter.
    joined = [torch.cat([row, flag[:, None].double()], 1) for row, flag in zip(rows, flags, strict=True)]

    def step(x, packed, positions, tail):
        return conv(x[..., :3], tail, packed, x[..., 3] != 0 if resets else None)

    outputs, tail = run_in_calls(step, joined, plan, None)
    expected = [naive.conv(row, conv.weight, f.tolist()) for row, f in zip(rows, flags, strict=True)]
    leaves = [*rows, conv.weight]
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(tail, torch.stack([want[1] for want in expected]), atol=1e-12, rtol=0)
    got, want = (
        gradients([*outputs, tail], leaves),
        gradients([*(w[0] for w in expected), torch.stack([w[1] for w in expected])], leaves),
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_take_another_path_to_the_same_numbers(dtype):
    torch.manual_seed(0)
    conv = CausalConv(5, 4).to(dtype)
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, tail = conv(x)
    expected, _ = conv.double()(x.double())
    assert y.dtype == tail.dtype == dtype
    # One rounding of the result, because the sums are taken in float32.
    torch.testing.assert_close(
        y.double(), expected, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-8
    )


def test_white_noise_keeps_its_variance():
    torch.manual_seed(0)
    y, _ = CausalConv(512, 4)(torch.randn(1, 512, 512))
    assert 0.9 < y.var().item() < 1.1
