"""Update rules: how surprise moves the weights. Each is stated twice, per token and summed over a chunk."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.decay import decay_products


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


class UpdateRule(Protocol):
    """One token's update, and the same rule in closed form over a chunk whose gradients are known up
    front."""

    def step(
        self,
        weight: Tensor,
        state: Tensor,
        gradient: Tensor,
        forget: Tensor,
        momentum: Tensor,
        step_size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """New (weight, momentum state) of one layer; the gates broadcast against the weight."""
        ...

    def coefficients(
        self, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
    ) -> ChunkCoefficients:
        """Gates (…, time) of a chunk, and which tokens are written at all (None: every one)."""
        ...


def _rounded(products: Tensor, dtype: torch.dtype) -> Tensor:
    """The products in the compute dtype, those that vanish beside 1 as zeros: as denormal numbers they would
    make matrix products ten times slower."""
    limits = torch.finfo(dtype)
    vanishing = torch.where(products < limits.tiny / limits.eps**2, products, 0)
    # Subtracted, because a product that is 0 has a gradient.
    return (products - vanishing.detach()).to(dtype)


class MomentumRule:
    """Gradient descent with momentum and forgetting: equations 13 and 14."""

    def step(
        self,
        weight: Tensor,
        state: Tensor,
        gradient: Tensor,
        forget: Tensor,
        momentum: Tensor,
        step_size: Tensor,
    ) -> tuple[Tensor, Tensor]:
        state = momentum * state - step_size * gradient
        return (1 - forget) * weight + state, state

    def coefficients(
        self, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
    ) -> ChunkCoefficients:
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


# Tokens in a block of `end_coefficients`: as much in tables of a block as in passing from block to block.
_BLOCK = 32


def end_coefficients(
    rule: UpdateRule, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
) -> EndCoefficients:
    """The state after a chunk of any length, without the table of (time, time) that reads within it take.

    The chunk is cut into blocks; what a block wrote passes through those behind it, which is linear.
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
    # The blocks behind, as one: W ← W + later_change W + later_moved S, S ← later_carried S.
    later_change = later_moved = torch.zeros_like(change[..., -1, :, :])
    later_carried = torch.ones_like(later_change)
    behind = []
    for index in reversed(range(change.shape[-3])):
        behind.append((later_change, later_moved, later_carried))
        a, c, e = (x[..., index, :, :] for x in (change, moved, carried))
        later_change, later_moved, later_carried = (
            later_change + a + later_change * a,
            c + later_change * c + later_moved * e,
            later_carried * e,
        )
    change_behind, moved_behind, carried_behind = (
        torch.stack(each[::-1], -3) for each in zip(*behind, strict=True)
    )
    end_steps = steps + change_behind * steps + moved_behind * momentum_steps
    return EndCoefficients(
        end_weights=later_change.to(dtype),
        end_momentum=_rounded(later_moved, dtype),
        end_steps=_rounded(end_steps, dtype).flatten(-3, -2)[..., :time, :],
        momentum_momentum=_rounded(later_carried, dtype),
        momentum_steps=_rounded(carried_behind * momentum_steps, dtype).flatten(-3, -2)[..., :time, :],
    )


UPDATE_RULES: dict[str, UpdateRule] = {"momentum": MomentumRule()}
