"""What learns in a memory: a fast network for each head, what it begins with, and the gates of its update."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import InnerProblem, MemoryState, memory_scan
from titans.memory.objectives import num_inputs
from titans.memory.precision import autocast_device
from titans.nn.context import MemoryTrace
from titans.nn.memory.form import MemoryForm
from titans.nn.memory.half_lives import DecayRate, spaced_half_lives
from titans.nn.memory.initial_weights import InitialWeights
from titans.state import map_state


class Stretch(NamedTuple):
    """Tokens as a memory takes them.

    x: (batch, time, hidden_size), zeros where not `real`. queries, keys, values: (batch, time, heads,
    head_dim), the first two unit vectors. asked, written: features of queries and of keys, (batch, time,
    heads, key_dim), which the fast weights meet; the same tensors without a feature map. real, reset: (batch,
    time) bool, or None where all are and none is.
    """

    x: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    asked: Tensor
    written: Tensor
    real: Tensor | None
    reset: Tensor | None


class Gates(NamedTuple):
    """(batch, time, heads, depth) each, in at least float32; step_logits: step sizes before the sigmoid. With
    `forget_by_row`, forget is (batch, time, heads, rows of all layers)."""

    forget: Tensor
    momentum: Tensor
    step_size: Tensor
    step_logits: Tensor


# Of a row's forget gate as a function of the token: MIRAS has 32 to 64.
ROW_GATE_RANK = 32


class Learner(nn.Module):
    """A memory without its projections.

    Whoever derives from it makes `initial_weights` at their place among its modules, which is the place of
    their random numbers too, and calls `reset_parameters`.

    Args:
        hidden_size: width of the tokens, which the gates are functions of.
        inner: what one head learns at test time, and how.
        max_step_size: upper bound of the step-size gate, whatever the form's.
        num_heads, chunk_size, form, half_lives: see `NeuralMemory`.
    """

    initial_weights: InitialWeights
    # Whether queries are answered by the weights the chunk began with, see `memory_scan`.
    read_anchor = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        inner: InnerProblem,
        chunk_size: int,
        form: MemoryForm,
        max_step_size: float,
        half_lives: tuple[float, float],
    ) -> None:
        super().__init__()
        network = inner.network
        self.inner, self.network, self.num_heads, self.chunk_size = inner, network, num_heads, chunk_size
        self.form, self.max_step_size, self.half_lives = form, max_step_size, half_lives
        # Modules of their own, so that an experiment may change what comes out.
        self.forget_gate: nn.Module = DecayRate(half_lives if form.bounded_half_lives else None)
        self.step_size_gate: nn.Module = nn.Sigmoid()
        depth, head_dim = network.depth, network.head_dim
        self.gate_weight = nn.Parameter(torch.empty(3 * num_heads * depth, hidden_size))
        self.gate_bias = nn.Parameter(torch.empty(3, num_heads, depth))
        self.gate_key_weight = (
            nn.Parameter(torch.empty(3, num_heads, depth, head_dim)) if form.gates_see_keys else None
        )
        self.gate_up_weight = self.gate_down_weight = None
        if units := form.gate_hidden_size:
            seen = hidden_size + num_heads * head_dim * form.gates_see_keys
            self.gate_up_weight = nn.Parameter(torch.empty(units, seen))
            self.gate_down_weight = nn.Parameter(torch.empty(3 * num_heads * depth, units))
        self.row_gate_up_weight = self.row_gate_down_weight = None
        if form.forget_by_row:
            rows = num_heads * sum(self._rows)
            self.row_gate_up_weight = nn.Parameter(torch.empty(ROW_GATE_RANK, hidden_size))
            self.row_gate_down_weight = nn.Parameter(torch.empty(rows, ROW_GATE_RANK))
        self.objective_gate_weight = self.objective_gate_bias = None
        if count := num_inputs(inner.objective):
            self.objective_gate_weight = nn.Parameter(torch.empty(num_heads * count, hidden_size))
            self.objective_gate_bias = nn.Parameter(torch.empty(num_heads, count))
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim)) if network.norm else None
        self.norm_bias = nn.Parameter(torch.empty(num_heads, head_dim)) if network.norm else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates with half-lives log-spaced over heads."""
        nn.init.normal_(self.gate_weight, std=0.02)
        if self.gate_key_weight is not None:
            nn.init.normal_(self.gate_key_weight, std=0.02)
        if self.gate_up_weight is not None and self.gate_down_weight is not None:
            nn.init.normal_(self.gate_up_weight, std=self.gate_up_weight.shape[1] ** -0.5)
            nn.init.zeros_(self.gate_down_weight)
        if self.row_gate_up_weight is not None and self.row_gate_down_weight is not None:
            nn.init.normal_(self.row_gate_up_weight, std=self.row_gate_up_weight.shape[1] ** -0.5)
            nn.init.zeros_(self.row_gate_down_weight)
        if self.objective_gate_weight is not None and self.objective_gate_bias is not None:
            nn.init.normal_(self.objective_gate_weight, std=0.02)
            nn.init.zeros_(self.objective_gate_bias)
        self.gate_bias.zero_()
        self.gate_bias[2] = 1.0
        self.set_half_lives(*self.half_lives)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.constant_(self.norm_weight, 0.5)
            nn.init.zeros_(self.norm_bias)

    @torch.no_grad()
    def set_half_lives(self, shortest: float, longest: float) -> None:
        """Have the heads forget with half-lives log-spaced from one to the other, in tokens."""
        half_lives = spaced_half_lives(self.num_heads, shortest, longest)
        # forget = 1 − exp(−softplus(b)), so its half-life is ln 2 / softplus(b).
        self.gate_bias[0] = torch.log(torch.expm1(math.log(2) / half_lives)).unsqueeze(-1)

    @property
    def _rows(self) -> list[int]:
        """The rows of each layer's fast weights."""
        return [out for out, _ in self.network.weight_shapes]

    @property
    def base(self) -> tuple[Tensor, ...] | None:
        """The weights on which the fast ones are offsets, (heads, out, in) for each layer, or None."""
        return tuple(self.initial_weights) if self.form.decay_to_initial else None

    def norm_in(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias of the network's norm, (heads, 1, head_dim) each, or None for a network without."""
        gain, bias = (
            None if x is None else x.to(dtype).unsqueeze(1) for x in (self.norm_weight, self.norm_bias)
        )
        return gain, bias

    def prior(self, queries: Tensor) -> Tensor | None:
        """What a memory that has read nothing answers, (batch, time, heads, head_dim) in at least float32.

        queries: as the memory takes them, (batch, time, heads, key_dim).
        None where the fast weights are no offsets: what was there at first has been forgotten too.
        """
        if self.base is None:
            return None
        dtype = torch.promote_types(queries.dtype, torch.float32)
        gain, bias = self.norm_in(dtype)
        with torch.autocast(autocast_device(queries), enabled=False):
            base = [w.to(dtype) for w in self.base]
            weights = self.inner.network_weights([torch.zeros_like(w) for w in base], base)
            return self.network(weights, queries.to(dtype).transpose(1, 2), gain, bias).transpose(1, 2)

    def empty_memory(self, batch: int) -> MemoryState:
        """Of rows that have read nothing."""
        weights = [w.unsqueeze(0) for w in self.initial_weights]
        if self.form.decay_to_initial:
            weights = [torch.zeros_like(w) for w in weights]
        return map_state(lambda x: x.expand(batch, *x.shape[1:]), self.inner.initial_state(weights))

    def scan(
        self,
        stretch: Stretch,
        state: MemoryState,
        fresh: MemoryState | None,
        backend: str,
        *,
        frozen: bool = False,
        trace: bool = False,
    ) -> tuple[Tensor, MemoryState, MemoryTrace | None]:
        """Learn a stretch and answer its queries, see `memory_scan`.

        fresh: one row, what a reset starts from; needed where the stretch has any. frozen: step sizes are 0.

        Returns:
            Reads (batch, time, heads, head_dim), the new state, and the trace if asked for.
        """
        gates = self._gates(stretch.x, stretch.keys)
        if frozen:
            gates = gates._replace(step_size=torch.zeros_like(gates.step_size))
        inputs = self._objective_inputs(stretch.x)
        reads, memory, surprise = memory_scan(
            self.inner,
            stretch.asked,
            stretch.written,
            stretch.values,
            gates.forget,
            gates.momentum,
            gates.step_size,
            state,
            self.chunk_size,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            base=self.base,
            objective_inputs=inputs,
            mask=stretch.real,
            reset=stretch.reset,
            initial=None if fresh is None else [w[0] for w in fresh.weights],
            initial_momentum=None if fresh is None else [m[0] for m in fresh.momentum],
            initial_extra=None if fresh is None else [x[0] for x in fresh.extra],
            backend=backend,
            return_surprise=True,
            read_anchor=self.read_anchor,
        )
        if not trace:
            return reads, memory, None
        squared = sum(w.square().sum((-2, -1)) for w in memory.weights)
        assert isinstance(squared, Tensor)
        if self.form.forget_by_row:
            means = [rows.mean(-1) for rows in gates.forget.split(self._rows, -1)]
            gates = gates._replace(forget=torch.stack(means, -1))
        values = stretch.values if inputs is None else torch.cat([stretch.values, inputs], -1)
        return reads, memory, MemoryTrace(surprise, *gates, stretch.written, values, squared.sqrt())

    def _gates(self, x: Tensor, keys: Tensor) -> Gates:
        """The gates of tokens.

        x: (batch, time, hidden_size). keys: (batch, time, heads, head_dim), unit vectors.
        """
        with torch.autocast(autocast_device(x), enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            seen = x.to(dtype)
            raw = F.linear(seen, self.gate_weight.to(dtype), self.gate_bias.to(dtype).flatten())
            raw = raw.view(*x.shape[:2], *self.gate_bias.shape)
            if self.gate_key_weight is not None:
                # On the scale of a normalised token.
                scaled = keys.to(dtype) * keys.shape[-1] ** 0.5
                raw = raw + torch.einsum("bthd,ghld->btghl", scaled, self.gate_key_weight.to(dtype))
                seen = torch.cat([seen, scaled.flatten(2)], -1)
            if self.gate_up_weight is not None and self.gate_down_weight is not None:
                hidden = F.silu(F.linear(seen, self.gate_up_weight.to(dtype)))
                raw = raw + F.linear(hidden, self.gate_down_weight.to(dtype)).view_as(raw)
            forget, momentum, step_size = raw.unbind(2)
            if self.row_gate_up_weight is not None and self.row_gate_down_weight is not None:
                of_rows = torch.as_tensor(self._rows, device=x.device)
                low = F.linear(x.to(dtype), self.row_gate_up_weight.to(dtype))
                by_row = F.linear(low, self.row_gate_down_weight.to(dtype))
                forget = forget.repeat_interleave(of_rows, -1, output_size=sum(self._rows))
                forget = forget + by_row.view_as(forget)
            return Gates(
                -torch.expm1(-self.forget_gate(forget)),
                self.form.max_momentum * torch.sigmoid(momentum),
                self.max_step_size * self.step_size_gate(step_size),
                step_size,
            )

    def _objective_inputs(self, x: Tensor) -> Tensor | None:
        """What the objective takes of each token, (batch, time, heads, num_inputs), or None."""
        if self.objective_gate_weight is None or self.objective_gate_bias is None:
            return None
        with torch.autocast(autocast_device(x), enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.objective_gate_weight.to(dtype), self.objective_gate_bias.to(dtype)
            logits = F.linear(x.to(dtype), weight, bias.flatten()).view(*x.shape[:2], *bias.shape)
            return self.inner.objective.from_logits(logits)  # type: ignore[attr-defined]
