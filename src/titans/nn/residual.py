"""A neural memory whose answers are added to the states of another model."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from titans.nn.context import BlockContext
from titans.nn.memory import NeuralMemory, NeuralMemoryState
from titans.nn.norm import RMSNorm
from titans.nn.packing import ALL_REAL

# Any: a branch is the same whenever and wherever it is made with the same settings.
_SEED = 0


class ResidualBranch(nn.Module):
    """memory(norm(h)), through a projection that starts at 0: until it is trained, it adds 0.

    Args:
        hidden_size: of the states h.
        number: of the branch in a model; each has random weights of its own.
        settings: of `NeuralMemory`.
    """

    def __init__(self, hidden_size: int, number: int = 0, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED + number)
            self.memory = NeuralMemory(hidden_size, **settings)
        self.norm = RMSNorm(hidden_size)
        nn.init.zeros_(self.memory.output.weight)

    def initial_state(self, rows: int) -> NeuralMemoryState:
        """The state of rows that have read nothing."""
        return self.memory.initial_state(rows)

    def forward(
        self, states: Tensor, state: NeuralMemoryState, *, frozen: bool = False, surprise: bool = False
    ) -> tuple[Tensor, NeuralMemoryState, Tensor | None]:
        """Read a stretch of rows.

        Args:
            states: (rows, time, hidden_size), h, in any precision.
            frozen: step sizes are 0, while forgetting and momentum go on.

        Returns what is to be added, (rows, time, hidden_size) in the precision of h; the new state; and, if
        asked for, ‖M(k) − v‖² of each token, (rows, time), the mean over heads.
        """
        context = BlockContext(ALL_REAL, trace=surprise, frozen=frozen)
        wide = states.to(self.memory.input.weight.dtype)
        answers, state, trace = self.memory(self.norm(wide), state, context=context)
        lost = None if trace is None else trace.surprise.mean(-1)
        return answers.to(states.dtype), state, lost


class ResidualBranches(nn.ModuleDict):
    """Branches after chosen layers of a model, by the number of the layer.

    Args:
        layers: increasing numbers of layers.
        settings: of `NeuralMemory`.

    Raises:
        ValueError: for layers that are not such numbers, or a setting outside its domain.
    """

    def __init__(self, hidden_size: int, layers: Any, **settings: Any) -> None:
        numbers = tuple(layers) if isinstance(layers, (list, tuple)) else ()
        if (
            not numbers
            or any(type(n) is not int or n < 0 for n in numbers)
            or [*numbers] != sorted({*numbers})
        ):
            raise ValueError(
                f"layers={layers!r}: give numbers of layers in increasing order, such as (9, 19)"
            )
        super().__init__({str(n): ResidualBranch(hidden_size, n, **settings) for n in numbers})
        self.layers = numbers

    def initial_state(self, rows: int) -> tuple[NeuralMemoryState, ...]:
        """For each layer the state of rows that have read nothing."""
        return tuple(branch.initial_state(rows) for branch in self.branches)

    @property
    def branches(self) -> list[ResidualBranch]:
        """In the order of `layers`."""
        return cast("list[ResidualBranch]", list(self.values()))
