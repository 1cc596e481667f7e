"""The oracle: one token at a time, the inner gradient by autograd. Slow; to be read along with the
paper."""

from __future__ import annotations

import torch
from torch import Tensor

from titans.memory.problem import ScanProblem
from titans.memory.rules import ended
from titans.memory.rules.window import Window
from titans.memory.state import MemoryState
from titans.state import where_rows


def reference_scan(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    inner, state = problem.inner, problem.state
    net, objective, rule = inner.network, inner.objective, inner.rule
    gain, bias, base = problem.gain, problem.bias, problem.base
    batch, time, heads, _ = problem.keys.shape
    # By layer.
    gates = (
        problem.forget.split(problem.forget_sizes, -1),
        *(x.split(1, -1) for x in (problem.momentum, problem.step_size)),
    )
    everywhere = torch.ones(batch, dtype=torch.bool, device=problem.keys.device)

    def inner_loss(weights: tuple[Tensor, ...], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        losses = objective.value(net(weights, key, gain, bias), value)
        # The sum over sequences and heads: each has its own weights, so each gets its own gradient.
        return losses.sum(), losses

    def window_gradients(anchor: tuple[Tensor, ...], seen: Window) -> list[Tensor]:
        # The mean over a window's tokens, all at the weights this chunk started from, of θ ∇ℓ.
        total = [torch.zeros_like(w) for w in anchor]
        for i in range(rule.window):
            key, value, theta = (x[:, :, i : i + 1] for x in seen)
            gradients, _ = torch.func.grad(inner_loss, has_aux=True)(anchor, key, value)
            steps = [theta[..., layer, None] for layer in range(net.depth)]
            if rule.normalize_step:
                bounds = inner.step_normalizers_at(anchor, key, value, gain, bias)
                steps = [step / bound.unsqueeze(-1) for step, bound in zip(steps, bounds, strict=True)]
            total = [sum_ + step * g for sum_, step, g in zip(total, steps, gradients, strict=True)]
        return [sum_ / rule.window for sum_ in total]

    reads, surprises = [], []
    for t in range(time):
        real = everywhere if problem.mask is None else problem.mask[:, t]
        if problem.reset is not None:
            state = where_rows(problem.reset[:, t], problem.fresh_state(), state)

        def token(x: Tensor, t: int = t, real: Tensor = real) -> Tensor:
            return torch.where(real[:, None, None], x[:, t], 0).unsqueeze(2)

        query, key, value = token(problem.queries), token(problem.keys), token(problem.values)

        # (12): the gradient of the loss at the weights this chunk started from.
        anchor = inner.network_weights(state.anchor, base)
        gradients, surprise = torch.func.grad(inner_loss, has_aux=True)(anchor, key, value)
        normalizers: list[Tensor | float] = [1.0] * net.depth
        if rule.normalize_step:
            bounds = inner.step_normalizers_at(anchor, key, value, gain, bias)
            normalizers = [bound.unsqueeze(-1) for bound in bounds]
        extra = state.extra
        if rule.window > 1:
            thetas = torch.where(real[:, None, None], problem.step_size[:, t], 0).unsqueeze(2)
            seen = Window(*extra[:3]).followed_by(Window(key, value, thetas))
            gradients = window_gradients(anchor, seen)
            extra = (*seen.newest(rule.window - 1), *extra[3:])

        weights, momentum = [], []
        for layer in range(net.depth):
            # (batch, heads, 1, 1), or of forgetting one number for each row of the weights.
            alpha, eta, theta = (
                torch.where(real[:, None, None], gate[layer][:, t], 0).unsqueeze(-1) for gate in gates
            )
            # The rule's step; that of `UpdateRule` is
            #   S_t = η S_{t−1} − θ ∇ℓ       (14)
            #   W_t = (1 − α) W_{t−1} + S_t  (13)
            weight, moment = rule.step(
                state.weights[layer],
                state.momentum[layer],
                gradients[layer],
                alpha,
                eta,
                theta / normalizers[layer] if rule.window == 1 else torch.ones_like(theta),
            )
            weights.append(weight)
            momentum.append(moment)

        # (15): read with the weights just written, or with those of (12).
        knowing = anchor if problem.read_anchor else inner.network_weights(weights, base)
        read = net(knowing, query, gain, bias).squeeze(2)
        reads.append(torch.where(real[:, None, None], read, 0))
        surprises.append(torch.where(real[:, None], surprise.squeeze(-1), 0))

        written = MemoryState(tuple(weights), tuple(momentum), state.anchor, state.position + 1, extra)
        closed = ended(rule, written)
        chunk_ends = written.position % problem.chunk_size == 0
        state = where_rows(real, where_rows(chunk_ends, closed, written), state)

    if not time:
        return problem.no_reads(), state, problem.keys.new_zeros(batch, 0, heads)
    return torch.stack(reads, 1), state, torch.stack(surprises, 1).detach()
