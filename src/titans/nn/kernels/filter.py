"""A short causal filter of every channel, and its gradients, as Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TIME, _CHANNELS = 64, 64
# The weights' gradient: tokens a program adds up, and how many of them and channels at a time.
_SPAN, _AT_ONCE, _FEW = 512, 4, 64


@triton.jit
def _filter_kernel(
    x, weight, y, from_time, time, channels,
    WIDTH: tl.constexpr, REVERSED: tl.constexpr, TIME: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_k weight[:, k] x[t + k], or REVERSED x[t − k], x being 0 outside of its `from_time` tokens."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * TIME + tl.arange(0, TIME)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    total = tl.zeros([TIME, CHANNELS], tl.float32)
    for k in range(WIDTH):
        source = t - k if REVERSED else t + k
        mask = ((source >= 0) & (source < from_time))[:, None] & inside[None, :]
        part = tl.load(x + (row * from_time + source[:, None]) * channels + c[None, :], mask, 0.0)
        total += part.to(tl.float32) * tl.load(weight + c * WIDTH + k, inside, 0.0)[None, :]
    tl.store(
        y + (row * time + t[:, None]) * channels + c[None, :], total, (t < time)[:, None] & inside[None, :]
    )


@triton.jit
def _weight_kernel(
    x, grad, parts, time, channels,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SPAN: tl.constexpr, AT_ONCE: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """parts[row, span, c, k] = Σ_t grad[t, c] x[t + k, c] over a span of tokens."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, PADDED)
    inside = c < channels
    total = tl.zeros([PADDED, CHANNELS], tl.float32)
    for begin in range(0, SPAN, AT_ONCE):
        t = span * SPAN + begin + tl.arange(0, AT_ONCE)
        real = (t < time)[:, None, None] & (k < WIDTH)[None, :, None] & inside[None, None, :]
        source = t[:, None, None] + k[None, :, None]
        seen = tl.load(x + (row * (time + WIDTH - 1) + source) * channels + c[None, None, :], real, 0.0)
        of = tl.load(
            grad + (row * time + t[:, None]) * channels + c[None, :],
            (t < time)[:, None] & inside[None, :],
            0.0,
        )
        total += tl.sum(seen.to(tl.float32) * of.to(tl.float32)[:, None, :], 0)
    into = parts + ((row * tl.num_programs(1) + span) * channels + c[None, :]) * WIDTH + k[:, None]
    tl.store(into, total, (k < WIDTH)[:, None] & inside[None, :])


def _filter(x: Tensor, weight: Tensor, time: int, reverse: bool) -> Tensor:
    batch, from_time, channels = x.shape
    y = x.new_empty(batch, time, channels)
    grid = (batch, triton.cdiv(time, _TIME), triton.cdiv(channels, _CHANNELS))
    _filter_kernel[grid](
        x, weight, y, from_time, time, channels, WIDTH=weight.shape[1], REVERSED=reverse,
        TIME=_TIME, CHANNELS=_CHANNELS,
    )  # fmt: skip
    return y


class _CausalFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _filter(x, weight, x.shape[1] - weight.shape[1] + 1, reverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        batch, time, channels = grad.shape
        width, spans = weight.shape[1], triton.cdiv(time, _SPAN)
        parts = weight.new_empty(batch, spans, channels, width)
        _weight_kernel[(batch, spans, triton.cdiv(channels, _FEW))](
            x, grad, parts, time, channels, WIDTH=width, PADDED=triton.next_power_of_2(width),
            SPAN=_SPAN, AT_ONCE=_AT_ONCE, CHANNELS=_FEW,
        )  # fmt: skip
        return _filter(grad, weight, x.shape[1], reverse=True), parts.sum((0, 1))


def causal_filter(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = Σ_k weight[:, k] · x_{t + k}: x (batch, time + width − 1, channels), weight (channels, width) in
    float32, to (batch, time, channels) in the dtype of x."""
    answer: Tensor = _CausalFilter.apply(x, weight)
    return answer
