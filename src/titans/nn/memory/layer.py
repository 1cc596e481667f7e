"""The long-term memory as a layer: projections, short convolution, gates, and a scan that learns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from titans.memory import MemoryState
from titans.memory.objectives import Objective
from titans.memory.rules import UpdateRule, ended
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.conv import CausalConv
from titans.nn.memory import features as feature_maps
from titans.nn.memory import starts
from titans.nn.memory.form import MemoryForm
from titans.nn.memory.half_lives import HALF_LIVES, refuses_half_lives
from titans.nn.memory.heads import UNIT, gated_answers, head_vectors
from titans.nn.memory.initial_weights import InitialWeights
from titans.nn.memory.learner import Learner, Stretch
from titans.nn.memory.token import learn_token
from titans.nn.norm import ReadNorm
from titans.nn.packing import Packed
from titans.state import map_state, register_state, where_rows


@register_state
@dataclass(frozen=True)
class NeuralMemoryState:
    """What a `NeuralMemory` carries.

    tail: the convolution's last inputs, (batch, kernel − 1, channels). memory: what has been learned.
    """

    tail: Tensor
    memory: MemoryState


class Found(NamedTuple):
    """What a stretch has read, before it is an answer.

    reads: (batch, time, heads, head_dim). queries: what was asked, (batch, time, heads, key_dim). gate:
    (batch, time, heads · head_dim).
    """

    reads: Tensor
    queries: Tensor
    gate: Tensor


class NeuralMemory(Learner):
    """Memorises its input at test time and answers from what it has memorised (section 3.1).

    q, k, v are projected, convolved and passed through SiLU; q and k are L2-normalised per head, and a v
    longer than √head_dim is shortened to that, so that no input can write without bound. Forget, momentum and
    step size are functions of the token, one for each head and memory layer. The reads are normalised per
    head (the update from the text and the prior separately, see `ReadNorm`), gated by silu of a
    projection, and projected back.

    Args:
        hidden_size: width of input and output.
        num_heads, head_dim: each head has a memory of its own.
        depth: weight matrices of a head's network; 1 is a linear memory, the default by measurement
            (docs/how/stability.md).
        expansion: hidden width of that network divided by head_dim, at depth 2 and more.
        chunk_size: tokens that share one set of gradient weights.
        features: the feature map of queries and keys, a name in `FEATURES` ("identity", "sin", "product",
            "swiglu", "polynomial"). Any but "identity" needs depth 1; a head's fast weights are then
            (head_dim, feature_size).
        feature_size: how many features; None for 4 · head_dim.
        objective: what the memory minimises while it reads: a name in `OBJECTIVES` ("squared_error", "huber",
            "lp", "adaptive_huber", "yaad"), {"name": …, parameter: …}, or an object.
        rule: how its weights are updated: a name in `UPDATE_RULES`, {"name": …, parameter: …}, or an object;
            None for the momentum rule. What form and rule both have is the form's, unless the rule is given
            with it.
        form: a name in `FORMS` ("stable", "paper", "recall"), {"name": …, field: …} for a named form with
            some fields of `MemoryForm` replaced, or a `MemoryForm`.
        start: "random"; or "induction", with which a repeated context retrieves the token that followed it;
            or "sharp", the same with contexts of one token; see `titans.nn.memory.starts`.
        conv_kernel: width of the causal convolution on q, k and v.
        half_lives: the shortest and the longest half-life, in tokens, with which the heads forget at first;
            the others are log-spaced between them.
        backend: what runs the scan, see `memory_scan`, and which kernels may run around it, see
            `titans.nn.kernels`; an attribute, which may be changed at any time.

    Raises:
        ValueError: for a value outside its domain, naming the argument.
    """

    state_type: type[NeuralMemoryState] = NeuralMemoryState

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        depth: int = 1,
        expansion: int = 4,
        chunk_size: int = 16,
        *,
        features: str = "identity",
        feature_size: int | None = None,
        objective: Objective | str | Mapping[str, Any] = "squared_error",
        rule: UpdateRule | str | Mapping[str, Any] | None = None,
        form: MemoryForm | str | Mapping[str, Any] = "stable",
        start: str = "random",
        conv_kernel: int = 4,
        half_lives: tuple[float, float] = HALF_LIVES,
        backend: str = "auto",
    ) -> None:
        for name, size in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("chunk_size", chunk_size),
            ("conv_kernel", conv_kernel),
        ):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r}: give a whole number of at least 1")
        if reason := refuses_half_lives(half_lives) or starts.refuses(start, conv_kernel):
            raise ValueError(reason)
        form = MemoryForm.of(form)
        if reason := feature_maps.refuses(features, feature_size, form.residual):
            raise ValueError(reason)
        mapped = features != feature_maps.IDENTITY
        if mapped and depth != 1:
            raise ValueError(
                f"depth={depth!r} with features={features!r}: features need a single fast matrix; "
                "give depth=1, or features='identity'"
            )
        key_dim = feature_maps.feature_width(features, feature_size, head_dim) if mapped else None
        inner = form.inner(head_dim, depth, expansion, objective, rule, key_dim)
        largest = form.largest_step(inner, chunk_size)
        super().__init__(hidden_size, num_heads, inner, chunk_size, form, largest, half_lives)
        self.start, self.backend = start, backend
        width = num_heads * head_dim
        self.input = nn.Linear(hidden_size, 4 * width, bias=False)
        self.conv = CausalConv(3 * width, conv_kernel)
        self.feature_map = feature_maps.FEATURES[features](num_heads, head_dim, self.network.input_dim)
        self.initial_weights = InitialWeights(self.network, num_heads, empty=form.decay_to_initial or mapped)
        self.read_norm = ReadNorm(num_heads, head_dim, form.decay_to_initial)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates with half-lives log-spaced over heads, and what has to agree for recall, if asked for."""
        super().reset_parameters()
        if self.start in starts.RECALL:
            self.begin_as_induction()

    @torch.no_grad()
    def begin_as_induction(self) -> None:
        """The start that was asked for; see `titans.nn.memory.starts`."""
        starts.begin_as_induction(self.input, self.conv, sharp=self.start == "sharp")

    def initial_state(self, batch: int, persistent: Tensor | None = None) -> NeuralMemoryState:
        """The state of rows that have read nothing but persistent (num_persistent, hidden_size), if any.

        These are written by a scan of their own; then a chunk begins, at position 0 and with their momentum.
        """
        memory = self.empty_memory(1)
        if persistent is not None and len(persistent):
            start = self._begin(self._empty_tail(1), memory)
            _, after, _ = self.learn(persistent.unsqueeze(0), start, BlockContext(Packed()))
            written = after.memory
            memory = replace(written, anchor=written.weights, position=memory.position)
        expanded = map_state(lambda x: x.expand(batch, *x.shape[1:]), memory)
        return self._begin(self._empty_tail(batch), expanded)

    def fresh_context(self, state: NeuralMemoryState) -> NeuralMemoryState:
        """What has been memorised, at the start of a new text: position 0, and nothing in the convolution.

        A chunk still open is closed where it stands; the momentum is kept, as after persistent tokens.
        """
        memory = state.memory
        is_open = memory.position % self.chunk_size != 0
        closed = where_rows(is_open, ended(self.inner.rule, memory), memory)
        fresh = replace(closed, anchor=closed.weights, position=torch.zeros_like(memory.position))
        return self._begin(torch.zeros_like(state.tail), fresh)

    def _begin(self, tail: Tensor, memory: MemoryState) -> NeuralMemoryState:
        """The state of rows at the beginning of a text."""
        return NeuralMemoryState(tail, memory)

    def _empty_tail(self, batch: int) -> Tensor:
        return self.conv.initial_tail(batch, self.conv.weight.device, self.conv.weight.dtype)

    @overload
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = ...,
        mask: Tensor | None = ...,
        reset: Tensor | None = ...,
        *,
        persistent: Tensor | None = ...,
        context: None = ...,
    ) -> tuple[Tensor, NeuralMemoryState]: ...
    @overload
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = ...,
        mask: Tensor | None = ...,
        reset: Tensor | None = ...,
        *,
        persistent: Tensor | None = ...,
        context: BlockContext,
    ) -> tuple[Tensor, NeuralMemoryState, MemoryTrace | None]: ...
    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        *,
        persistent: Tensor | None = None,
        context: BlockContext | None = None,
    ) -> tuple[Tensor, NeuralMemoryState] | tuple[Tensor, NeuralMemoryState, MemoryTrace | None]:
        """Read a stretch; returns the answers and the new state, and with a `context` the trace or None.

        Args:
            x: (batch, time, hidden_size).
            state: None for the start of every row.
            mask: (batch, time) bool; a False token is not read, and its answer is 0.
            reset: (batch, time) bool; before such a token the row starts afresh. In rows packed by `context`
                a reset in the first slot that holds no token makes the state after the stretch a fresh one.
            persistent: (num_persistent, hidden_size) tokens that a fresh row has read first.
            context: whether to learn and to return a trace, and which tokens of rows already packed are real;
                instead of these a `mask`.

        Returns:
            (batch, time, hidden_size), the state, and with `context` a `MemoryTrace` or None.

        Raises:
            ValueError: for a wrong shape or dtype, naming the argument.
        """
        self._check(x, state, mask, reset)
        if mask is None and reset is None and (read := self._next_token(x, state, context)):
            return read if context is None else (*read, None)
        given = Packed.of(mask)
        # A compiled graph cannot take a default of a dataclass that is an object: it is given.
        how = BlockContext(Packed()) if context is None else context
        if mask is not None:
            if how.packed.lengths is not None:
                raise ValueError("mask with a context of packed rows: give one of them")
            x, how, reset = given.pack(x), replace(how, packed=given), given.pack_resets(reset)
        found, state, trace = self.learn(x, state, how, reset, persistent=persistent)
        y = given.unpack(self.answer(found))
        if context is None:
            return y, state
        return y, state, None if trace is None else trace.map_tokens(given.unpack)

    def _next_token(
        self, x: Tensor, state: NeuralMemoryState | None, context: BlockContext | None
    ) -> tuple[Tensor, NeuralMemoryState] | None:
        """`forward` of one token of every row as one operator, or None where there is none for it."""
        if state is None or x.shape[1] != 1 or type(self) is not NeuralMemory:
            return None
        if context is not None and (context.trace or context.packed.lengths is not None):
            return None
        frozen = context is not None and context.frozen
        projections = self.input, self.conv, self.output
        read = learn_token(
            self, projections, self.read_norm, self.backend, x, state.tail, state.memory, frozen
        )
        return None if read is None else (read[0], NeuralMemoryState(*read[1:]))

    def _check(
        self, x: Tensor, state: NeuralMemoryState | None, mask: Tensor | None, reset: Tensor | None
    ) -> None:
        width = self.input.in_features
        if x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"x has shape {tuple(x.shape)}: give (batch, time, hidden_size={width})")
        weight = self.input.weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x is {x.dtype} and the layer {weight.dtype}: bring one to the other, or use autocast"
            )
        for name, flags in (("mask", mask), ("reset", reset)):
            if flags is not None and (flags.shape != x.shape[:2] or flags.dtype != torch.bool):
                raise ValueError(
                    f"{name} has shape {tuple(flags.shape)} and dtype {flags.dtype}: give "
                    f"{tuple(x.shape[:2])}, (batch, time), in torch.bool"
                )
        if state is not None and type(state) is not self.state_type:
            raise ValueError(f"state is a {type(state).__name__}: give the state that the layer returned")
        if state is not None and state.tail.shape[0] != x.shape[0]:
            raise ValueError(f"state holds {state.tail.shape[0]} rows: give one for each of x's {x.shape[0]}")

    def learn(
        self,
        x: Tensor,
        state: NeuralMemoryState | None,
        context: BlockContext,
        reset: Tensor | None = None,
        *,
        persistent: Tensor | None = None,
    ) -> tuple[Found, NeuralMemoryState, MemoryTrace | None]:
        """The half of `forward` that goes from state to state, for packed rows.

        Returns what was found, the new state, and the trace if the context asks for it.
        """
        before = self.initial_state(x.shape[0], persistent) if state is None else state
        stretch, gate, tail = self._stretch(x, before.tail, context.packed, reset)
        fresh = None if reset is None else self.initial_state(1, persistent)
        reads, asked, after, trace = self._learn(stretch, replace(before, tail=tail), fresh, context)
        return Found(reads, asked, gate), after, trace

    def _learn(
        self,
        stretch: Stretch,
        state: NeuralMemoryState,
        fresh: NeuralMemoryState | None,
        context: BlockContext,
    ) -> tuple[Tensor, Tensor, NeuralMemoryState, MemoryTrace | None]:
        """A stretch as all memories of the layer read it.

        state: before the stretch, with the convolution's inputs from after it. fresh: one row, what a reset
        starts from; needed where the stretch has any.

        Returns reads and queries as of `Found`, the new state, and the trace if the context asks for it.
        """
        begun = None if fresh is None else fresh.memory
        reads, memory, trace = self.scan(
            stretch, state.memory, begun, self.backend, frozen=context.frozen, trace=context.trace
        )
        return reads, stretch.asked, replace(state, memory=memory), trace

    def _stretch(
        self, x: Tensor, tail: Tensor, packed: Packed, reset: Tensor | None
    ) -> tuple[Stretch, Tensor, Tensor]:
        """Packed rows as the memory takes them, the gate on its answers, and the convolution's new tail."""
        x = packed.zero_padding(x)
        heads, head_dim = self.num_heads, self.network.head_dim
        qkv, gate = self.input(x).split([3 * heads * head_dim, heads * head_dim], dim=-1)
        (queries, keys, values), tail = head_vectors(
            self.conv, qkv, tail, head_dim, (UNIT, UNIT, head_dim**0.5), packed, reset, self.backend
        )
        if reset is not None and packed.lengths is not None:
            after = torch.arange(x.shape[1], device=x.device) == packed.lengths[:, None]
            ended = (reset & after).any(1)
            tail = torch.where(ended[:, None, None], 0, tail)
        asked, written = self.feature_map(queries), self.feature_map(keys)
        return Stretch(x, queries, keys, values, asked, written, packed.real, reset), gate, tail

    def answer(self, found: Found) -> Tensor:
        """The other half, which knows no order: (batch, time, hidden_size)."""
        prior = self.prior(found.queries)
        y = gated_answers(self.read_norm, found.reads, prior, found.gate, self.backend)
        return self.output(y)

    @torch.no_grad()
    def applied_step_size(self, trace: MemoryTrace, state: NeuralMemoryState) -> Tensor:
        """Step sizes as the update applies them, (batch, time, heads, depth).

        With step normalization a step is divided by its normalizer at the weights its chunk began with.

        Args:
            trace: of a stretch within the running chunk.
            state: before that stretch.

        Raises:
            ValueError: for a stretch that goes on beyond the running chunk.
        """
        left = self.chunk_size - int((state.memory.position % self.chunk_size).max())
        if trace.keys.shape[1] > left:
            raise ValueError(
                f"trace has {trace.keys.shape[1]} tokens: give at most the {left} left of the running chunk"
            )
        if not self.inner.rule.normalize_step:
            return trace.step_size
        anchor = self.inner.network_weights(state.memory.anchor, self.base)
        dtype = anchor[0].dtype
        gain, bias = self.norm_in(dtype)
        keys, values = (x.to(dtype).transpose(1, 2) for x in (trace.keys, trace.values))
        normalizers = self.inner.step_normalizers_at(anchor, keys, values, gain, bias)
        return trace.step_size / torch.stack(normalizers, -1).transpose(1, 2)
