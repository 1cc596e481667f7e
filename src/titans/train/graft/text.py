"""Trainings that are judged by how held-out text is predicted, and must harm none of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from titans.train.graft.carried import from_tensors, to_tensors
from titans.train.graft.loop import HELD_OUT, UNTRAINED, TrainingLoop


@dataclass(frozen=True)
class HeldOutText:
    """losses: for each held-out document the mean loss of its tokens in nats. base: that of the base, in its
    window, without a memory."""

    losses: dict[str, float]
    base: dict[str, float]

    @property
    def changes(self) -> dict[str, float]:
        """Of each document the change against the base, as a share of its loss."""
        return {name: loss / self.base[name] - 1 for name, loss in self.losses.items()}

    @property
    def mean(self) -> float:
        """Mean of the changes; lower is better."""
        return float(np.mean([*self.changes.values()]))

    def harms(self, untrained: HeldOutText) -> bool:
        """Whether any document is predicted worse than without training."""
        return any(loss > untrained.losses[name] for name, loss in self.losses.items())


class TextTraining(TrainingLoop[HeldOutText]):
    """Keeps the weights with which no held-out document is predicted worse than before the training, and of
    those the ones with the least mean loss, relative to the base's; if there are none, those from before.
    """

    found_class = HeldOutText
    # What goes on from step to step, made by who derives from this class.
    _state: Any

    def carried(self) -> dict[str, Tensor]:
        return to_tensors(self._state)

    def carry_on(self, tensors: dict[str, Tensor]) -> None:
        self._state = from_tensors(tensors, self._state)

    def score(self, found: HeldOutText) -> float:
        return found.mean

    def is_better(self, found: HeldOutText) -> bool:
        return super().is_better(found) and not found.harms(self.found[UNTRAINED])

    def before_the_first_step(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        found = self.evaluate()
        self.found = {HELD_OUT: found, UNTRAINED: found}
        self.report(on_log, found)
