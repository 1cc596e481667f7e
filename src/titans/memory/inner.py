"""The inner problem: which network is trained while the model reads, on which objective, by which rule."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

from titans.memory.network import ACTIVATION_SLOPE, MemoryNetwork
from titans.memory.objectives import OBJECTIVES, Objective, SquaredError, num_inputs
from titans.memory.rules import UPDATE_RULES, MomentumRule, UpdateRule
from titans.memory.state import MemoryState

STEP_NORMALIZER_FLOOR = 1e-6


@dataclass(frozen=True)
class InnerProblem:
    """What one head learns at test time, and how: all that a scan has to know in addition to its tensors.

    Args:
        network: the network whose weights are learned.
        objective: the loss of its answer to a key, compared with the value; see `titans.memory.objectives`.
        rule: what a gradient does to the weights; see `titans.memory.rules`.

    Raises:
        ValueError: for a name or a class in place of an object, and for a network with `normalize_step` and a
            rule without, which would ignore it.
    """

    network: MemoryNetwork
    objective: Objective = field(default_factory=SquaredError)
    rule: UpdateRule = field(default_factory=MomentumRule)

    def __post_init__(self) -> None:
        for name, part in (("objective", self.objective), ("rule", self.rule)):
            if isinstance(part, (str, type)):
                raise ValueError(f"{name}={part!r}: give an object, such as SquaredError() or MomentumRule()")
        if self.network.normalize_step and not self.rule.normalize_step:
            raise ValueError("network.normalize_step=True but rule.normalize_step=False: give it to the rule")
        if self.network.gated and self.rule.normalize_step:
            raise ValueError(
                "rule.normalize_step=True with network.gated=True: no bound of its curvature is known; give "
                "False, and small step sizes"
            )
        if self.rule.window > 1 and num_inputs(self.objective):
            raise ValueError(
                f"rule.window={self.rule.window} with the objective {type(self.objective).__name__}: what it "
                "takes for each token is not carried to the next window; give window=1 or another objective"
            )

    @classmethod
    def of(cls, given: MemoryNetwork | InnerProblem) -> InnerProblem:
        """The inner problem itself, or for a network alone the squared error and the momentum rule."""
        if isinstance(given, InnerProblem):
            return given
        return cls(given, SquaredError(), MomentumRule(normalize_step=given.normalize_step))

    def initial_state(self, weights: Sequence[Tensor]) -> MemoryState:
        """A memory that has read nothing: these weights, each (batch, heads, out, in), no momentum, and what
        the rule also carries. In at least float32."""
        state = MemoryState.initial(weights)
        return replace(state, extra=self.rule.fresh_extra(state.weights))

    def describe(self) -> str:
        """The inner problem as the text of a Python literal, which a compiled graph can hold.

        Raises:
            ValueError: for an objective or a rule of a class that is not registered.
        """
        parts = {
            "network": asdict(self.network),
            "objective": OBJECTIVES.describe(self.objective),
            "rule": UPDATE_RULES.describe(self.rule),
        }
        return repr(parts)

    @staticmethod
    @functools.lru_cache
    def described(description: str) -> InnerProblem:
        """The inner problem of what `describe` returned."""
        parts = ast.literal_eval(description)
        return InnerProblem(
            MemoryNetwork(**parts["network"]),
            OBJECTIVES.make(parts["objective"]),
            UPDATE_RULES.make(parts["rule"]),
        )

    def network_weights(self, carried: Sequence[Tensor], base: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """The weights that the network has where a state carries these, (…, out, in) each, on a base (heads,
        out, in) if any."""
        total = self.network.total(carried, base)
        return tuple(map(self.rule.network_weight, total)) if self.rule.maps_weights else total

    def step_normalizers(
        self,
        curvature: Tensor | float,
        slope_square: Tensor,
        input_squares: Sequence[Tensor],
        weight_squares: Sequence[Tensor],
    ) -> list[Tensor]:
        """What `rule.normalize_step` divides each layer's step size by: L · max(c_l, 1e-6), each (…, rows).

        c_l = c ρ² κ_l² max(‖h_{l-1}‖, floor)² bounds the curvature of the objective in W_l (without the
        second derivative of the network, as Gauss and Newton do), and κ_l² = ∏_{j>l} 1.13² (‖W_j‖_F² +
        out_j · floor²) the squared slope of the layers above; floor is `rule.length_floor`. All are
        multiplied by `rule.slope`.

        Args:
            curvature: c, the objective's bound in the answer, a number or (…, rows).
            slope_square: ρ², (…, rows).
            input_squares: ‖h_0‖² … ‖h_{L-1}‖², (…, rows) each.
            weight_squares: ‖W_2‖_F² … ‖W_L‖_F², (…, 1) each.
        """
        network, floor = self.network, self.rule.length_floor
        bound = curvature * self.rule.slope * slope_square
        normalizers = []
        for layer in reversed(range(network.depth)):
            bound_here = bound * input_squares[layer].clamp_min(floor**2)
            normalizers.append(network.depth * bound_here.clamp_min(STEP_NORMALIZER_FLOOR))
            if layer:
                added = network.weight_shapes[layer][0] * floor**2
                bound = bound * (ACTIVATION_SLOPE**2 * (weight_squares[layer - 1] + added))
        return normalizers[::-1]

    def step_normalizers_at(
        self,
        weights: Sequence[Tensor],
        keys: Tensor,
        values: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
    ) -> list[Tensor]:
        """`step_normalizers` of keys and values (…, rows, head_dim) at the network's weights (…, out, in), as
        (…, rows) per layer; gain and bias broadcast against the keys. After the values come the objective's
        inputs, if it takes any."""
        inputs, outputs = self.network.features(weights, keys)
        answers = self.network.finish(outputs[-1], keys, gain, bias)
        return self.step_normalizers(
            self.objective.curvature(answers, values),
            self.network.slope_square(outputs[-1], gain),
            [h.square().sum(-1) for h in inputs],
            [w.square().sum((-2, -1)).unsqueeze(-1) for w in weights[1:]],
        )
