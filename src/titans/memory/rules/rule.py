"""What an update rule is: how a gradient moves the weights, and what happens at a chunk's end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.decay import decay_products
from titans.memory.rules.coefficients import ChunkCoefficients, rounded
from titans.memory.state import MemoryState, Weights


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """What a token's gradient does to the weights, and what happens at the end of a chunk.

    This class is gradient descent with momentum and forgetting, equations 13 and 14; a rule derives from it
    and overrides what differs. A rule of another kind overrides two methods, which must agree: `step`, one
    token's update, for the reference; and `coefficients`, the same in closed form over a chunk, whose
    gradients are all known at its start, for the fast path.

    Args:
        normalize_step: divide each step size by a bound on the curvature of the objective (see
            `InnerProblem.step_normalizers`), which makes the step size a fraction of the largest safe one.
        length_floor: with `normalize_step`, the length below which inputs of a layer do not count as shorter,
            and which every row of the layers above has on top of its own: an empty memory has no slope, and a
            step divided by it has no bound.

    Raises:
        ValueError: for a `normalize_step` that is no bool, or a `length_floor` not finite and at least 0.
        TypeError: where a class that derives from it overrides one of `step` and `coefficients` alone.
    """

    # Tokens whose gradients a step takes: its own and those before it. A rule with more than one carries
    # these in `extra`, see `rules.window`, and is linear in the gradients.
    window = 1
    # Whether queries are answered by the weights with which the chunk began, see `memory_scan`.
    reads_anchor = False
    # Whether the fast weights may not be offsets, which begin at 0.
    needs_first_weights = False

    normalize_step: bool = False
    length_floor: float = 0.0

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if ("step" in vars(cls)) is not ("coefficients" in vars(cls)):
            raise TypeError(
                f"{cls.__name__} defines one of step and coefficients: define both, which must agree"
            )

    def __post_init__(self) -> None:
        if type(self.normalize_step) is not bool:
            raise ValueError(f"normalize_step={self.normalize_step!r}: give True or False")
        if not 0 <= self.length_floor < math.inf:
            raise ValueError(f"length_floor={self.length_floor!r}: give a finite number of at least 0")

    def extra_shapes(self, weight_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
        """Shapes, for one head, of the tensors that the rule carries from chunk to chunk in addition to
        weights and momentum: `state.extra`, (batch, heads, *shape) each."""
        return ()

    def fresh_extra(self, weights: Weights) -> tuple[Tensor, ...]:
        """What they are where nothing has been read, with these weights (…, out, in): zeros."""
        leading = weights[0].shape[:-2]
        shapes = self.extra_shapes([(w.shape[-2], w.shape[-1]) for w in weights])
        return tuple(weights[0].new_zeros(*leading, *shape) for shape in shapes)

    def network_weight(self, carried: Tensor) -> Tensor:
        """What the network has as weight of a layer where the state carries this, the base included; both are
        (…, out, in). Here the same. A rule that overrides it has its recurrence in other numbers than the
        weights, such as their logarithms: gradients are still those in the weights, and every token reads
        with the weights that belong to what is carried after it.
        """
        return carried

    @property
    def maps_weights(self) -> bool:
        """Whether `network_weight` is another function than the identity."""
        return type(self).network_weight is not UpdateRule.network_weight

    @property
    def slope(self) -> float:
        """A bound on the slope of `network_weight`, by which normalised steps are divided too."""
        return 1.0

    def step(
        self,
        weight: Tensor,
        momentum: Tensor,
        gradient: Tensor,
        forget: Tensor,
        momentum_gate: Tensor,
        step_size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One token's new weight and momentum of one layer, (…, out, in) each; the gates, α, η and θ of the
        paper, broadcast against them: they are (…, 1, 1), or α is (…, out, 1)."""
        momentum = momentum_gate * momentum - step_size * gradient  # (14)
        weight = (1 - forget) * weight + momentum  # (13)
        return weight, momentum

    def end(self, state: MemoryState) -> MemoryState:
        """The state as a finished chunk leaves it; here, unchanged. This is the place of what is not linear
        in the gradients. It closes a chunk that is still open, too, where a new text begins.

        The reference calls it at every token and discards most results: change no tensor in place, and keep
        nothing on the rule itself. Leading dimensions are any number of rows, which must not depend on each
        other: index from the right. Autograd must be able to follow.

        Args:
            state: after the chunk's last token; its position is not available everywhere, so a rule that
                counts does so in `extra`. `state.anchor` are the weights with which the chunk began; those
                returned are the next chunk's anchor.

        Returns:
            The state with tensors of the same shapes.
        """
        return state

    def coefficients(
        self, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
    ) -> ChunkCoefficients:
        """`step` over a chunk: its gates (…, time), and which tokens are written at all (None: every one).

        Leading dimensions broadcast: where a layer's rows forget differently, those of `forget` have one more
        that is not 1.
        """
        # In double precision, because 1 − alpha loses a slow gate's alpha in float32; the tensors are tiny.
        dtype = step_size.dtype
        retain, carry = 1 - forget.double(), momentum.double()
        if written is not None:
            retain, carry = torch.where(written, retain, 1), torch.where(written, carry, 1)
            step_size = torch.where(written, step_size, 0)
        # A leading gate stands for the state at the chunk's start: column 0 of the products.
        weight_decay = decay_products(F.pad(retain, (1, 0), value=1.0))
        momentum_decay = decay_products(F.pad(carry, (1, 0), value=1.0))
        deposits = weight_decay[..., 1:, 1:]
        if written is not None:
            # M ← M + S moves M even when every gate is 0, so an unwritten token must deposit nothing.
            deposits = deposits * written.unsqueeze(-2)
        moved = deposits @ momentum_decay[..., 1:, :]
        kept, moved, momentum_end = (
            weight_decay[..., 1:, :1],
            rounded(moved, dtype),
            rounded(momentum_decay[..., -1:, :], dtype),
        )
        read_steps = moved[..., 1:] * step_size.unsqueeze(-2)
        return ChunkCoefficients(
            read_weights=kept.to(dtype),
            read_momentum=moved[..., :1],
            read_steps=read_steps,
            end_weights=(kept[..., -1:, :] - 1).to(dtype),
            end_momentum=moved[..., -1:, :1],
            end_steps=read_steps[..., -1, :].unsqueeze(-1),
            momentum_momentum=momentum_end[..., :1],
            momentum_steps=(momentum_end[..., 0, 1:] * step_size).unsqueeze(-1),
        )


def ended(rule: UpdateRule, state: MemoryState) -> MemoryState:
    """`rule.end(state)`, its weights being the next chunk's anchor.

    Raises:
        TypeError: where the rule returns no state.
        ValueError: where it returns tensors of other shapes; names the first.
    """
    after = rule.end(state)
    if not isinstance(after, MemoryState):
        raise TypeError(f"{type(rule).__name__}.end returned {after!r}: return a MemoryState")
    for part in ("weights", "momentum", "extra"):
        given, found = ([tuple(x.shape) for x in getattr(s, part)] for s in (state, after))
        if given != found:
            raise ValueError(
                f"{type(rule).__name__}.end returned state.{part} of shapes {found}: return {given}, as given"
            )
    return replace(after, anchor=after.weights)
