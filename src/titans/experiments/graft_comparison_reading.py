"""What a pretrained model computes for a text, shared by the systems that read it through one window."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.layers import Change
from titans.hf.graft.window import Window, WindowState
from titans.state import state_nbytes

# Shorter pieces, questions and answers, differ between systems.
SHORTEST = 64
# Bytes beyond which earlier texts are forgotten when another begins.
LIMIT = 2 << 30


class _Piece(NamedTuple):
    """before: kept, so that its identity stays that of this state."""

    before: WindowState
    hidden: Tensor
    states: tuple[Tensor, ...]
    after: WindowState
    seconds: float

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.hidden, *self.states)) + state_nbytes(self.after)


class SharedBase(WindowedBase):
    """A base that computes each piece of a text once, for all readers that have it in place of their own.

    Args:
        model, window: of `WindowedBase`; the model must not change afterwards.
        layers: all layers whose states any of the readers takes; with others nothing is shared.

    spared: processor seconds of the pieces that were not computed again.
    """

    def __init__(self, model: PreTrainedModel, window: Window, layers: Sequence[int] = ()) -> None:
        super().__init__(model, window)
        self.shared_layers = tuple(layers)
        self.spared = 0.0
        self._pieces: dict[Any, _Piece] = {}

    def read(
        self, x: Tensor, state: WindowState, lengths: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        hidden, _, state = self.read_layers(x, state, lengths, layers=())
        return hidden, state

    def read_layers(
        self,
        x: Tensor,
        state: WindowState,
        lengths: Tensor | None = None,
        *,
        layers: Sequence[int],
        changes: Sequence[Change] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], WindowState]:
        whole = len(x) == 1 and x.ndim == 2 and x.shape[1] >= SHORTEST and lengths is None
        if not whole or changes or not {*layers} <= {*self.shared_layers}:
            return super().read_layers(x, state, lengths, layers=layers, changes=changes)
        begins = not state.slots
        key = (None if begins else id(state), x.numpy(force=True).tobytes())
        piece = self._pieces.get(key)
        if piece is None:
            if begins and sum(piece.nbytes() for piece in self._pieces.values()) > LIMIT:
                self._pieces.clear()
            began = time.process_time()
            hidden, states, after = super().read_layers(x, state, layers=self.shared_layers)
            piece = _Piece(state, hidden, states, after, time.process_time() - began)
            self._pieces[key] = piece
        else:
            self.spared += piece.seconds
        chosen = dict(zip(self.shared_layers, piece.states, strict=True))
        return piece.hidden, tuple(chosen[layer] for layer in layers), piece.after
