"""Update rules: how a gradient moves the weights, summed over a chunk, and what happens at a chunk's end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.decay import decay_products
from titans.memory.registry import Registry
from titans.memory.state import MemoryState, Weights


class ChunkCoefficients(NamedTuple):
    """The weights after token t of a chunk, and the state after its last token, as sums over the chunk.

    With W, S at the chunk's first token and u_j the gradient of token j (leading dimensions … shared):
      W_t   = read_weights_t W + read_momentum_t S − Σ_j read_steps[t, j] u_j
      W_end = W + end_weights W + end_momentum S − Σ_j end_steps_j u_j
      S_end = momentum_momentum S − Σ_j momentum_steps_j u_j
    """

    read_weights: Tensor  # (…, time, 1)
    read_momentum: Tensor  # (…, time, 1)
    read_steps: Tensor  # (…, time, time)
    end_weights: (
        Tensor  # (…, 1, 1), the change: half-lives of 10⁶ tokens would be 4 % off as a float32 factor
    )
    end_momentum: Tensor  # (…, 1, 1)
    end_steps: Tensor  # (…, time, 1)
    momentum_momentum: Tensor  # (…, 1, 1)
    momentum_steps: Tensor  # (…, time, 1)


class EndCoefficients(NamedTuple):
    """Of `ChunkCoefficients` what the state after the chunk takes, and what tokens read does not."""

    end_weights: Tensor  # (…, 1, 1)
    end_momentum: Tensor  # (…, 1, 1)
    end_steps: Tensor  # (…, time, 1)
    momentum_momentum: Tensor  # (…, 1, 1)
    momentum_steps: Tensor  # (…, time, 1)


def _rounded(products: Tensor, dtype: torch.dtype) -> Tensor:
    """The products in the compute dtype, those that vanish compared with 1 as zeros: as denormal numbers they
    would make matrix products ten times slower."""
    limits = torch.finfo(dtype)
    vanishing = torch.where(products < limits.tiny / limits.eps**2, products, 0)
    # Subtracted, because a product that is 0 has a gradient.
    return (products - vanishing.detach()).to(dtype)


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
        """Shapes, for one head, of the tensors that the rule carries from chunk to chunk besides weights and
        momentum: `state.extra`, (batch, heads, *shape) each."""
        return ()

    def fresh_extra(self, weights: Weights) -> tuple[Tensor, ...]:
        """What they are where nothing has been read, with these weights (…, out, in): zeros."""
        leading = weights[0].shape[:-2]
        shapes = self.extra_shapes([(w.shape[-2], w.shape[-1]) for w in weights])
        return tuple(weights[0].new_zeros(*leading, *shape) for shape in shapes)

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
        paper, broadcast against them."""
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
        """`step` over a chunk: its gates (…, time), and which tokens are written at all (None: every one)."""
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
            _rounded(moved, dtype),
            _rounded(momentum_decay[..., -1:, :], dtype),
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


@dataclass(frozen=True, kw_only=True)
class MomentumRule(UpdateRule):
    """Gradient descent with momentum and forgetting, and, at each chunk's end, rows of limited length.

    Args:
        normalize_step, length_floor: see `UpdateRule`.
        row_limit: at each chunk end shorten the rows that are longer than this to it; None for no limit.

    Raises:
        ValueError: for a `row_limit` that is not above 0 and finite.
    """

    row_limit: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_limit is not None and not 0 < self.row_limit < math.inf:
            raise ValueError(f"row_limit={self.row_limit!r}: give None or a finite number above 0")

    def end(self, state: MemoryState) -> MemoryState:
        if self.row_limit is None:
            return state
        return replace(state, weights=tuple(shorten_rows(w, self.row_limit) for w in state.weights))

    def end_backward(self, written: MemoryState, grads: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """`chunkwise.groups.end_backward` by hand, for the `end` of this class and no other."""
        weights, momentum, extra = grads
        if self.row_limit is not None:
            pairs = zip(written.weights, weights, strict=True)
            weights = [shorten_rows_backward(w, self.row_limit, grad) for w, grad in pairs]
        return [weights, momentum, extra, []]


def shorten_rows(weight: Tensor, longest: float) -> Tensor:
    """weight (…, out, in), its rows longer than `longest` shortened to that."""
    return weight * _row_scales(weight, longest)[0]


def shorten_rows_backward(weight: Tensor, longest: float, grad: Tensor) -> Tensor:
    """The gradient of `shorten_rows` in the weight; autograd would take three times as long."""
    scale, long = _row_scales(weight, longest)
    along = (weight * grad).sum(-1, keepdim=True) * scale**3 / longest**2
    return (grad * scale).addcmul_(weight, torch.where(long, along, 0), value=-1)


def _row_scales(weight: Tensor, longest: float) -> tuple[Tensor, Tensor]:
    """What each row is multiplied by, and whether it is shortened: (…, out, 1)."""
    length = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    # A row of zeros has no slope: the inner where keeps its gradient finite.
    long = length > longest
    return torch.where(long, longest / torch.where(long, length, 1), 1), long


# Tokens in a block of `end_coefficients`: as much in tables of a block as in passing from block to block.
_BLOCK = 32


def end_coefficients(
    rule: UpdateRule, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
) -> EndCoefficients:
    """The state after a chunk of any length, without the table of (time, time) that reads within it take.

    The chunk is cut into blocks; what a block wrote passes through the later ones, which is linear.
    Arguments as of `UpdateRule.coefficients`.
    """
    time, dtype = step_size.shape[-1], step_size.dtype
    width = min(time, _BLOCK)
    missing = -time % width
    if missing and written is None:
        written = torch.ones_like(step_size, dtype=torch.bool)

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).unflatten(-1, (-1, width))

    block = rule.coefficients(
        blocks(forget),
        blocks(momentum),
        blocks(step_size),
        None if written is None else blocks(written),
    )
    # In double precision until the end: products of many small numbers, which then vanish together.
    change, moved, carried, steps, momentum_steps = (
        x.double()
        for x in (
            block.end_weights,
            block.end_momentum,
            block.momentum_momentum,
            block.end_steps,
            block.momentum_steps,
        )
    )
    # The later blocks, as one: W ← W + later_change W + later_moved S, S ← later_carried S.
    later_change = later_moved = torch.zeros_like(change[..., -1, :, :])
    later_carried = torch.ones_like(later_change)
    later = []
    for index in reversed(range(change.shape[-3])):
        later.append((later_change, later_moved, later_carried))
        a, c, e = (x[..., index, :, :] for x in (change, moved, carried))
        later_change, later_moved, later_carried = (
            later_change + a + later_change * a,
            c + later_change * c + later_moved * e,
            later_carried * e,
        )
    change_after, moved_after, carried_after = (
        torch.stack(each[::-1], -3) for each in zip(*later, strict=True)
    )
    end_steps = steps + change_after * steps + moved_after * momentum_steps
    return EndCoefficients(
        end_weights=later_change.to(dtype),
        end_momentum=_rounded(later_moved, dtype),
        end_steps=_rounded(end_steps, dtype).flatten(-3, -2)[..., :time, :],
        momentum_momentum=_rounded(later_carried, dtype),
        momentum_steps=_rounded(carried_after * momentum_steps, dtype).flatten(-3, -2)[..., :time, :],
    )


UPDATE_RULES: Registry[UpdateRule] = Registry("rule", ("step", "coefficients", "end"), momentum=MomentumRule)
