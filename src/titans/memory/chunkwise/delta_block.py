"""One block of tokens of the delta rule: what they determine without the state, and what happens inside.

With chunk_size=1 every token's gradient is taken at the weights just before it. For one matrix and the
squared error it is 2 e_t k_tᵀ with e_t = W_{t−1} k_t − v_t, and W_{t−1} is linear in the state at the block's
start and in the errors before t (`rules.ChunkCoefficients`). So the errors of a block solve

    e_t + Σ_{j<t} steps[t−1, j] (k_j · k_t) e_j = (W_{t−1} k_t without what the block has written) − v_t,

a unit lower triangular system, and nothing weight-sized exists per token. Derivation: docs/how/schedules.md.
This is the gated delta rule (arXiv 2412.06464), whose blocks are computed so in arXiv 2406.06484,
with momentum.

Shapes: rows = batch · heads; tokens (rows, width, features) with any leading dimensions; weights (rows, out,
in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.chunkwise.groups import Marks, Tokens, coefficients_of
from titans.memory.inner import InnerProblem
from titans.memory.state import MemoryState


class Tables(NamedTuple):
    """What a block's tokens determine without the state; leading dimensions … are any.

    Token t meets the weights before_weights W + before_momentum S − Σ_j …, with W and S of the block's start,
    and its query those at weights and momentum.
    """

    before_weights: Tensor  # (…, width, 1)
    before_momentum: Tensor
    system: Tensor  # (…, width, width), below its unit diagonal
    weights: Tensor  # (…, width, 1)
    momentum: Tensor
    mixing: Tensor  # (…, width, width): reads − mixing · errors
    end_weights: Tensor  # (…, 1, 1), and so on: as in `ChunkCoefficients`
    end_momentum: Tensor
    end_steps: Tensor  # (…, width, 1)
    momentum_momentum: Tensor
    momentum_steps: Tensor

    def at(self, block: int) -> Tables:
        return Tables(*(x[block] for x in self))


class Found(NamedTuple):
    """Of a block: reads, errors, and what the errors add to weights and momentum, each (…, width, out)."""

    reads: Tensor
    errors: Tensor
    to_weights: Tensor
    to_momentum: Tensor


class Plan(NamedTuple):
    """What one scan is in addition to its tensors.

    read_before: a query is answered with the weights before its token's write. moving: some token carries
    momentum on; without, only the last token of a row determines the momentum. ends: for each block, whether
    some row's momentum is needed after it.
    """

    read_before: bool
    moving: bool
    ends: list[bool]

    def of(self, blocks: slice) -> Plan:
        return self._replace(ends=self.ends[blocks])


def plan_of(read_before: bool, tokens: Tokens, marks: Marks) -> Plan:
    """What the tokens of a scan need: momentum that no token carries on is not computed."""
    blocks = tokens.keys.shape[0]
    gates = tokens.momentum
    # On an accelerator, looking at values would stop the stream.
    if gates.device.type != "cpu" or (torch.is_grad_enabled() and gates.requires_grad) or gates.any():
        return Plan(read_before, True, [True] * blocks)
    if marks.filled is None:
        return Plan(read_before, False, [False] * (blocks - 1) + [True])
    written = marks.filled.any(-1)
    later = written.flip(0).cummax(0).values.flip(0)
    return Plan(read_before, False, [*(~later[1:]).any(1).tolist(), True])


def _shifted(x: Tensor, first: float) -> Tensor:
    """What token t − 1 has, for token t: rows one further down, below a row of `first`."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


def tables_of(plan: Plan, inner: InnerProblem, tokens: Tokens, marks: Marks) -> Tables:
    """Of any number of blocks, tokens (…, width, features)."""
    queries, keys = tokens.queries, tokens.keys
    # The gradient is 2 e kᵀ, and the factor belongs to the step as a normalizer does.
    scale: Tensor | float = 2.0
    if inner.rule.normalize_step:
        squares = keys.square().sum(-1)
        scale = 2 / inner.step_normalizers(2.0, torch.ones_like(squares), [squares], [])[0].unsqueeze(1)
    coefficients = coefficients_of(inner, tokens._replace(step_size=tokens.step_size * scale), marks)
    c = type(coefficients)(*(x.squeeze(1) for x in coefficients))
    before = (
        _shifted(c.read_weights, 1.0),
        _shifted(c.read_momentum, 0.0),
        _shifted(c.read_steps, 0.0),
    )
    now = before if plan.read_before else (c.read_weights, c.read_momentum, c.read_steps)
    return Tables(
        before[0],
        before[1],
        before[2] * (keys @ keys.mT),
        now[0],
        now[1],
        now[2] * (queries @ keys.mT),
        *c[3:],
    )


def inside_block(tables: Tables, values: Tensor, by_weights: Tensor, by_momentum: Tensor | None) -> Found:
    """What happens inside a block, given the products of its keys and queries (…, 2 · width, in) with the
    weights and the momentum it begins with."""
    width = values.shape[-2]
    errors = tables.before_weights * by_weights[..., :width, :] - values
    reads = tables.weights * by_weights[..., width:, :]
    if by_momentum is not None:
        errors = errors + tables.before_momentum * by_momentum[..., :width, :]
        reads = reads + tables.momentum * by_momentum[..., width:, :]
    if width > 1:
        errors = torch.linalg.solve_triangular(tables.system, errors, upper=False, unitriangular=True)
    reads = reads - tables.mixing @ errors
    return Found(reads, errors, tables.end_steps * errors, tables.momentum_steps * errors)


def after_block(
    plan: Plan, block: int, tables: Tables, found: Found, keys: Tensor, state: MemoryState
) -> MemoryState:
    """The state after a block; tables and tokens are those of the block."""
    (weight,), (moment,) = state.weights, state.momentum
    moved = torch.addcmul(weight, weight, tables.end_weights)
    if plan.moving:
        moved.addcmul_(moment, tables.end_momentum)
    moved.baddbmm_(found.to_weights.mT, keys, alpha=-1)
    if plan.ends[block]:
        moment = (moment * tables.momentum_momentum).baddbmm_(found.to_momentum.mT, keys, alpha=-1)
    return MemoryState((moved,), (moment,))


def ends_of(tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """What `after_block` multiplies the state with."""
    return tables.end_weights, tables.end_momentum, tables.momentum_momentum
