"""Which networks, objectives and update rules the compiled backends, native and Triton, know."""

from __future__ import annotations

from typing import NamedTuple

from titans.memory.inner import InnerProblem
from titans.memory.objectives import Huber, Lp, Objective, SquaredError
from titans.memory.problem import ScanProblem
from titans.memory.rules import MomentumRule

_REMEDY = "give backend='auto' or 'chunkwise'"

# Activations as a kernel is given them.
ACTIVATION_SWITCH = {"gelu": 0, "silu": 1, "sin": 2}


class ObjectiveSwitch(NamedTuple):
    """An objective as a kernel is given it. kind: 0 squared error, 1 Huber, 2 l_p. parameter: δ or p."""

    kind: int
    parameter: float


def objective_switch(objective: Objective) -> ObjectiveSwitch:
    """The switch of an objective that `refuses_parts` lets through."""
    if isinstance(objective, Huber):
        return ObjectiveSwitch(1, float(objective.delta))
    if isinstance(objective, Lp):
        return ObjectiveSwitch(2, float(objective.p))
    return ObjectiveSwitch(0, 0.0)


def refuses_parts(problem: ScanProblem) -> str | None:
    """Why a compiled backend cannot run this network, objective, update rule or forget gate, or None."""
    if reason := refuses_inner(problem.inner):
        return reason
    if problem.forgets_by_row:
        return f"it knows one forget gate for each layer, and not one for each row of weights; {_REMEDY}"
    return None


def refuses_inner(inner: InnerProblem) -> str | None:
    """Why a compiled backend cannot run this network, objective or update rule, or None."""
    if inner.network.gated:
        return f"it knows no gated network; {_REMEDY}"
    # Exact types: a subclass may compute something else.
    if type(inner.objective) not in (SquaredError, Huber, Lp):
        return (
            f"it knows the objectives SquaredError, Huber and Lp, and not "
            f"{type(inner.objective).__name__}; {_REMEDY}"
        )
    if type(inner.rule) is not MomentumRule:
        return f"it knows the update rule MomentumRule, and not {type(inner.rule).__name__}; {_REMEDY}"
    return None
