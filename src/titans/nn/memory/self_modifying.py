"""Memories that make their own keys, values and gates, and learn from them (Hope, arXiv 2512.24695)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import MemoryNetwork, MemoryState, memory_scan
from titans.memory.precision import autocast_device
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.conv import CausalConv
from titans.nn.memory.half_lives import HALF_LIVES, spaced_half_lives
from titans.nn.memory.heads import UNIT, head_vectors
from titans.nn.norm import HeadRMSNorm, shorten, unit_queries
from titans.nn.packing import Packed, zero_padding
from titans.nn.pieces import Rows, cut_pieces
from titans.state import map_state, register_state, where_rows


@register_state
@dataclass(frozen=True)
class SelfModifyingState:
    """What a `SelfModifyingMemory` carries.

    tail: the convolution's last inputs, (batch, kernel − 1, channels). weights: the rows of all five memories
    of a head, (batch, heads, 3 · head_dim + 2, head_dim). anchor: the same at the start of the running chunk.
    position: (batch,) int64, tokens read.
    """

    tail: Tensor
    weights: Tensor
    anchor: Tensor
    position: Tensor

    def anchored(self, rows: Rows) -> SelfModifyingState:
        """The same at the start of a chunk, in these rows."""
        if rows is None:
            return self
        anchor = self.weights if rows is True else where_rows(rows, self.weights, self.anchor)
        return replace(self, anchor=anchor)


class Made(NamedTuple):
    """What the memories make of a head's tokens.

    keys, queries: unit vectors (batch, time, heads, head_dim). errors: M(k) − v̂ of the rows of all memories,
    (…, 3 · head_dim + 2). kept: α, and step_size: η, (…, 1); step_logits: η before the sigmoid. values: v̂ of
    the memory that is read. answers: its answers to the queries.
    """

    keys: Tensor
    errors: Tensor
    kept: Tensor
    step_size: Tensor
    step_logits: Tensor
    values: Tensor
    answers: Tensor


class SelfModifyingMemory(nn.Module):
    """Five linear memories a head, M_k, M_v, M_η, M_α and the one that is read, M_mem (equations 89 to 93).

    With x_t a head's slow projection of the token, and M' the memories as the running chunk began:

        k_t = M'_k x_t,  v_t = M'_v x_t,  η_t = σ(M'_η x_t),  α_t = exp(−softplus(M'_α x_t))
        y_t = M'_mem q_t
        v̂_□ = M'_□ v_t     each memory makes the values that it is to learn
        M_□ ← M_□ (α_t I − η_t k_t k_tᵀ) − η_t (M'_□ k_t − v̂_□) k_tᵀ     for all five

    q_t is a slow projection. k_t, q_t and x_t are brought to length 1. v_t and v̂_□ longer than √head_dim are
    shortened to that, because values that memories make for themselves have no bound otherwise. All five
    share k, η and α, so they are the rows of one matrix.

    Args:
        hidden_size: width of input and output.
        num_heads, head_dim: each head has memories of its own.
        chunk_size: tokens whose keys, values and gates the same memories make.
        conv_kernel: width of the causal convolution on x and q.
        half_lives: with which the heads forget at first, log-spaced, in tokens.
        backend: what runs the scan, see `memory_scan`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        chunk_size: int = 16,
        *,
        conv_kernel: int = 4,
        half_lives: tuple[float, float] = HALF_LIVES,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.chunk_size = num_heads, head_dim, chunk_size
        self.half_lives, self.backend = half_lives, backend
        width = num_heads * head_dim
        # Rows of M_k, M_v, M_mem, M_η and M_α.
        self.rows = [head_dim, head_dim, head_dim, 1, 1]
        self.network = MemoryNetwork(sum(self.rows), 1, residual=False, norm=False, key_dim=head_dim)
        self.input = nn.Linear(hidden_size, 3 * width, bias=False)
        self.conv = CausalConv(2 * width, conv_kernel)
        self.initial_weights = nn.Parameter(torch.empty(num_heads, sum(self.rows), head_dim))
        self.gate_bias = nn.Parameter(torch.empty(2, num_heads))
        self.read_norm = HeadRMSNorm(num_heads, head_dim)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Memories that keep lengths, step sizes of a half, half-lives log-spaced over heads."""
        nn.init.normal_(self.initial_weights, std=self.head_dim**-0.5)
        nn.init.zeros_(self.gate_bias)
        half_lives = spaced_half_lives(self.num_heads, *self.half_lives)
        # α = exp(−softplus(b)), so its half-life is ln 2 / softplus(b).
        self.gate_bias[1] = torch.log(torch.expm1(torch.log(torch.tensor(2.0)) / half_lives))

    def initial_state(self, batch: int, persistent: Tensor | None = None) -> SelfModifyingState:
        """The state of rows that have read nothing but persistent (num_persistent, hidden_size), if any."""
        weight = self.initial_weights
        weights = weight.to(torch.promote_types(weight.dtype, torch.float32)).unsqueeze(0)
        position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        tail = self.conv.initial_tail(1, weight.device, self.conv.weight.dtype)
        state = SelfModifyingState(tail, weights, weights, position)
        if persistent is not None and len(persistent):
            _, state, _ = self(persistent.unsqueeze(0), state, BlockContext(Packed()))
            state = self.fresh_context(state)
        return map_state(lambda x: x.expand(batch, *x.shape[1:]), state)

    def fresh_context(self, state: SelfModifyingState) -> SelfModifyingState:
        """What the memories have learned, at the start of a new text."""
        zero = torch.zeros_like(state.position)
        return SelfModifyingState(torch.zeros_like(state.tail), state.weights, state.weights, zero)

    def forward(
        self, x: Tensor, state: SelfModifyingState, context: BlockContext
    ) -> tuple[Tensor, SelfModifyingState, MemoryTrace | None]:
        """Read a stretch: x (batch, time, hidden_size), packed rows.

        Returns answers of the same shape, the new state, and the trace of M_mem if the context asks for it.
        """
        x, width = context.packed.zero_padding(x), self.num_heads * self.head_dim
        projected, gate = self.input(x).split([2 * width, width], dim=-1)
        vectors, tail = head_vectors(
            self.conv,
            projected,
            state.tail,
            self.head_dim,
            (UNIT, UNIT),
            context.packed,
            backend=self.backend,
        )
        cut = cut_pieces(state.position, x.shape[1], context.packed, self.chunk_size)
        now = replace(state, tail=tail)
        answers, traces = [], []
        for piece, inputs, queries in zip(cut.pieces, *map(cut.apart, vectors), strict=True):
            real = piece.packed.real
            with torch.autocast(autocast_device(x), enabled=False):
                made = self._made(now.anchor, inputs, queries, context.frozen)
                made = Made(*(zero_padding(part, real) for part in made))
                _, memory = memory_scan(
                    self.network,
                    made.keys,
                    made.keys,
                    -made.errors,
                    1 - made.kept,
                    torch.zeros_like(made.kept),
                    made.step_size / 2,
                    replace(MemoryState.initial((now.weights,)), position=now.position),
                    chunk_size=1,
                    mask=real,
                    backend=self.backend,
                )
            now = replace(now, weights=memory.weights[0], position=memory.position)
            now = now.anchored(piece.ends)
            answers.append(made.answers)
            traces += [self._trace(made, now.weights)] if context.trace else []
        if not answers:
            return torch.zeros_like(x), now, None
        y = cut.together(torch.cat(answers, 1))
        y = self.output(self.read_norm(y).flatten(-2).to(gate.dtype) * F.silu(gate))
        trace = MemoryTrace.joined(traces).map_tokens(cut.together) if traces else None
        return context.packed.zero_padding(y), now, trace

    def _made(self, anchor: Tensor, inputs: Tensor, queries: Tensor, frozen: bool) -> Made:
        """What memories (batch, heads, rows, head_dim) make of inputs and queries (batch, time, heads,
        head_dim)."""
        longest, dtype = self.head_dim**0.5, anchor.dtype

        def of(vectors: Tensor) -> list[Tensor]:
            return list(torch.einsum("bhrd,bthd->bthr", anchor, vectors.to(dtype)).split(self.rows, -1))

        keys, values, _, step, kept = of(inputs)
        keys, values = unit_queries(keys), shorten(values, longest)
        bias = self.gate_bias.to(dtype).unsqueeze(-1)
        step_logits = step + bias[0]
        step_size = torch.sigmoid(step_logits)
        targets = [shorten(target, longest) for target in of(values)]
        return Made(
            keys,
            torch.cat(of(keys), -1) - torch.cat(targets, -1),
            torch.exp(-F.softplus(kept + bias[1])),
            torch.zeros_like(step_size) if frozen else step_size,
            step_logits,
            targets[2],
            of(queries)[2],
        )

    def _trace(self, made: Made, weights: Tensor) -> MemoryTrace:
        surprise = made.errors.split(self.rows, -1)[2].square().sum(-1).detach()
        norm = weights.split(self.rows, 2)[2].square().sum((-2, -1)).sqrt()
        nothing = torch.zeros_like(made.kept)
        return MemoryTrace(
            surprise, 1 - made.kept, nothing, made.step_size, made.step_logits, made.keys, made.values, norm
        )
