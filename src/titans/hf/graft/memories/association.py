"""An association in a graft: it reads the base's states, and is mixed into whatever is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.memories.protocol import Call, Found, GraftMemory
from titans.nn.association import Association, AssociationState

# What the meaning of a state depends on.
_OF_STATE = ("layers", "key_layers", "num_ordered", "num_topic", "feature_size")


class AssociationMemory(GraftMemory):
    """Recalls which word followed a context (`titans.nn.association`)."""

    name = "association"
    module_type = Association
    module: Association

    def __init__(self, module: Association, base: WindowedBase) -> None:
        super().__init__(module, base)
        self.layers = module.layers
        module.set_head(base.head.weight)

    @classmethod
    def measured(cls, base: WindowedBase) -> dict[str, Any]:
        """The layers that it reads: 16 and 24 of 30."""
        count = base.num_layers
        return {"layers": sorted({min(count - 1, round(count * share / 30)) for share in (16, 24)})}

    @classmethod
    def state_fields(cls, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        # Absent where there is none, as in files from before it was known.
        return {} if settings is None else {cls.name: {name: settings[name] for name in _OF_STATE}}

    @classmethod
    def limits(cls, vocab_size: int) -> dict[str, tuple[float, float]]:
        return {"recent": (-1.0, float(vocab_size - 1))}

    @staticmethod
    def fast_weights(state: AssociationState) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        return [((state.weight,), ())]

    def whiten(self, hidden: Tensor, states: Sequence[Tensor]) -> None:
        # Many models give the first token of a text states a hundred times as long as any others, which would
        # be all that the covariance sees.
        self.module.whiten([state[:, 1:] for state in states])

    def read(
        self, call: Call, state: AssociationState, hidden: Tensor, states: Sequence[Tensor], inside: Any
    ) -> Found:
        rows = call.head.weight
        found = self.module.read(
            states,
            hidden,
            call.ids,
            rows,
            state,
            lengths=call.rows.lengths,
            frozen=call.frozen,
            surprise=call.surprise,
        )
        mix = partial(
            self.module.mix, reads=call.kept(found.reads), mixing=call.kept(found.mixing), rows=rows
        )
        surprise = None if found.surprise is None else call.rows.unpack(found.surprise)[..., None]
        return Found(found.state, mix=mix, surprise=surprise)
