"""The time mixing of RWKV-7 (Peng et al. 2025, arXiv 2503.14456): a baseline whose state is matrices.

Two parts of the published model are left out, because a block knows of no other: the values of the first
layer that later layers mix in, and channel mixing, in whose place the model's SwiGLU stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory.precision import autocast_device
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.norm import RMSNorm
from titans.nn.packing import newest
from titans.state import register_state

# Tokens whose updates are computed at once.
_CHUNK = 16
# Logarithms of decays lie between minus this and 0.
_FASTEST = math.exp(-0.5)
# What each projection sees: a token mixed with the one before it, in a share of its own.
_SEES = ("reads", "decay", "keys", "values", "rate", "gate")


@register_state
@dataclass(frozen=True)
class RWKV7State:
    """last: (batch, 1, hidden_size), the newest token. matrix: (batch, heads, head_dim of keys, head_dim of
    values), in at least float32."""

    last: Tensor
    matrix: Tensor


class RWKV7Block(nn.Module):
    """x + out(gate · (norm(Sᵀ r) + bonus)), where S learns as `generalized_delta` has it."""

    has_memory = False

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        size, heads, dim = settings.hidden_size, settings.num_heads, settings.head_dim
        self.num_heads, self.head_dim, inner = heads, dim, heads * dim
        self.norm = RMSNorm(size, settings.norm_eps)
        self.mix = nn.Parameter(torch.empty(len(_SEES), size))
        self.reads, self.keys, self.values = (nn.Linear(size, inner, bias=False) for _ in range(3))
        # As in the published code: low ranks that grow with the root of the width.
        rank = 32 * max(1, round(1.8 * math.sqrt(size) / 32))
        wide = 32 * max(1, round(0.6 * size**0.8 / 32))
        self.decay_down, self.decay_up = nn.Linear(size, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.rate_down, self.rate_up = nn.Linear(size, rank, bias=False), nn.Linear(rank, inner, bias=False)
        self.gate_down, self.gate_up = nn.Linear(size, wide, bias=False), nn.Linear(wide, inner, bias=False)
        self.decay_bias, self.rate_bias = nn.Parameter(torch.empty(inner)), nn.Parameter(torch.empty(inner))
        self.removal_scale, self.key_rate = (nn.Parameter(torch.empty(inner)) for _ in range(2))
        self.bonus = nn.Parameter(torch.empty(heads, dim))
        self.read_norm = nn.GroupNorm(heads, inner, eps=dim * 1e-5)
        self.output = nn.Linear(inner, size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Slow and fast channels in each head."""
        place = torch.arange(self.head_dim) / max(self.head_dim - 1, 1)
        self.mix.fill_(0.5)
        self.decay_bias.copy_((5 * place - 6).repeat(self.num_heads))
        self.rate_bias.zero_()
        self.removal_scale.fill_(0.85)
        self.key_rate.fill_(1.0)
        self.bonus.zero_()

    def initial_state(self, batch: int) -> RWKV7State:
        """Zeros."""
        weight, dim = self.norm.weight, self.head_dim
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = torch.zeros(batch, self.num_heads, dim, dim, dtype=wide, device=weight.device)
        return RWKV7State(weight.new_zeros(batch, 1, weight.shape[0]), matrix)

    def fresh_context(self, state: RWKV7State) -> RWKV7State:
        """An initial state: nothing is kept, for there is no memory."""
        return self.initial_state(state.matrix.shape[0])

    def forward(self, x: Tensor, state: RWKV7State, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        packed = context.packed
        token = packed.zero_padding(self.norm(x))
        before = torch.cat([state.last.to(token.dtype), token], 1)[:, :-1]
        seen = dict(zip(_SEES, (token + (before - token) * share for share in self.mix), strict=True))
        reads, keys, values = (getattr(self, name)(seen[name]) for name in ("reads", "keys", "values"))
        gate = self.gate_up(torch.sigmoid(self.gate_down(seen["gate"])))
        decay = self.decay_bias + self.decay_up(torch.tanh(self.decay_down(seen["decay"])))
        rate = torch.sigmoid(self.rate_bias + self.rate_up(self.rate_down(seen["rate"])))
        with torch.autocast(autocast_device(x), enabled=False):
            wide = state.matrix.dtype
            reads, keys, values, decay, rate = (
                y.to(wide).unflatten(-1, (self.num_heads, self.head_dim))
                for y in (reads, keys, values, decay, rate)
            )
            heads = self.num_heads, self.head_dim
            removed = F.normalize(keys * self.removal_scale.to(wide).view(heads), dim=-1)
            keys = keys * (1 + (rate - 1) * self.key_rate.to(wide).view(heads))
            log_decay = -_FASTEST * torch.sigmoid(decay)
            log_decay, keys, removed = map(packed.zero_padding, (log_decay, keys, removed))
            y, matrix = generalized_delta(
                reads, log_decay, keys, values, -removed, removed * rate, state.matrix
            )
            y = self.read_norm(y.flatten(0, 1).flatten(1).to(self.read_norm.weight.dtype))
            y = y.view(reads.shape).to(wide) + values * (reads * keys * self.bonus.to(wide)).sum(
                -1, keepdim=True
            )
        y = packed.zero_padding(self.output(gate * y.flatten(-2).to(gate.dtype)))
        last = newest(state.last, token, packed.lengths, 1)
        return BlockResult(x + y, RWKV7State(last, matrix))


def generalized_delta(
    reads: Tensor,
    log_decay: Tensor,
    keys: Tensor,
    values: Tensor,
    removed: Tensor,
    replaced: Tensor,
    matrix: Tensor,
) -> tuple[Tensor, Tensor]:
    """S ← diag(w) S + b (Sᵀ a)ᵀ + k vᵀ at every token, and the read Sᵀ r after it.

    Args:
        reads, keys, values: r, k, v of (batch, time, heads, head_dim). log_decay: log w, alike, at most 0.
        removed, replaced: a and b, alike. matrix: S (batch, heads, head_dim, head_dim) before the first.

    Returns reads (batch, time, heads, head_dim) and S after the last token. Within a chunk the answers Sᵀ a
    of all tokens solve one triangular system. Decays between two tokens are exponentials of sums of
    logarithms that are never positive, so nothing is divided by a product of decays.
    """
    time = reads.shape[1]
    chunk = max(min(_CHUNK, time), 1)
    after = -time % chunk

    def in_chunks(x: Tensor) -> Tensor:
        """(batch, heads, chunks, chunk, head_dim); a token of zeros changes nothing."""
        return F.pad(x, (0, 0, 0, 0, 0, after)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    r, w, k, v, a, b = map(in_chunks, (reads, log_decay, keys, values, removed, replaced))
    sums = w.cumsum(-2)
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril(-1)[..., None]
    until = torch.ones(chunk, chunk, dtype=torch.bool, device=r.device).tril()[..., None]

    def between(ends: Tensor, visible: Tensor) -> Tensor:
        """The decay from after token j to `ends` of token t, (…, t, j, head_dim); 0 where not visible."""
        return (ends.unsqueeze(-2) - sums.unsqueeze(-3)).masked_fill(~visible, -torch.inf).exp()

    asked = a.unsqueeze(-2) * between(sums - w, earlier)
    answered = r.unsqueeze(-2) * between(sums, until)
    a_b, a_k, r_b, r_k = (
        torch.einsum("...tjd,...jd->...tj", x, y) for x in (asked, answered) for y in (b, k)
    )
    unit = torch.eye(chunk, dtype=r.dtype, device=r.device)
    both = torch.cat([a * (sums - w).exp(), a_k @ v], -1)
    from_matrix, from_keys = torch.linalg.solve_triangular(
        unit - a_b, both, upper=False, unitriangular=True
    ).split(a.shape[-1], -1)
    whole = sums[..., -1:, :]
    left = (whole - sums).exp()
    decayed, rest = r * sums.exp(), (k * left).mT @ v
    parts = (from_matrix, from_keys, decayed, r_b, r_k @ v, b * left, rest, whole.exp())
    found = []
    for ask, known, read, r_b, here, replaced, written, kept in zip(
        *(x.unbind(2) for x in parts), strict=True
    ):
        answers = ask @ matrix + known
        found.append(read @ matrix + r_b @ answers + here)
        matrix = kept.mT * matrix + replaced.mT @ answers + written
    if not found:
        return reads, matrix
    return torch.stack(found, 2).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :time], matrix
