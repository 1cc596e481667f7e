"""An adaptation in a graft: it predicts from the head's input, and learns by its own loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.memories.protocol import Call, Found, GraftMemory
from titans.nn.adaptation import Adaptation, AdaptationState, Head
from titans.nn.packing import Packed
from titans.state import map_state, with_rows


class AdaptationMemory(GraftMemory):
    """Learns by the model's own loss (`titans.nn.adaptation`)."""

    name = "adaptation"
    module_type = Adaptation
    module: Adaptation

    @classmethod
    def measured(cls, base: WindowedBase) -> dict[str, Any]:
        return {"row_variance": base.head.row_variance()}

    @classmethod
    def from_saved(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"warm_up": 0, **settings}

    @classmethod
    def state_fields(cls, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        chunk_size = None if settings is None else settings.get("chunk_size")
        return {cls.name: settings is not None, "chunk_size": chunk_size}

    @classmethod
    def limits(cls, vocab_size: int) -> dict[str, tuple[float, float]]:
        positive = (0.0, math.inf)
        # Probabilities are rounded.
        least = {"awaits": (0.0, 1.0), "log_probs": (-math.inf, 1e-3)}
        return {**least, "curvatures": positive, "trace": positive}

    @staticmethod
    def fast_weights(state: AdaptationState) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        return [((state.weight, state.bias), state.momentum)]

    def whiten(self, hidden: Tensor, states: Sequence[Tensor]) -> None:
        self.module.whiten(hidden)

    def read(
        self, call: Call, state: AdaptationState, hidden: Tensor, states: Sequence[Tensor], inside: Any
    ) -> Found:
        logits, state, surprise = read_adapted(
            self.module,
            call.head,
            hidden,
            call.ids,
            state,
            call.rows,
            frozen=call.frozen,
            keep=call.keep if isinstance(call.keep, int) else 0,
            surprise=call.surprise,
        )
        logits = logits if isinstance(call.keep, int) else logits[:, call.keep]
        return Found(state, logits, surprise=None if surprise is None else surprise[..., None])


def read_adapted(
    adaptation: Adaptation,
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    state: AdaptationState,
    rows: Packed,
    *,
    frozen: bool,
    keep: int,
    surprise: bool,
) -> tuple[Tensor, AdaptationState, Tensor | None]:
    """Predict and learn; each row gets the result of a batch of one.

    Args:
        hidden: (batch, time, hidden_size) and ids: (batch, time), packed: a row's real tokens come first.
        keep: for how many of the last columns, in the order before packing, to return logits; 0: all.
        frozen, surprise: of `Adaptation.forward`.

    Returns logits (batch, kept, vocab_size) and the surprise (batch, time) at the places before packing, 0
    at padding, and the new state.
    """
    if rows.lengths is None or rows.place is None or rows.kept is None:
        return adaptation(hidden, ids, head, state, frozen=frozen, keep=keep, surprise=surprise)
    batch, time = ids.shape
    kept = min(keep or time, time)
    real, place = rows.kept[:, time - kept :], rows.place[:, time - kept :]
    logits = hidden.new_zeros(batch, kept, adaptation.vocab_size)
    losses = state.bias.new_zeros(batch, time) if surprise else None
    lengths = rows.lengths.tolist()
    for length in sorted({*lengths} - {0}):
        # Rows of one length are read together.
        chosen = torch.tensor([row for row in range(batch) if lengths[row] == length], device=ids.device)
        found, after, lost = adaptation(
            hidden[chosen, :length],
            ids[chosen, :length],
            head,
            map_state(lambda x, chosen=chosen: x[chosen], state),
            frozen=frozen,
            keep=min(keep, length),
            surprise=surprise,
        )
        first = length - found.shape[1]
        at = (place[chosen] - first).clamp(0, found.shape[1] - 1)[..., None].expand(-1, -1, found.shape[2])
        logits[chosen] = torch.where(real[chosen][..., None], found.gather(1, at), 0)
        if losses is not None and lost is not None:
            losses[chosen, :length] = lost
        state = with_rows(state, chosen, after)
    return logits, state, None if losses is None else rows.unpack(losses)
