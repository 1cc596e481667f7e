"""One chunk of the fast path, forward and backward, as batched matrix products, both written out.

Inside a chunk every gradient is taken at the anchor, so token j's is an outer product D_j h_jᵀ known before
any weight moves, and the weights after token t are a weighted sum of them (`rules.ChunkCoefficients`).
Reading with these is, per layer, two products with the chunk-start matrices and one attention-like pair; no
per-token weights exist.
The backward forms every product with a weight-sized operand itself and in place, because passes over weights
are what a chunk's time goes to; autograd differentiates only what is token-sized.
Derivation: docs/how/maths.md.

Shapes: rows = batch · heads; tokens (rows, width, features); weights (rows, out, in).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory.inner import InnerProblem
from titans.memory.network import ACTIVATION_BACKWARDS, ACTIVATIONS, NORM_EPS, MemoryNetwork
from titans.memory.rules import ChunkCoefficients
from titans.memory.state import MemoryState, Weights


class Chunk(NamedTuple):
    """What enters a chunk: tokens (rows, width, head_dim), coefficients per layer, gain and bias (rows, 1,
    head_dim), base (rows, out, in) per layer."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    coefficients: list[ChunkCoefficients]
    gain: Tensor | None
    bias: Tensor | None
    base: Weights | None


class KeyPass(NamedTuple):
    """The backward pass of the inner objective at the anchor.

    inputs: h_0 … h_{L-1}. outputs: W_l h_{l-1}. deltas: gradients with respect to these. scaled: D_l, the
    deltas divided by the step normalizers. surprise: (rows, width).
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    deltas: list[Tensor]
    scaled: list[Tensor]
    normalizers: list[Tensor]
    surprise: Tensor


class _Read(NamedTuple):
    """One layer of the read: its input r, r Wᵀ, r Sᵀ, r hᵀ, and its output."""

    inputs: Tensor
    with_weights: Tensor
    with_momentum: Tensor
    similarity: Tensor
    outputs: Tensor


class ChunkTape(NamedTuple):
    """What the backward of a chunk needs of its forward.

    anchor: the weights at which gradients are taken, the base included. shared: they were the chunk-start
    weights.
    """

    chunk: Chunk
    weights: Weights
    momentum: Weights
    anchor: Weights
    shared: bool
    keys: KeyPass
    reads: list[_Read]


class ChunkGradients(NamedTuple):
    """Gradients of a chunk's inputs. `anchor` is None where the anchor was the weights themselves: it is in
    `weights`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    coefficients: list[ChunkCoefficients]
    gain: Tensor | None
    bias: Tensor | None
    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor] | None
    base: list[Tensor] | None


def _errors(
    inner: InnerProblem,
    features: Tensor,
    keys: Tensor,
    values: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    input_squares: list[Tensor],
    weight_squares: list[Tensor],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """All that is nonlinear in the features and token-sized: the objective's gradient with respect to f(k),
    the objective per token, and the step normalizers."""
    net, objective = inner.network, inner.objective
    if net.norm:
        centred = features - features.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + NORM_EPS)
        normed = centred * scale
        answer = normed if gain is None else normed * gain
        answer = answer if bias is None else answer + bias
        answer = answer + keys if net.residual else answer
        error = objective.gradient(answer, values)
        error = error if gain is None else error * gain
        along = (error * normed).mean(-1, keepdim=True)
        delta = (error - error.mean(-1, keepdim=True) - normed * along) * scale
    else:
        answer = features + keys if net.residual else features
        delta = objective.gradient(answer, values)
    surprise = objective.value(answer, values)
    if not inner.rule.normalize_step:
        return delta, surprise, []
    curvature, slope = objective.curvature(answer, values), net.slope_square(features, gain)
    return delta, surprise, inner.step_normalizers(curvature, slope, input_squares, weight_squares)


def _squares(inner: InnerProblem, inputs: list[Tensor], anchor: Weights) -> tuple[list[Tensor], list[Tensor]]:
    if not inner.rule.normalize_step:
        return [], []
    return [h.square().sum(-1) for h in inputs], [
        torch.linalg.vector_norm(w, dim=(1, 2)).square().unsqueeze(-1) for w in anchor[1:]
    ]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b per row, (rows, 1, 1)."""
    return (a * b).sum((1, 2), keepdim=True)


def key_pass(
    inner: InnerProblem,
    keys: Tensor,
    values: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    anchor: Weights,
) -> KeyPass:
    """The gradients that keys and values (rows, width, head_dim) give at the anchor; autograd can follow."""
    inputs, outputs = inner.network.features(anchor, keys)
    delta, surprise, normalizers = _errors(
        inner, outputs[-1], keys, values, gain, bias, *_squares(inner, inputs, anchor)
    )
    deltas = inner.network.output_gradients(anchor, outputs, delta)
    scaled = deltas
    if inner.rule.normalize_step:
        scaled = [d / n.unsqueeze(-1) for d, n in zip(deltas, normalizers, strict=True)]
    return KeyPass(inputs, outputs, deltas, scaled, normalizers, surprise)


def run_chunk(
    inner: InnerProblem, chunk: Chunk, state: MemoryState
) -> tuple[Tensor, Weights, Weights, ChunkTape]:
    """Reads of a chunk, and weights and momentum after its last token, before the rule ends the chunk."""
    net, weights, momentum = inner.network, state.weights, state.momentum
    total = net.total(state.anchor, chunk.base)
    keys = key_pass(inner, chunk.keys, chunk.values, chunk.gain, chunk.bias, total)
    hidden, reads, new_weights, new_momentum = chunk.queries, [], [], []
    for layer, (c, h, d) in enumerate(zip(chunk.coefficients, keys.inputs, keys.scaled, strict=True)):
        weight, moment = weights[layer], momentum[layer]
        with_weights, with_momentum = torch.bmm(hidden, weight.mT), torch.bmm(hidden, moment.mT)
        similarity = torch.bmm(hidden, h.mT)
        out = (with_weights * c.read_weights).addcmul_(with_momentum, c.read_momentum)
        if chunk.base is not None:
            out.baddbmm_(hidden, chunk.base[layer].mT)
        out = out.baddbmm_(similarity * c.read_steps, d, alpha=-1)
        reads.append(_Read(hidden, with_weights, with_momentum, similarity, out))
        if layer + 1 < net.depth:
            hidden = ACTIVATIONS[net.activation](out)
        moved = (weight * c.end_weights).add_(weight).addcmul_(moment, c.end_momentum)
        new_weights.append(moved.baddbmm_((d * c.end_steps).mT, h, alpha=-1))
        carried = moment * c.momentum_momentum
        new_momentum.append(carried.baddbmm_((d * c.momentum_steps).mT, h, alpha=-1))
    answers = net.finish(out, chunk.queries, chunk.gain, chunk.bias)
    tape = ChunkTape(chunk, weights, momentum, total, state.is_shared, keys, reads)
    return answers, tuple(new_weights), tuple(new_momentum), tape


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else _leaf(x)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _read_backward(
    net: MemoryNetwork, tape: ChunkTape, answers_grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the last layer's output, gain and bias through `finish`, whose residual the caller adds."""
    if not net.norm:
        return answers_grad, None, None
    out, gain, bias = _leaf(tape.reads[-1].outputs), _optional(tape.chunk.gain), _optional(tape.chunk.bias)
    leaves = [x for x in (out, gain, bias) if x is not None]
    with torch.enable_grad():
        answers = net.finish(out, torch.zeros_like(out), gain, bias)
    found = list(torch.autograd.grad(answers, leaves, answers_grad))
    out_grad = found.pop(0)
    gain_grad, bias_grad = (None if x is None else found.pop(0) for x in (gain, bias))
    return out_grad, gain_grad, bias_grad


def chunk_backward(
    inner: InnerProblem,
    tape: ChunkTape,
    answers_grad: Tensor,
    weights_grad: list[Tensor],
    momentum_grad: list[Tensor],
) -> ChunkGradients:
    """From the gradients of `run_chunk`'s reads, weights and momentum to those of its inputs."""
    net, chunk, keys = inner.network, tape.chunk, tape.keys
    backward = ACTIVATION_BACKWARDS[net.activation]
    out_grad, gain_grad, bias_grad = _read_backward(net, tape, answers_grad)

    scaled_grads: list[Tensor] = []
    input_grads: list[Tensor] = []
    coefficient_grads: list[ChunkCoefficients] = []
    from_weights: list[Tensor] = []
    from_momentum: list[Tensor] = []
    from_base: list[Tensor] | None = None if chunk.base is None else []
    for layer in reversed(range(net.depth)):
        c, h, d, read = chunk.coefficients[layer], keys.inputs[layer], keys.scaled[layer], tape.reads[layer]
        weight, moment = tape.weights[layer], tape.momentum[layer]
        grad_w, grad_s = weights_grad[layer], momentum_grad[layer]

        mixing_grad = torch.bmm(out_grad, d.mT).neg_()
        similarity_grad = mixing_grad * c.read_steps
        by_weights, by_momentum = out_grad * c.read_weights, out_grad * c.read_momentum
        hidden_grad = torch.bmm(by_weights, weight).baddbmm_(by_momentum, moment).baddbmm_(similarity_grad, h)
        if chunk.base is not None and from_base is not None:
            hidden_grad.baddbmm_(out_grad, chunk.base[layer])
            from_base.append(torch.bmm(out_grad.mT, read.inputs))
        deposit_w, deposit_s = torch.bmm(h, grad_w.mT), torch.bmm(h, grad_s.mT)
        scaled_grad = torch.bmm((read.similarity * c.read_steps).mT, out_grad).neg_()
        scaled_grad.addcmul_(deposit_w, c.end_steps, value=-1).addcmul_(deposit_s, c.momentum_steps, value=-1)
        input_grad = torch.bmm(similarity_grad.mT, read.inputs)
        input_grad.baddbmm_(d * c.end_steps, grad_w, alpha=-1).baddbmm_(
            d * c.momentum_steps, grad_s, alpha=-1
        )

        coefficient_grads.append(
            ChunkCoefficients(
                read_weights=(out_grad * read.with_weights).sum(-1, keepdim=True),
                read_momentum=(out_grad * read.with_momentum).sum(-1, keepdim=True),
                read_steps=mixing_grad * read.similarity,
                end_weights=_dot(grad_w, weight),
                end_momentum=_dot(grad_w, moment),
                end_steps=(d * deposit_w).sum(-1, keepdim=True).neg_(),
                momentum_momentum=_dot(grad_s, moment),
                momentum_steps=(d * deposit_s).sum(-1, keepdim=True).neg_(),
            )
        )
        moved = (grad_w * c.end_weights).add_(grad_w)
        from_weights.append(moved.baddbmm_(by_weights.mT, read.inputs))
        carried = (grad_s * c.momentum_momentum).addcmul_(grad_w, c.end_momentum)
        from_momentum.append(carried.baddbmm_(by_momentum.mT, read.inputs))
        scaled_grads.append(scaled_grad)
        input_grads.append(input_grad)
        out_grad = backward(hidden_grad, tape.reads[layer - 1].outputs) if layer else hidden_grad
    for reverse in (scaled_grads, input_grads, coefficient_grads, from_weights, from_momentum, from_base):
        if reverse is not None:
            reverse.reverse()

    # What is found at the anchor belongs to the base too, so it can go straight to the weights only without.
    direct = tape.shared and from_base is None
    anchor_grads = from_weights if direct else [torch.zeros_like(w) for w in tape.anchor]
    key_grad, value_grad, key_gain, key_bias = _key_backward(
        inner, tape, scaled_grads, input_grads, anchor_grads
    )
    if from_base is not None:
        for into, grad in zip(from_base, anchor_grads, strict=True):
            into += grad
    if tape.shared and not direct:
        for into, grad in zip(from_weights, anchor_grads, strict=True):
            into += grad
    return ChunkGradients(
        out_grad + answers_grad if net.residual else out_grad,
        key_grad,
        value_grad,
        coefficient_grads,
        plus(gain_grad, key_gain),
        plus(bias_grad, key_bias),
        from_weights,
        from_momentum,
        None if tape.shared else anchor_grads,
        from_base,
    )


def _key_backward(
    inner: InnerProblem,
    tape: ChunkTape,
    scaled_grads: list[Tensor],
    input_grads: list[Tensor],
    anchor_grads: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Through the inner backward pass and the inner forward pass; adds to `anchor_grads` in place."""
    net, chunk, keys, anchor = inner.network, tape.chunk, tape.keys, tape.anchor
    backward = ACTIVATION_BACKWARDS[net.activation]
    delta_grads, normalizer_grads = scaled_grads, []
    if inner.rule.normalize_step:
        delta_grads = [g / n.unsqueeze(-1) for g, n in zip(scaled_grads, keys.normalizers, strict=True)]
        normalizer_grads = [-(g * d).sum(-1) for g, d in zip(delta_grads, keys.scaled, strict=True)]

    # Up through δ_l = activation'(z_l) ⊙ (δ_{l+1} W_{l+1}).
    bends = []
    for layer in range(net.depth - 1):
        above, output = (
            _leaf(torch.bmm(keys.deltas[layer + 1], anchor[layer + 1])),
            _leaf(keys.outputs[layer]),
        )
        with torch.enable_grad():
            delta = backward(above, output)
        above_grad, bend = torch.autograd.grad(delta, (above, output), delta_grads[layer])
        bends.append(bend)
        delta_grads[layer + 1] = torch.baddbmm(delta_grads[layer + 1], above_grad, anchor[layer + 1].mT)
        anchor_grads[layer + 1].baddbmm_(keys.deltas[layer + 1].mT, above_grad)

    features, key, value = _leaf(keys.outputs[-1]), _leaf(chunk.keys), _leaf(chunk.values)
    gain, bias = _optional(chunk.gain), _optional(chunk.bias)
    squares, weight_squares = _squares(inner, keys.inputs, anchor)
    squares, weight_squares = [_leaf(x) for x in squares], [_leaf(x) for x in weight_squares]
    with torch.enable_grad():
        delta, _, normalizers = _errors(inner, features, key, value, gain, bias, squares, weight_squares)
    affine = [x for x in (gain, bias) if x is not None]
    found = list(
        torch.autograd.grad(
            [delta, *normalizers],
            [features, key, value, *affine, *squares, *weight_squares],
            [delta_grads[-1], *normalizer_grads],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    out_grad, key_grad, value_grad = found[:3]
    gain_grad, bias_grad = (None if x is None else found.pop(3) for x in (gain, bias))
    rest = found[3:]
    for layer, grad in enumerate(rest[: len(squares)]):
        input_grads[layer].addcmul_(keys.inputs[layer], grad.unsqueeze(-1), value=2)
    for layer, grad in enumerate(rest[len(squares) :], start=1):
        anchor_grads[layer].addcmul_(anchor[layer], grad.unsqueeze(-1), value=2)

    # Down through z_l = W_l h_{l-1}.
    for layer in reversed(range(net.depth)):
        anchor_grads[layer].baddbmm_(out_grad.mT, keys.inputs[layer])
        input_grads[layer].baddbmm_(out_grad, anchor[layer])
        if layer:
            out_grad = backward(input_grads[layer], keys.outputs[layer - 1]).add_(bends[layer - 1])
    return key_grad + input_grads[0], value_grad, gain_grad, bias_grad
