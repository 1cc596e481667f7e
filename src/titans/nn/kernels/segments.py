"""Whole segments of `MACBlock` in sequence, as one step of autograd with a backward of its own.

The same as the loop in `titans.nn.blocks.mac`, which is the place to read it and what runs where this cannot.
A segment needs some forty operations of a few kilobytes each: recorded one by one, they cost more than what
they compute. Here nothing is recorded. What the backward needs is kept once for each segment, the rest is
computed again; the gradients of weights are products over all tokens, after the last segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.chunkwise.groups import refuse_second_derivatives
from titans.memory.network import ACTIVATION_BACKWARDS
from titans.nn.kernels.segment_reader import Found, Kept, Reader, Sizes, Slow, Tokens, turned


def read_segments(
    sizes: Sizes, tokens: Tokens, slow: Slow, base: Sequence[Tensor], tail: Tensor, state: Sequence[Tensor]
) -> Found:
    """Read whole segments one after another.

    base: slow weights under the fast ones, (rows, out, in) for each layer. tail: (batch, kernel − 1, 3 ·
    heads · head_dim). state: weights, then momentum, (rows, out, in) each; the anchor is the weights.
    """
    flat = [*tokens, *slow, *base, tail, *state]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        results = _ReadSegments.apply(sizes, *flat)
        found, carried = results[:6], results[6:]
        attended, reads, queries, keys, values, tail = found
        after, snapshot = list(carried[: len(state)]), list(carried[len(state) :])
        return Found(attended, reads, queries, keys, values, tail, after, snapshot)
    return Reader(sizes, flat).forward(None)


class _ReadSegments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sizes, *flat: Tensor | None) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        found = Reader(sizes, flat).forward(kept)
        ctx.sizes, ctx.num_inputs = sizes, len(flat)
        ctx.save_for_backward(*flat, found.attended, found.queries, *kept)
        return (*found[:6], *found.state, *found.snapshot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("native")
        saved = ctx.saved_tensors  # Once: checkpointing lets go of what was looked at.
        flat, rest = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        return (None, *_Backward(ctx.sizes, flat, rest, grads).run())


class _Backward(Reader):
    """The gradients of what `read_segments` is given from `grads`, those of what `_ReadSegments` returns.

    What is named `all_…` is of all tokens, (segments, batch · segment_length, features), and is filled one
    segment at a time: the gradients of the weights are products of these.
    """

    def __init__(
        self, sizes: Sizes, flat: Sequence[Tensor | None], saved: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> None:
        super().__init__(sizes, flat)
        (self.attended, self.queries), kept = saved[:2], saved[2:]
        per_segment = len(kept) // self.segments
        self.kept = [
            Kept.of(kept[n : n + per_segment], sizes.depth) for n in range(0, len(kept), per_segment)
        ]
        self.grads, self.state_grads = grads[:6], grads[6:]
        self.to_tokens = Tokens(*map(torch.empty_like, self.tokens))
        slow, count = self.slow, self.batch * self.length

        def all_tokens(features: int) -> Tensor:
            return self.tail.new_empty(self.segments, count, features)

        self.all_attended, self.all_normed = all_tokens(self.hidden), all_tokens(self.hidden)
        self.all_heard, self.all_recalled = all_tokens(self.width), all_tokens(self.width)
        self.all_context, self.all_written = all_tokens(2 * self.width), all_tokens(3 * self.width)
        self.all_gates, self.all_keys = all_tokens(slow.gate_weight.shape[0]), all_tokens(self.width)
        # Sums over segments of the other weights' gradients.
        zero = torch.zeros_like
        self.fixed_keys, self.fixed_values = zero(slow.fixed_keys), zero(slow.fixed_values)
        self.taught, self.norm = zero(slow.taught), zero(slow.norm)
        self.conv = slow.conv.new_zeros(self.batch, *slow.conv.shape)
        self.base_grads = [*map(zero, self.base)]
        self.no_anchor = [*map(zero, self.base)]
        self.back = slow.turn.conj().resolve_conj()

    def run(self) -> list[Tensor | None]:
        """All gradients, in the order of the inputs."""
        depth = self.sizes.depth
        after, snapshot = list(self.state_grads[: 2 * depth]), self.state_grads[2 * depth :]
        keys, values, tail = self.grads[3:]
        for n in reversed(range(self.segments)):
            normed, before, tail = self._through_memory(n, after, tail)
            heard = self._through_norm(n, normed)
            of_keys, of_values = self._through_attention(n, heard)
            if n == self.segments - 1:
                of_keys, of_values = of_keys + keys, of_values + values
                torch._foreach_add_(before[:depth], list(snapshot))
            of_weights = self._through_recall(n, of_keys, of_values)
            torch._foreach_add_(before[:depth], of_weights)
            after = before
        flat = [self.all_context, self.all_recalled, self.all_attended, self.all_heard]
        context, recalled, attended, heard = (x.flatten(0, 1) for x in flat)
        written, normed = self.all_written.flatten(0, 1), self.all_normed.flatten(0, 1)
        to_slow = (
            self.fixed_keys, self.fixed_values, None, context.t() @ recalled, self.taught,
            attended.t() @ heard, self.norm, written.t() @ normed, self.conv.sum(0),
            *self._gate_weight_grads(self.all_gates.flatten(0, 1), normed, self.all_keys),
        )  # fmt: skip
        return [*self.to_tokens, *to_slow, *self.base_grads, tail, *after]

    def _through_memory(
        self, n: int, after: list[Tensor], tail_after: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """From the gradients of what the memory has read and of its state and tail after the segment to those
        of what it is written with, (batch · segment_length, hidden_size), and of state and tail before."""
        at, depth = self.kept[n], self.sizes.depth
        tokens = [self.by_chunk(self.queries[n]), at.keys, at.values, *self.gates(at.raw)]
        wanted = [self.by_chunk(self.grads[1][n]), *after, *self.no_anchor]
        found = torch.ops.titans_native.scan_backward(
            *self.problem(tokens, at.state), self.group, at.starts, wanted
        )
        # Gain and bias, of which there are none, stand between.
        of_base, before = found[8 : 8 + depth], found[8 + depth : 8 + 3 * depth]
        torch._foreach_add_(self.base_grads, of_base)
        shape = self.queries[n].shape
        queries, keys, values = (self.by_time(x).reshape(shape) for x in found[:3])
        queries += self.grads[2][n]
        normed = self.all_normed[n]
        normed.copy_(self.normed(self.attended[n])[0])
        gates = self.all_gates[n]
        gates.copy_(self.gates_by_time(self._gates_backward(at.raw, tokens[3], found[3:6])))
        self.all_keys[n].view(self.batch, self.chunks, -1, self.heads, self.head_dim).copy_(
            self.by_time(at.keys)
        )
        of_normed, of_keys = self._gate_logits_backward(gates, normed, self.all_keys[n])
        if of_keys is not None:
            keys += of_keys.view(shape)
        tail = self.tail_after(self.kept[n - 1].written) if n else self.tail
        written, tail_before, conv = torch.ops.titans_native.filter_backward(
            at.written, tail, self.slow.conv, None, None, self.lengths, self.head_dim, [queries, keys, values]
        )
        written[:, self.length - tail.shape[1] :] += tail_after
        self.conv += conv
        self.all_written[n] = written.view(len(normed), -1)
        of_normed.addmm_(self.all_written[n], self.slow.input)
        return of_normed, before, tail_before

    def _through_norm(self, n: int, grad: Tensor) -> Tensor:
        """From the gradient of what the memory is written with to that of what attention gives by head."""
        _, plain, factor = self.normed(self.attended[n])
        self.norm += (grad * plain).sum(0)
        attended = self.all_attended[n]
        torch.add(self.grads[0][n], _rms_backward(grad * self.slow.norm, plain, factor), out=attended)
        self.all_heard[n] = self.kept[n].heard
        return self.by_head(attended @ self.slow.output)[0]

    def _through_attention(self, n: int, heard: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of what attention gives to those of the context's keys, rotated, and values."""
        at, slow, fixed = self.kept[n], self.slow, self.fixed
        plain, rotated = self.tokens.plain[n], self.tokens.rotated[n]
        context_keys, context_values = torch.zeros_like(heard), torch.zeros_like(heard)
        token_keys, token_values = self.to_tokens.keys[n].zero_(), self.to_tokens.values[n].zero_()
        for block in self.blocks:
            rows, end = slice(block.begin, block.end), block.end
            weights, keys, values = self.attend(n, block, at.context_keys, at.context_values)
            of_values = torch.bmm(weights.mT, heard[:, rows])
            of_weights = torch.bmm(heard[:, rows], values.mT)
            scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_fixed, of_seen = scores[..., :fixed], scores[..., fixed:]
            torch.bmm(of_seen, keys, out=self.to_tokens.rotated[n][:, rows])
            torch.bmm(of_fixed, slow.fixed_keys, out=self.to_tokens.plain[n][:, rows])
            self.fixed_keys.baddbmm_(of_fixed.mT, plain[:, rows])
            self.fixed_values += of_values[:, :fixed]
            of_keys = torch.bmm(of_seen.mT, rotated[:, rows])
            context_keys[:, :end] += of_keys[:, :end]
            token_keys[:, :end] += of_keys[:, end:]
            context_values[:, :end] += of_values[:, fixed : fixed + end]
            token_values[:, :end] += of_values[:, fixed + end :]
        return context_keys, context_values

    def _through_recall(self, n: int, context_keys: Tensor, context_values: Tensor) -> list[Tensor]:
        """From the gradients of the context's keys and values to those of the weights it is recalled from."""
        at, tokens = self.kept[n], self.to_tokens
        context = self.all_context[n]
        both = context.view(self.batch, self.length, 2, self.heads, self.head_dim)
        for part, grad in enumerate((turned(context_keys, self.back), context_values)):
            by_row = grad.reshape(self.batch, self.heads, self.length, self.head_dim)
            both[:, :, part] = by_row.transpose(1, 2)
        self.all_recalled[n] = at.recalled
        recalled = tokens.known[n]
        recalled.copy_(self.by_head(context @ self.slow.context)[0])
        answer = self.recall(n, at.state)
        self.taught += (recalled * answer.normed).sum(1, keepdim=True)
        grad = _rms_backward(recalled * self.slow.taught, answer.normed, answer.factor)
        torch.neg(grad, out=tokens.prior[n])
        found: list[Tensor] = []
        for layer in reversed(range(self.sizes.depth)):
            found.append(torch.bmm(grad.mT, answer.inputs[layer]))
            if layer:
                backward = ACTIVATION_BACKWARDS[self.sizes.activation]
                grad = backward(torch.bmm(grad, answer.weights[layer]), answer.outputs[layer - 1])
        torch.bmm(grad, answer.weights[0], out=tokens.asked[n])
        found.reverse()
        torch._foreach_add_(self.base_grads, found)
        return found

    def _gates_backward(self, raw: Tensor, forget: Tensor, grads: Sequence[Tensor]) -> Tensor:
        """The gradients of the logits by chunk from those of forget, momentum and step size."""
        opened = torch.sigmoid(raw)
        to = torch.empty_like(raw)
        torch.mul(grads[0] * (1 - forget), opened[0], out=to[0])
        slopes = opened[1:] * (1 - opened[1:])
        limits = self.sizes.limits[0], 0.0 if self.sizes.frozen else self.sizes.limits[1]
        for part, limit in enumerate(limits):
            torch.mul(grads[1 + part] * limit, slopes[part], out=to[1 + part])
        return to

    def _gate_logits_backward(self, grad: Tensor, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of x and keys, (tokens, …) each, from that of the logits."""
        slow, of_keys = self.slow, None
        of_x = grad @ slow.gate_weight
        scale = self.head_dim**0.5
        if slow.gate_keys is not None:
            by_gate = grad.view(-1, 3, self.heads, self.sizes.depth)
            of_keys = torch.einsum("nghl,ghld->nhd", by_gate, slow.gate_keys).mul_(scale).flatten(1)
        if slow.gate_up is not None and slow.gate_down is not None:
            hidden = self.gates_see(x, keys) @ slow.gate_up.t()
            seen = ACTIVATION_BACKWARDS["silu"](grad @ slow.gate_down, hidden) @ slow.gate_up
            of_x += seen[:, : self.hidden]
            if of_keys is not None:
                of_keys += seen[:, self.hidden :] * scale
        return of_x, of_keys

    def _gate_weight_grads(self, grad: Tensor, x: Tensor, keys: Tensor) -> list[Tensor | None]:
        """Of weight, bias, keys, up and down, over all tokens."""
        slow = self.slow
        of_keys = of_up = of_down = None
        if slow.gate_keys is not None:
            by_gate = grad.view(-1, 3, self.heads, self.sizes.depth)
            of_keys = torch.einsum("nghl,nhd->ghld", by_gate, self.scaled(keys))
        if slow.gate_up is not None and slow.gate_down is not None:
            seen = self.gates_see(x, keys)
            hidden = seen @ slow.gate_up.t()
            of_down = grad.t() @ F.silu(hidden)
            of_up = ACTIVATION_BACKWARDS["silu"](grad @ slow.gate_down, hidden).t() @ seen
        return [grad.t() @ x, grad.sum(0).view(slow.gate_bias.shape), of_keys, of_up, of_down]


def _rms_backward(grad: Tensor, normed: Tensor, factor: Tensor) -> Tensor:
    """The gradient of x from that of normed = factor · x."""
    along = (grad * normed).mean(-1, keepdim=True)
    return torch.addcmul(grad, normed, along, value=-1) * factor
