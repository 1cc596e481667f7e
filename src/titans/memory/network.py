"""The fast network of one memory head: its shape, its forward pass, and what keeps its inner steps
bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.objectives import OBJECTIVES
from titans.memory.rules import UPDATE_RULES

NORM_EPS = 1e-5
STEP_NORMALIZER_FLOOR = 1e-6
# The largest slope of both activations lies just under this (GELU 1.1289, SiLU 1.0998).
ACTIVATION_SLOPE = 1.13

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))


# grad · activation'(x), and differentiable, which the outer gradient needs (torch's own silu_backward is
# not).
ACTIVATION_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "silu": _silu_backward,
}


@dataclass(frozen=True)
class MemoryNetwork:
    """The inner problem of one head: which network is trained at test time, on what, and by which rule.

    With weights W_1 … W_L, each (out, in), h_0 = x and h_l = activation(W_l h_{l-1}),
    the network is f(x) = W_L h_{L-1}; then LayerNorm(f) · gain + bias if `norm`; then + x if `residual`.

    Args:
        head_dim: width of keys, queries and values of one head.
        depth: number of weight matrices; 1 is a linear memory.
        expansion: hidden width divided by `head_dim` (no hidden layer at depth 1).
        activation: "gelu" (exact, erf) or "silu".
        residual: add the input to the output.
        norm: LayerNorm on the output, its gain and bias being slow weights.
        normalize_step: divide each step size by a bound on the curvature of the inner objective (see
            `step_normalizers`), which makes the step size a fraction of the largest safe one.
        length_floor: with `normalize_step`, the length below which inputs of a layer do not count as shorter,
            and which every row of the layers above has on top of its own: an empty memory has no slope, and a
            step divided by it has no bound.
        unit_rows: at each chunk end rescale the rows of every matrix to L2 norm 1 (without `norm`: only
            longer ones).
        row_limit: at each chunk end shorten the rows that are longer than this to it; None for no limit.
        objective: name in `titans.memory.objectives.OBJECTIVES`.
        update_rule: name in `titans.memory.rules.UPDATE_RULES`.

    Raises:
        ValueError: for a value outside the domains above.

    Source: section 3.1 of the paper; residual and LayerNorm from the camera-ready's default memory.
    """

    head_dim: int = 64
    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    norm: bool = True
    normalize_step: bool = False
    unit_rows: bool = False
    row_limit: float | None = None
    length_floor: float = 0.0
    objective: str = "squared_error"
    update_rule: str = "momentum"

    def __post_init__(self) -> None:
        for name in ("head_dim", "depth", "expansion"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
        if not 0 <= self.length_floor < math.inf:
            raise ValueError(f"length_floor={self.length_floor!r}: give a finite number of at least 0")
        if self.row_limit is not None and not 0 < self.row_limit < math.inf:
            raise ValueError(f"row_limit={self.row_limit!r}: give None or a finite number above 0")
        if self.row_limit is not None and self.unit_rows:
            raise ValueError("unit_rows=True leaves row_limit nothing to do: give one of the two")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r}: choose one of {sorted(ACTIVATIONS)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}: choose one of {sorted(OBJECTIVES)}")
        if self.update_rule not in UPDATE_RULES:
            raise ValueError(f"update_rule={self.update_rule!r}: choose one of {sorted(UPDATE_RULES)}")

    @property
    def weight_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of W_1 … W_L."""
        widths = [self.head_dim] + [self.expansion * self.head_dim] * (self.depth - 1) + [self.head_dim]
        return tuple((out, inp) for inp, out in pairwise(widths))

    def total(self, fast: Sequence[Tensor], base: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        """The weights the network is run with: the fast ones, on top of slow ones (heads, out, in) if any."""
        return tuple(fast) if base is None else tuple(w + b for w, b in zip(fast, base, strict=True))

    def features(self, weights: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs h_0 … h_{L-1} and outputs W_l h_{l-1} of every layer; x (…, rows, head_dim), W (…, out,
        in)."""
        inputs, outputs = [x], []
        for weight in weights:
            outputs.append(inputs[-1] @ weight.mT)
            inputs.append(ACTIVATIONS[self.activation](outputs[-1]))
        return inputs[:-1], outputs

    def finish(self, features: Tensor, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """M(x) from f(x): LayerNorm and residual; gain and bias broadcast against x."""
        out = features
        if self.norm:
            out = F.layer_norm(out, (self.head_dim,), eps=NORM_EPS)
            out = out if gain is None else out * gain
            out = out if bias is None else out + bias
        return out + x if self.residual else out

    def __call__(
        self, weights: Sequence[Tensor], x: Tensor, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """M(x; weights): x (…, rows, head_dim), weights (…, out, in), gain and bias broadcast against x."""
        return self.finish(self.features(weights, x)[1][-1], x, gain, bias)

    def slope_square(self, features: Tensor, gain: Tensor | None) -> Tensor:
        """ρ² = (max|gain| · rsqrt(var f + ε))², the squared slope of the norm; f (…, rows, head_dim) to (…,
        rows)."""
        if not self.norm:
            return features.new_ones(features.shape[:-1])
        square = 1 / (features.var(-1, correction=0) + NORM_EPS)
        return square if gain is None else square * gain.abs().amax(-1).square()

    def step_normalizers(
        self, slope_square: Tensor, input_squares: Sequence[Tensor], weight_squares: Sequence[Tensor]
    ) -> list[Tensor]:
        """What `normalize_step` divides each layer's step size by: L · max(c_l, 1e-6), each (…, rows).

        c_l = 2 ρ² κ_l² max(‖h_{l-1}‖, floor)² bounds the curvature of ‖M(k) − v‖² in W_l, and
        κ_l² = ∏_{j>l} 1.13² (‖W_j‖_F² + out_j · floor²) the squared slope of the layers above; floor is
        `length_floor`.

        Args:
            slope_square: ρ², (…, rows).
            input_squares: ‖h_0‖² … ‖h_{L-1}‖², (…, rows) each.
            weight_squares: ‖W_2‖_F² … ‖W_L‖_F², (…, 1) each.
        """
        bound = 2 * slope_square
        normalizers = []
        for layer in reversed(range(self.depth)):
            curvature = bound * input_squares[layer].clamp_min(self.length_floor**2)
            normalizers.append(self.depth * curvature.clamp_min(STEP_NORMALIZER_FLOOR))
            if layer:
                floor = self.weight_shapes[layer][0] * self.length_floor**2
                bound = bound * (ACTIVATION_SLOPE**2 * (weight_squares[layer - 1] + floor))
        return normalizers[::-1]

    def step_normalizers_at(
        self, weights: Sequence[Tensor], keys: Tensor, gain: Tensor | None
    ) -> list[Tensor]:
        """`step_normalizers` of keys (…, rows, head_dim) at weights (…, out, in): (…, rows) per layer."""
        inputs, outputs = self.features(weights, keys)
        return self.step_normalizers(
            self.slope_square(outputs[-1], gain),
            [h.square().sum(-1) for h in inputs],
            [w.square().sum((-2, -1)).unsqueeze(-1) for w in weights[1:]],
        )

    def settle(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The weights as a finished chunk leaves them: rows rescaled by `unit_rows` or `row_limit`."""
        if not self._rescales:
            return tuple(weights)
        return tuple(weight * self._row_scales(weight)[0] for weight in weights)

    def settle_backward(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients with respect to the arguments of `settle` from those of its results."""
        if not self._rescales:
            return list(grads)
        before = []
        for weight, grad in zip(weights, grads, strict=True):
            scale, rescaled = self._row_scales(weight)
            along = (weight * grad).sum(-1, keepdim=True) * scale**3 / self._radius**2
            before.append((grad * scale).addcmul_(weight, torch.where(rescaled, along, 0), value=-1))
        return before

    def _row_scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What each row is multiplied by when a chunk ends, and whether it is rescaled at all: (…, out,
        1)."""
        length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        # A row of zeros stays; the inner where keeps its gradient finite.
        always = self.unit_rows and self.norm
        rescaled = length > (0 if always else self._radius)
        return torch.where(rescaled, self._radius / torch.where(rescaled, length, 1), 1), rescaled

    @property
    def _rescales(self) -> bool:
        return self.unit_rows or self.row_limit is not None

    @property
    def _radius(self) -> float:
        return 1.0 if self.row_limit is None else self.row_limit
