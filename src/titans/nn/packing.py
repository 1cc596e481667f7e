"""Packed rows: the real tokens of row b are its first `lengths[b]`; what follows must not matter."""

from __future__ import annotations

import torch
from torch import Tensor


def real_tokens(lengths: Tensor | None, time: int) -> Tensor | None:
    """Which tokens are real: (batch, time) bool, or None where `lengths` is None and all of them are."""
    if lengths is None:
        return None
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def zero_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """x (batch, time, ...) with zeros where not `real`; NaN there reaches neither value nor gradient."""
    if real is None:
        return x
    return x.masked_fill(~real.view(real.shape + (1,) * (x.dim() - 2)), 0)


def zero_padding_(y: Tensor, real: Tensor | None) -> Tensor:
    """`zero_padding` in place, for a result just computed; spares a tensor of its size."""
    if real is None:
        return y
    return y.masked_fill_(~real.view(real.shape + (1,) * (y.dim() - 2)), 0)


def newest(past: Tensor | None, new: Tensor, lengths: Tensor | None, size: int) -> Tensor:
    """The last `size` entries of `past` and then the real ones of `new`; zeros where a row has fewer.

    past: (batch, size, ...) of the same kind, or None for nothing. new: (batch, time, ...). lengths: (batch,)
    or None. Returns (batch, size, ...), right-aligned, never a view of `new`: a state must not keep a whole
    stretch alive.
    """
    batch, time = new.shape[:2]
    if lengths is None and time >= size:
        return new[:, time - size :].clone()
    if past is None:
        past = new.new_zeros(batch, size, *new.shape[2:])
    if lengths is None:
        return torch.cat([past[:, time:].to(new.dtype), new], dim=1)
    extended = torch.cat([past.to(new.dtype), new], dim=1)
    index = lengths[:, None] + torch.arange(size, device=new.device)
    return take(extended, index)


def place(past: Tensor, new: Tensor, position: Tensor, lengths: Tensor | None, size: int) -> Tensor:
    """Row b's first position[b] entries of `past`, its real entries of `new` then zeros.

    past: (batch, slots, ...). new: (batch, time, ...). position: (batch,) int64. lengths: (batch,) or None.
    Returns (batch, size, ...); size must hold every row.
    """
    slots, position = torch.arange(size, device=new.device), position[:, None]
    filled = slots < position + (new.shape[1] if lengths is None else lengths[:, None])
    index = torch.where(slots < position, slots, past.shape[1] + slots - position)
    both = torch.cat([past.to(new.dtype), new], dim=1)
    return zero_padding_(take(both, index.clamp(max=max(both.shape[1] - 1, 0))), filled)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x (batch, time, ...) and index (batch, count): (batch, count, ...)."""
    index = index.view(index.shape + (1,) * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))
