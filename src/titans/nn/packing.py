"""Rows of different lengths in one tensor: a row's real tokens come first, what follows must not matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.memory.chunkwise.columns import take


@dataclass(frozen=True)
class Packed:
    """Which tokens of packed rows are real, and where they stood before the rows were packed.

    lengths: (batch,) int64, the number of real tokens of each row, which are its first; None where all are.
    real: (batch, time) bool, the same as a mask of the packed rows; None with `lengths`.
    order, place, kept: (batch, time), the way there and back: for each slot the token that stands in it, for
        each token its slot, and which tokens are real; None where the rows were packed from the beginning.
    """

    lengths: Tensor | None = None
    real: Tensor | None = None
    order: Tensor | None = None
    place: Tensor | None = None
    kept: Tensor | None = None

    @staticmethod
    def first(lengths: Tensor | None, time: int) -> Packed:
        """Rows of `time` slots of which the first lengths (batch,) are real, or all for None."""
        if lengths is None:
            return Packed()
        return Packed(lengths, torch.arange(time, device=lengths.device) < lengths[:, None])

    @staticmethod
    def of(mask: Tensor | None) -> Packed:
        """Rows with real tokens anywhere, given by a mask (batch, time) bool, or None for all."""
        if mask is None:
            return Packed()
        rows = Packed.first(mask.sum(1), mask.shape[1])
        order = torch.argsort(~mask, dim=1, stable=True)
        return Packed(rows.lengths, rows.real, order, mask.cumsum(1) - mask.long(), mask)

    def pack(self, x: Tensor) -> Tensor:
        """x (batch, time, ...) with each row's real tokens moved to its front, and zeros behind them."""
        return self.zero_padding(x if self.order is None else take(x, self.order))

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`: y (batch, time, ...) with every token where it stood, zeros elsewhere."""
        return y if self.place is None else zero_padding(take(y, self.place), self.kept)

    def pack_resets(self, reset: Tensor | None) -> Tensor | None:
        """Resets (batch, time) bool of the rows as those of the packed ones: a reset on a token that is not
        real takes effect before the next real one, or after the last."""
        if reset is None or self.place is None:
            return reset
        batch, time = reset.shape
        resets = torch.zeros(batch, time + 1, dtype=torch.int64, device=reset.device)
        return resets.scatter_add(1, self.place, reset.long())[:, :time] > 0

    def zero_padding(self, x: Tensor) -> Tensor:
        """Packed rows x (batch, time, ...) with zeros where no real token is."""
        return zero_padding(x, self.real)


ALL_REAL = Packed()


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
