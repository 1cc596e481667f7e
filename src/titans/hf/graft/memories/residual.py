"""Residual branches in a graft: memories whose answers are added to states between the base's layers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.memories.protocol import Call, Found, GraftMemory, Inside
from titans.nn.memory import NeuralMemory, NeuralMemoryState
from titans.nn.residual import ResidualBranches
from titans.state import map_state, with_rows

# No settings of a graft: the base has the one, and the other is chosen where the memory runs.
_NOT_SETTINGS = ("hidden_size", "backend")
# What decides initial weights alone, on which the meaning of a state does not depend.
_INITIAL = ("start", "half_lives")
_HEAD_DIM = 64

States = tuple[NeuralMemoryState, ...]


class ResidualMemory(GraftMemory):
    """`NeuralMemory` inside chosen layers (`titans.nn.residual`), to be trained through the base."""

    name = "residual"
    module_type = ResidualBranches
    module: ResidualBranches

    def __init__(self, module: ResidualBranches, base: WindowedBase) -> None:
        super().__init__(module, base)
        module.to(torch.promote_types(base.model.dtype, torch.float32))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        known = inspect.signature(NeuralMemory).parameters
        settings = {name: known[name].default for name in known if name not in _NOT_SETTINGS}
        return {"layers": inspect.Parameter.empty, **settings}

    @classmethod
    def measured(cls, base: WindowedBase) -> dict[str, Any]:
        """Layers at a third and two thirds of the depth, and as many heads as give the base's width."""
        count, hidden_size = base.num_layers, base.head.weight.shape[1]
        head_dim = min(_HEAD_DIM, hidden_size)
        layers = sorted({min(count - 1, round(count * share / 3)) for share in (1, 2)})
        return {"layers": layers, "num_heads": max(hidden_size // head_dim, 1), "head_dim": head_dim}

    @classmethod
    def make(cls, hidden_size: int, vocab_size: int, settings: Mapping[str, Any]) -> nn.Module:
        return ResidualBranches(hidden_size, **settings)

    @classmethod
    def state_fields(cls, settings: Mapping[str, Any] | None) -> dict[str, Any]:
        # Absent where there is none, as in files from before it was known.
        if settings is None:
            return {}
        return {cls.name: {name: value for name, value in settings.items() if name not in _INITIAL}}

    @staticmethod
    def fast_weights(state: States) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        return [(layer.memory.weights, layer.memory.momentum) for layer in state]

    def initial_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> States:
        return self.module.initial_state(rows)

    def whiten(self, hidden: Tensor, states: Sequence[Tensor]) -> None:
        """It normalises its inputs by themselves."""

    def inside(self, call: Call, state: States) -> _Branches:
        return _Branches(self.module, state, call)

    def read(
        self, call: Call, state: States, hidden: Tensor, states: Sequence[Tensor], inside: _Branches
    ) -> Found:
        return Found(tuple(inside.states.values()), surprise=inside.surprise())


class _Branches(Inside):
    """states: of each layer, after what was read so far in this call."""

    def __init__(self, module: ResidualBranches, states: States, call: Call) -> None:
        self.module, self.layers, self.call = module, module.layers, call
        self.states = dict(zip(module.layers, states, strict=True))
        # Of each layer and row, as it was read.
        self._lost: dict[int, list[list[Tensor]]] = {layer: [[] for _ in call.ids] for layer in module.layers}

    def __call__(self, layer: int, states: Tensor, rows: Sequence[int] | None) -> Tensor:
        before = self.states[layer]
        chosen = None if rows is None else torch.tensor(rows, device=states.device)
        mine = before if chosen is None else map_state(lambda x: x[chosen], before)
        added, after, lost = self.module[str(layer)](
            states, mine, frozen=self.call.frozen, surprise=self.call.surprise
        )
        self.states[layer] = after if chosen is None else with_rows(before, chosen, after)
        if lost is not None:
            for row, part in zip(range(len(lost)) if rows is None else rows, lost, strict=True):
                self._lost[layer][row].append(part)
        return states + added

    def surprise(self) -> Tensor | None:
        """(batch, time, layers), where tokens stood before packing; None unless it was asked for."""
        if not self.call.surprise:
            return None
        batch, time = self.call.ids.shape[:2]
        found = torch.zeros(batch, time, len(self.layers), device=self.call.ids.device)
        for place, layer in enumerate(self.layers):
            for row, parts in enumerate(self._lost[layer]):
                if parts:
                    lost = torch.cat(parts)
                    found[row, : len(lost), place] = lost.detach()
        return self.call.rows.unpack(found)
