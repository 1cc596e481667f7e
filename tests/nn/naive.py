"""What the layers must compute, for one row, token by token and head by head, in plain loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def turned(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """Rotate the feature pairs of x (heads, head_dim) by the angles of `position`."""
    out = []
    for i in range(0, x.shape[-1], 2):
        angle = position * theta ** (-i / x.shape[-1])
        c, s = math.cos(angle), math.sin(angle)
        out += [x[:, i] * c - x[:, i + 1] * s, x[:, i] * s + x[:, i + 1] * c]
    return torch.stack(out, dim=-1)


def heads_of(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    return (weight @ x).view(heads, -1)


def softmax_over(queries_and_keys: list[tuple[Tensor, Tensor]], values: list[Tensor]) -> Tensor:
    """One softmax per head over pairs of (query, key), each (heads, head_dim) → (heads · head_dim,)."""
    dim = values[0].shape[-1]
    scores = torch.stack([(q * k).sum(-1) / math.sqrt(dim) for q, k in queries_and_keys])
    weights = scores.softmax(0)
    return sum(w[:, None] * v for w, v in zip(weights, values, strict=True)).flatten()


def conv(x: Tensor, weight: Tensor, reset: list[bool]) -> tuple[Tensor, Tensor]:
    """Outputs (tokens, channels) and the tail (kernel_size − 1, channels)."""
    width, outputs, past = weight.shape[1], [], [x.new_zeros(x.shape[1])] * (weight.shape[1] - 1)
    for token, afresh in zip(x, reset, strict=True):
        if afresh:
            past = [torch.zeros_like(token)] * (width - 1)
        past = [*past, token]
        outputs.append(sum(tap * weight[:, k] for k, tap in enumerate(past)))
        past = past[1:]
    tail = torch.stack(past) if past else x.new_zeros(0, x.shape[1])
    return torch.stack(outputs) if outputs else x, tail


def keys_values(
    tokens: Tensor, weight: Tensor, heads: int, rotate: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each token, (heads, head_dim); keys rotated by the token's index if asked."""
    keys, values = weight.chunk(2)
    made = [heads_of(x, keys, heads) for x in tokens]
    if rotate:
        made = [turned(key, index) for index, key in enumerate(made)]
    return made, [heads_of(x, values, heads) for x in tokens]


def attention(
    x: Tensor,
    context: Tensor | None,
    persistent: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor],
    heads: int,
    window: int,
) -> tuple[Tensor, list[list[Tensor]]]:
    """Causal attention of one row over `window` tokens, their context tokens and persistent tokens.

    weights: query, key above value, output. Returns (tokens, hidden) and the lists [keys, values] of x, then
    those of the context, one entry per token.
    """
    query, key_value, output = weights
    lists = [*keys_values(x, key_value, heads, rotate=True)]
    if context is not None:
        lists += keys_values(context, key_value, heads, rotate=True)
    fixed_keys, fixed_values = keys_values(
        x[:0] if persistent is None else persistent, key_value, heads, False
    )
    outputs = []
    for t, token in enumerate(x):
        plain = heads_of(token, query, heads)
        pairs, seen = [(plain, key) for key in fixed_keys], list(fixed_values)
        for keys, values in zip(lists[::2], lists[1::2], strict=True):
            for s in range(max(0, t - window + 1), t + 1):
                pairs.append((turned(plain, t), keys[s]))
                seen.append(values[s])
        outputs.append(output @ softmax_over(pairs, seen))
    return torch.stack(outputs) if outputs else x, lists


def stacked(entries: list[Tensor], slots: int, like: Tensor, right: bool = False) -> Tensor:
    """The last `slots` entries in a row of `slots`, zeros in the unused ones, which come first if `right`."""
    kept = entries[max(0, len(entries) - slots) :]
    empty = [torch.zeros_like(like)] * (slots - len(kept))
    return (
        torch.stack([*empty, *kept] if right else [*kept, *empty])
        if slots
        else like.new_zeros(0, *like.shape)
    )
