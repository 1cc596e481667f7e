"""Which checkpoints of a memory are kept, and the state that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.checks import has_no_values
from titans.nn.pieces import Rows
from titans.state import map_state, register_state

KEEP = ("log", "linear")


@dataclass(frozen=True)
class Caching:
    """When checkpoints of a memory are taken, and which of them are kept.

    Args:
        every: tokens of a segment; a checkpoint is taken at the end of each.
        keep: "linear": all of them. "log": after n segments ⌊log₂ n⌋ + 1 of them. The n-th checkpoint takes
            the place of the one whose number contains the same power of two, so that for each j the kept ones
            include one that is fewer than 2^(j+1) segments old.

    Raises:
        ValueError: for a value outside its domain.
    """

    every: int
    keep: str = "log"

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"caching.every={self.every!r}: give a whole number of at least 1")
        if self.keep not in KEEP:
            raise ValueError(f"caching.keep={self.keep!r}: choose one of {list(KEEP)}")

    @classmethod
    def of(cls, given: Caching | Mapping[str, Any]) -> Caching:
        """The setting itself, or {"every": …, "keep": …}.

        Raises:
            ValueError: for anything else, and for a value outside its domain.
        """
        if isinstance(given, Caching):
            return given
        known = list(cls.__annotations__)
        if not isinstance(given, Mapping) or "every" not in given or {*given} - {*known}:
            raise ValueError(f"caching={given!r}: give {{'every': 512, 'keep': 'log'}}, or None for none")
        return cls(**given)

    def describe(self) -> dict[str, Any]:
        """What `of` takes and JSON can hold."""
        return asdict(self)

    def refuses(self, chunk_size: int, local_chunk_sizes: Sequence[int] | None = None) -> str | None:
        """Why a memory of such chunks has no checkpoints of this kind, or None."""
        if local_chunk_sizes is not None:
            return (
                f"caching with local_chunk_sizes={[*local_chunk_sizes]}: local memories begin anew with "
                "every shard, so there is no checkpoint of them; give None for one of the two"
            )
        if self.every % chunk_size:
            return (
                f"caching.every={self.every} with chunk_size={chunk_size}: a checkpoint is taken where a "
                f"chunk ends; give a multiple of {chunk_size}"
            )
        return None

    def slot(self, number: Tensor) -> Tensor:
        """The slot of the checkpoint with a number, counted from 1; both (batch,) int64."""
        if self.keep == "linear":
            return number - 1
        # The exponent of two in the number.
        return (number & -number).clamp_min(1).double().log2().long()

    def num_slots(self, taken: int) -> int:
        """The slots in use after so many checkpoints."""
        return taken if self.keep == "linear" else taken.bit_length()


@register_state
@dataclass(frozen=True)
class Checkpoints:
    """The kept checkpoints of a memory.

    weights: W_1 … W_L of each, (batch, slots, heads, out, in). means: the mean key of the segment that each
    ends, (batch, slots, heads, head_dim). tokens: (batch, slots) int64, how many that segment had, 0 where a
    slot is empty. taken: (batch,) int64, how many were taken, those no longer kept included. key_sum: of the
    running segment, (batch, heads, head_dim).
    """

    growing: ClassVar[tuple[str, ...]] = ("weights", "means", "tokens")
    weights: tuple[Tensor, ...]
    means: Tensor
    tokens: Tensor
    taken: Tensor
    key_sum: Tensor

    def trimmed(self) -> Checkpoints:
        """The same without the slots that are empty in every row."""
        used = self.tokens.any(0).nonzero()
        slots = int(used[-1]) + 1 if len(used) else 0
        return replace(self, **{name: map_state(lambda x: x[:, :slots].clone(), getattr(self, name))
                                for name in self.growing})  # fmt: skip

    def is_whole(self) -> bool:
        """Whether no row holds more checkpoints than it has taken."""
        return bool(((self.tokens > 0).sum(1) <= self.taken).all())

    def taken_at(
        self, caching: Caching, weights: tuple[Tensor, ...], tokens: Tensor, rows: Rows = True
    ) -> Checkpoints:
        """The same with a checkpoint more in some rows, whose segment ends here.

        weights: the memory's, (batch, heads, out, in) each. tokens: (batch,) int64, those of the segment.
        Reads the largest number of checkpoints on the host.
        """
        if rows is None:
            return self
        ends = torch.ones_like(self.taken, dtype=torch.bool) if rows is True else rows
        taken, held = self.taken + ends, self.tokens.shape[1]
        if has_no_values(taken):
            slots = held + 1
        else:
            slots = max(held, caching.num_slots(int(taken.max()) if len(taken) else 0))
        here = (torch.arange(slots, device=taken.device) == caching.slot(taken)[:, None]) & ends[:, None]

        def put(old: Tensor, new: Tensor) -> Tensor:
            old = F.pad(old, (0, 0) * (old.dim() - 2) + (0, slots - held))
            return torch.where(here.view(*here.shape, *[1] * (old.dim() - 2)), new.unsqueeze(1), old)

        mean = self.key_sum / tokens.clamp_min(1).to(self.key_sum.dtype)[:, None, None]
        return Checkpoints(
            tuple(put(old, new) for old, new in zip(self.weights, weights, strict=True)),
            put(self.means, mean),
            put(self.tokens, tokens),
            taken,
            torch.where(ends[:, None, None], 0, self.key_sum),
        )
