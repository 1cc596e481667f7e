"""A memory layer of one row, token by token: the equations, their inner gradient by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from titans.memory import MemoryState
from titans.nn.memory.learner import Learner

from .naive import conv


class Oracle:
    """One memory of one row: equations (12) to (15), the inner gradient by autograd."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.count = learner, 0
        start = [w.clone() for w in learner.initial_weights]
        self.base = start if learner.form.decay_to_initial else [torch.zeros_like(w) for w in start]
        self.weights = [w - b for w, b in zip(start, self.base, strict=True)]
        self.momentum = [torch.zeros_like(w) for w in start]
        self.anchor = self.weights

    def answer(self, fast, vector):
        """M(vector) of every head, (heads, head_dim)."""
        total = [w + b for w, b in zip(fast, self.base, strict=True)]
        affine = (
            None if p is None else p[:, None] for p in (self.learner.norm_weight, self.learner.norm_bias)
        )
        return self.learner.network(total, vector[:, None], *affine)[:, 0]

    def prior(self, vector):
        return self.answer([0] * len(self.base), vector)

    def write(self, x, key, value, unit_key):
        learner, net = self.learner, self.learner.network
        at = [w if w.requires_grad else w.clone().requires_grad_() for w in self.anchor]
        surprise = torch.autograd.grad((self.answer(at, key) - value).square().sum(), at, create_graph=True)
        scaled = unit_key * net.head_dim**0.5
        logits = (learner.gate_weight @ x).view(3, learner.num_heads, net.depth) + learner.gate_bias
        if learner.gate_key_weight is not None:
            logits = logits + (learner.gate_key_weight @ scaled[None, :, :, None])[..., 0]
        if learner.gate_up_weight is not None:
            hidden = F.silu(learner.gate_up_weight @ torch.cat([x, scaled.flatten()]))
            logits = logits + (learner.gate_down_weight @ hidden).view(logits.shape)
        alpha = 1 - torch.exp(-F.softplus(logits[0]))
        eta = learner.form.max_momentum * torch.sigmoid(logits[1])
        theta = learner.max_step_size * torch.sigmoid(logits[2])
        if learner.inner.rule.normalize_step:
            total = [w + b for w, b in zip(at, self.base, strict=True)]
            affine = (None if p is None else p[:, None] for p in (learner.norm_weight, learner.norm_bias))
            normalizers = learner.inner.step_normalizers_at(total, key[:, None], value[:, None], *affine)
            theta = theta / torch.cat(normalizers, 1)
        for n in range(net.depth):
            a, e, step = (gate[:, n, None, None] for gate in (alpha, eta, theta))
            self.momentum[n] = e * self.momentum[n] - step * surprise[n]
        self.weights = [
            (1 - alpha[:, n, None, None]) * w + self.momentum[n] for n, w in enumerate(self.weights)
        ]
        self.count += 1
        if self.count % learner.chunk_size == 0:
            written = MemoryState(tuple(self.weights), tuple(self.momentum))
            self.weights = self.anchor = list(learner.inner.rule.end(written).weights)


def vectors(layer, x, reset):
    """Queries, keys and values (tokens, heads, head_dim), and the gate on the answers, of a row (tokens,
    hidden_size)."""
    heads, dim = layer.num_heads, layer.network.head_dim
    projected = F.linear(x, layer.input.weight)
    filtered, _ = conv(projected[:, : 3 * heads * dim], layer.conv.weight, reset)
    q, k, v = F.silu(filtered).view(len(x), 3, heads, dim).unbind(1)
    v = v * (dim**0.5 / v.norm(dim=-1, keepdim=True)).clamp(max=1)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, F.silu(projected[:, 3 * heads * dim :])


def rms(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def output(layer, read, prior, gate):
    """What the layer makes of one token's read, and of the answer of a memory that has read nothing."""
    norm = layer.read_norm
    if norm.prior is None:
        y = rms(read, norm.taught)
    else:
        y = rms(read - prior, norm.taught) + rms(prior, norm.prior)
    return layer.output.weight @ (y.flatten() * gate)
