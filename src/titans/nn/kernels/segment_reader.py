"""Whole segments of `MACBlock` in sequence, forward; `segments.py` has what it is for, and the backward.

Rows are heads of texts, `rows` = batch · heads. A tensor of tokens has the segments first: (segments, rows,
segment_length, head_dim), or (segments, batch · segment_length, features) where all heads stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.network import ACTIVATIONS

# So many chunks of a segment are recomputed at a time going backward; of more, √chunks.
_CHUNKS_AT_ONCE = 4
# Queries that attend at a time, to the keys up to the last of them: of a long segment half are later.
_ROWS_AT_ONCE = 128


class Sizes(NamedTuple):
    """What is no tensor.

    memory: the inner problem as the native operators take it (`operator_sizes`). limits: of momentum and step
    size. least: rates by which the heads forget at least, (heads, 1), or None. eps: of the norms of what is
    recalled, and of what is written. frozen: step sizes are 0.
    """

    memory: tuple[list[int], list[float]]
    activation: str
    heads: int
    chunk_size: int
    limits: tuple[float, float]
    least: Tensor | None
    eps: tuple[float, float]
    frozen: bool

    @property
    def depth(self) -> int:
        return self.memory[0][0]


class Tokens(NamedTuple):
    """What depends on the tokens alone, (segments, rows, segment_length, head_dim) each.

    asked: queries to the memory. prior, known: what an empty memory answers, and its norm. plain, rotated,
    keys, values: see `SegmentTokens`.
    """

    asked: Tensor
    prior: Tensor
    known: Tensor
    plain: Tensor
    rotated: Tensor
    keys: Tensor
    values: Tensor


class Slow(NamedTuple):
    """What all segments share.

    fixed_keys, fixed_values: of persistent tokens, (rows, num_persistent, head_dim). turn: (segment_length,
    head_dim / 2) complex, the rotation of each index. context: (2 · heads · head_dim, heads · head_dim), from
    what is recalled to keys and values. taught: (rows, 1, head_dim), norm of the recalled. output: of the
    attention. norm, input, conv: of what the memory is written with; `input` without its gate on answers.
    gates: weight (3 · heads · depth, hidden_size), bias (3, heads, depth), and keys, up, down as in `Learner`
    or None. base: (rows, out, in) for each layer.
    """

    fixed_keys: Tensor
    fixed_values: Tensor
    turn: Tensor
    context: Tensor
    taught: Tensor
    output: Tensor
    norm: Tensor
    input: Tensor
    conv: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    gate_keys: Tensor | None
    gate_up: Tensor | None
    gate_down: Tensor | None


class Found(NamedTuple):
    """What the segments have given.

    attended: (segments, batch · segment_length, hidden_size). reads, queries: of the memory that is written,
    (segments, batch, segment_length, heads, head_dim). context_keys, context_values: of the last segment,
    (rows, segment_length, head_dim). tail: of the convolution. state: weights and momentum after the last
    token, (rows, out, in) each. snapshot: the weights with which the last segment began.
    """

    attended: Tensor
    reads: Tensor
    queries: Tensor
    context_keys: Tensor
    context_values: Tensor
    tail: Tensor
    state: list[Tensor]
    snapshot: list[Tensor]


class Block(NamedTuple):
    """Queries `begin` to `end` of a segment; unseen: (end − begin, 2 · end), −∞ where a key is later."""

    begin: int
    end: int
    unseen: Tensor


class Recalled(NamedTuple):
    """What is recalled for a segment, (rows, segment_length, head_dim), and what the backward needs: the
    normed update from the text, the norm's factor, and the network's weights, inputs and outputs by layer.
    """

    recalled: Tensor
    normed: Tensor
    factor: Tensor
    weights: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]


class Kept(NamedTuple):
    """What is kept of a segment for the backward.

    recalled: (batch · segment_length, heads · head_dim). context_keys: rotated. heard: what attention gives
    before its output projection. written: queries, keys and values of the memory before their convolution.
    keys, values: after it, by chunk. raw: gates before their functions, (3, chunks, depth, rows, chunk_size).
    state: weights and momentum before it. starts: those before each group of chunks but the first.
    """

    recalled: Tensor
    context_keys: Tensor
    context_values: Tensor
    heard: Tensor
    written: Tensor
    keys: Tensor
    values: Tensor
    raw: Tensor
    state: list[Tensor]
    starts: list[Tensor]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], depth: int) -> Kept:
        """From the tensors in turn, of a memory of so many layers."""
        recalled, context_keys, context_values, heard, written, keys, values, raw, *states = tensors
        state, starts = states[: 2 * depth], states[2 * depth :]
        return cls(recalled, context_keys, context_values, heard, written, keys, values, raw, state, starts)


class Reader:
    """What `read_segments` is given, and its forward; flat: tokens, slow, base, tail and state in turn."""

    def __init__(self, sizes: Sizes, flat: Sequence[Tensor | None]) -> None:
        self.sizes, depth = sizes, sizes.depth
        self.tokens = Tokens(*flat[: len(Tokens._fields)])  # type: ignore[arg-type]
        rest = flat[len(Tokens._fields) :]
        self.slow = Slow(*rest[: len(Slow._fields)])  # type: ignore[arg-type]
        carried: list[Tensor] = list(rest[len(Slow._fields) :])  # type: ignore[arg-type]
        self.base, self.tail, self.state = carried[:depth], carried[depth], carried[depth + 1 :]
        self.segments, self.rows, self.length, self.head_dim = self.tokens.asked.shape
        self.heads, self.batch = sizes.heads, self.rows // sizes.heads
        self.width, self.hidden = self.heads * self.head_dim, self.slow.output.shape[0]
        self.chunks = self.length // sizes.chunk_size
        self.fixed = self.slow.fixed_keys.shape[1]
        few = self.chunks <= _CHUNKS_AT_ONCE
        self.group = self.chunks if few else math.isqrt(self.chunks - 1) + 1
        device = self.tail.device
        later = self.tail.new_full((self.length, self.length), float("-inf")).triu_(1)
        self.blocks = []
        for begin in range(0, self.length, _ROWS_AT_ONCE):
            end = min(begin + _ROWS_AT_ONCE, self.length)
            self.blocks.append(Block(begin, end, later[begin:end, :end].repeat(1, 2)))
        self.complete = torch.ones(self.chunks, self.rows, dtype=torch.bool, device=device)
        self.lengths = [0.0, 0.0, self.head_dim**0.5]

    # Layouts. The operators take contiguous tensors, and of one text `reshape` can return a view that is not.

    def side_by_side(self, x: Tensor) -> Tensor:
        """(rows, segment_length, head_dim) to (batch · segment_length, heads · head_dim)."""
        x = x.view(self.batch, self.heads, self.length, self.head_dim).transpose(1, 2)
        return x.reshape(self.batch * self.length, self.width)

    def by_head(self, x: Tensor, parts: int = 1) -> Tensor:
        """(batch · segment_length, parts · heads · head_dim) to (parts, rows, segment_length, head_dim)."""
        x = x.view(self.batch, self.length, parts, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return x.reshape(parts, self.rows, self.length, self.head_dim)

    def by_chunk(self, x: Tensor) -> Tensor:
        """(batch, segment_length, heads, head_dim) to (chunks, rows, chunk_size, head_dim)."""
        x = x.view(self.batch, self.chunks, -1, self.heads, self.head_dim).permute(1, 0, 3, 2, 4)
        return x.contiguous().view(self.chunks, self.rows, -1, self.head_dim)

    def by_time(self, x: Tensor) -> Tensor:
        """The inverse of `by_chunk`, not contiguous: (batch, chunks, chunk_size, heads, head_dim)."""
        return x.view(self.chunks, self.batch, self.heads, -1, self.head_dim).permute(1, 0, 3, 2, 4)

    def gates_by_chunk(self, raw: Tensor) -> Tensor:
        """(batch · segment_length, 3 · heads · depth) to (3, chunks, depth, rows, chunk_size)."""
        shape = self.batch, self.chunks, self.sizes.chunk_size, 3, self.heads, self.sizes.depth
        x = raw.view(shape).permute(3, 1, 5, 0, 4, 2)
        return x.contiguous().view(3, self.chunks, self.sizes.depth, self.rows, self.sizes.chunk_size)

    def gates_by_time(self, x: Tensor) -> Tensor:
        """The inverse of `gates_by_chunk`."""
        shape = 3, self.chunks, self.sizes.depth, self.batch, self.heads, self.sizes.chunk_size
        return x.view(shape).permute(3, 1, 5, 0, 4, 2).reshape(self.batch * self.length, -1)

    def forward(self, kept: list[Tensor] | None) -> Found:
        """Read all segments; a list takes what the backward needs."""
        slow, like = self.slow, self.tail.new_empty
        tokens_at_once = self.batch * self.length
        attended = like(self.segments, tokens_at_once, self.hidden)
        per_token = self.segments, self.batch, self.length, self.heads, self.head_dim
        reads, queries = like(per_token), like(per_token)
        state, tail, depth = list(self.state), self.tail, self.sizes.depth
        before = state
        context_keys, context_values = self.tokens.keys[-1], self.tokens.values[-1]
        for n in range(self.segments):
            recalled = self.side_by_side(self.recall(n, state).recalled)
            context_keys, context_values = self.by_head(recalled @ slow.context.t(), 2)
            context_keys = turned(context_keys, slow.turn)
            heard = self.side_by_side(self.heard(n, context_keys, context_values))
            torch.mm(heard, slow.output.t(), out=attended[n])
            normed = torch.ops.titans_native.rms_norm(attended[n], slow.norm, self.sizes.eps[1])
            written = (normed @ slow.input.t()).view(self.batch, self.length, -1)
            asked, keys, values = torch.ops.titans_native.filter(
                written, tail, slow.conv, None, None, self.lengths, self.head_dim
            )
            tail = self.tail_after(written)
            queries[n] = asked
            raw = self.gates_by_chunk(self.gate_logits(normed, keys))
            keys, values = self.by_chunk(keys), self.by_chunk(values)
            tokens = [self.by_chunk(asked), keys, values, *self.gates(raw)]
            keep = kept is not None and self.group < self.chunks
            read, _, *after = torch.ops.titans_native.scan(
                *self.problem(tokens, state), self.group, keep, False
            )
            reads[n].view(self.batch, self.chunks, -1, self.heads, self.head_dim).copy_(self.by_time(read))
            before = state
            if kept is not None:
                kept += [recalled, context_keys, context_values, heard, written, keys, values, raw]
                kept += [*state, *after[3 * depth :]]
            state = after[: 2 * depth]
        # No output may be an input.
        snapshot = [x.clone() if self.segments == 1 else x for x in before[:depth]]
        return Found(attended, reads, queries, context_keys, context_values, tail.clone(), state, snapshot)

    def tail_after(self, written: Tensor) -> Tensor:
        return written[:, self.length - self.tail.shape[1] :].contiguous()

    def recall(self, n: int, state: Sequence[Tensor]) -> Recalled:
        """What is recalled for segment n from the weights of this state."""
        weights = [w + b for w, b in zip(state, self.base, strict=False)]
        inputs, outputs = [self.tokens.asked[n]], []
        for weight in weights:
            if outputs:
                inputs.append(ACTIVATIONS[self.sizes.activation](outputs[-1]))
            outputs.append(torch.bmm(inputs[-1], weight.mT))
        change = outputs[-1] - self.tokens.prior[n]
        factor = rms_factor(change, self.sizes.eps[0])
        normed = change * factor
        recalled = torch.addcmul(self.tokens.known[n], normed, self.slow.taught)
        return Recalled(recalled, normed, factor, weights, inputs, outputs)

    def heard(self, n: int, context_keys: Tensor, context_values: Tensor) -> Tensor:
        """Attention of segment n by head, (rows, segment_length, head_dim)."""
        parts = [self.attend(n, block, context_keys, context_values) for block in self.blocks]
        answers = [torch.bmm(weights, values) for weights, _, values in parts]
        return answers[0] if len(answers) == 1 else torch.cat(answers, 1)

    def attend(
        self, n: int, block: Block, context_keys: Tensor, context_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What some queries of segment n make of what they may see: weights, keys and values, those of
        persistent tokens first, which have values only."""
        begin, end, unseen = block
        tokens, slow = self.tokens, self.slow
        keys = torch.cat([context_keys[:, :end], tokens.keys[n][:, :end]], 1)
        values = torch.cat([slow.fixed_values, context_values[:, :end], tokens.values[n][:, :end]], 1)
        # The mask is what the product is added to.
        scores = torch.baddbmm(unseen, tokens.rotated[n][:, begin:end], keys.mT)
        if self.fixed:
            known = torch.bmm(tokens.plain[n][:, begin:end], slow.fixed_keys.mT)
            scores = torch.cat([known, scores], -1)
        return torch.softmax(scores, -1), keys, values

    def normed(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the memory is written with; and z without the weight of its norm, and the norm's factor."""
        factor = rms_factor(z, self.sizes.eps[1])
        plain = z * factor
        return plain * self.slow.norm, plain, factor

    def gate_logits(self, x: Tensor, keys: Tensor) -> Tensor:
        """(batch · segment_length, 3 · heads · depth); see `Learner._gates`."""
        slow = self.slow
        raw = torch.addmm(slow.gate_bias.flatten(), x, slow.gate_weight.t())
        if slow.gate_keys is not None:
            by_key = torch.einsum("nhd,ghld->nghl", self.scaled(keys), slow.gate_keys)
            raw += by_key.flatten(1)
        if slow.gate_up is not None and slow.gate_down is not None:
            raw += F.silu(self.gates_see(x, keys) @ slow.gate_up.t()) @ slow.gate_down.t()
        return raw

    def scaled(self, keys: Tensor) -> Tensor:
        return keys.reshape(-1, self.heads, self.head_dim) * self.head_dim**0.5

    def gates_see(self, x: Tensor, keys: Tensor) -> Tensor:
        """What the gates' hidden layer sees, (tokens, hidden_size [+ heads · head_dim])."""
        return x if self.slow.gate_keys is None else torch.cat([x, self.scaled(keys).flatten(1)], 1)

    def gates(self, raw: Tensor) -> list[Tensor]:
        """Forget, momentum and step size of their logits, by chunk."""
        rate = F.softplus(raw[0])
        if self.sizes.least is not None:
            rate = rate + self.sizes.least.to(rate.dtype).repeat(self.batch, 1)
        opened = torch.sigmoid(raw[1:])
        momentum, step = (limit * gate for limit, gate in zip(self.sizes.limits, opened, strict=True))
        return [-torch.expm1(-rate), momentum, torch.zeros_like(step) if self.sizes.frozen else step]

    def problem(self, tokens: list[Tensor], state: list[Tensor]) -> list[Any]:
        """The arguments that both operators of the scan begin with."""
        whole = [*state, *state[: self.sizes.depth]]
        return [
            *self.sizes.memory,
            tokens,
            None,
            None,
            self.complete,
            None,
            None,
            [],
            [],
            self.base,
            whole,
            True,
        ]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Feature pairs of x (rows, time, head_dim) turned by complex numbers (time, head_dim / 2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


def rms_factor(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
