"""What every kernel has to know of the inner problem when it is compiled."""

from __future__ import annotations

from typing import Any

from titans.memory.backends.known import ACTIVATION_SWITCH, objective_switch
from titans.memory.inner import InnerProblem
from titans.memory.network import NORM_EPS
from titans.memory.rules import MomentumRule


def inner_constants(inner: InnerProblem) -> dict[str, Any]:
    """Of one that `refuses_parts` lets through."""
    net, rule, objective = inner.network, inner.rule, objective_switch(inner.objective)
    assert isinstance(rule, MomentumRule)
    return dict(
        EPS=NORM_EPS,
        FLOOR=rule.length_floor**2,
        RADIUS=rule.row_limit or 1.0,
        DIM=net.head_dim,
        HIDDEN=net.weight_shapes[-1][1],
        DEPTH=net.depth,
        NORM=net.norm,
        RESIDUAL=net.residual,
        NORMALIZE=rule.normalize_step,
        RESCALE=rule.row_limit is not None,
        ACTIVATION=ACTIVATION_SWITCH[net.activation],
        OBJECTIVE=objective.kind,
        PARAMETER=objective.parameter,
    )
