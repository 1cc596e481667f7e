"""A memory that recalls, from a frozen language model's states, which token followed such a context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory import InnerProblem, MemoryNetwork, MemoryState, memory_read, memory_scan
from titans.memory.precision import autocast_device
from titans.nn.association.gates import Gate
from titans.nn.association.keys import FEATURES, KeyMap
from titans.nn.association.state import AssociationState
from titans.nn.whitening import whitening_of

# Any: the memory is the same whenever and wherever it is made with the same settings.
_SEED = 0


@dataclass(frozen=True)
class AssociationRead:
    """What an association did with some tokens; float32 at least but for `hidden`.

    hidden: (batch, time, hidden), the head's changed input. state: after these tokens. surprise: (batch,
    time, heads) or None. reads: (batch, time, heads, value_size), W_t φ(s_t). write, forget, output: (batch,
    time, heads), the gates β, α and g; the first two None while frozen.
    """

    hidden: Tensor
    state: AssociationState
    surprise: Tensor | None
    reads: Tensor
    write: Tensor | None
    forget: Tensor | None
    output: Tensor


class Association(nn.Module):
    """An associative memory between a frozen language model's layers and its head.

    Let s_t be the states of chosen layers at token t, each whitened and scaled to length 1. Each head of the
    memory is a fast matrix W, 0 at first, and learns by the gated delta rule, which is equations 12 to 15 of
    the Titans paper with a linear memory, no momentum and chunks of one token:

        W_t = (1 − α_t) W_{t−1} − β_t (W_{t−1} φ(s_{t−1}) − v_t) φ(s_{t−1})ᵀ,      r_t = W_t φ(s_t).

    The key is that of the token *before*, the value is that of token t: a later context like the one before
    token t recalls it. φ is a `KeyMap`, of length below 1, so any β_t ≤ 1 is stable. The value of token j is
    V unit(A (E_j − mean)), E_j being its row of the head, and mean and A the mean and the inverse root of the
    covariance of all rows. β_t and α_t are functions of s_{t−1}, s_t and token t. With h_t the head's input,
    the memory's output is

        h_t + Σ_heads scale · g_t · B r_t,

    where g_t in (0, 1) is a function of s_t, h_t and the lengths of the r_t. B is such at first that r_t =
    v_j adds scale · g_t to the logit of token j, and little to the others. The scale is 0 at first: the model
    is unchanged, to the bit, until it is trained.

    Args:
        hidden_size: of the model.
        layers: the layers whose states `forward` gets, as a caller numbers them, increasing.
        keys: for each head of the memory the layers that its key is made of, see `KeyMap`; None for one head
            a layer: of "product" the products of that layer with the first, of "sin" that layer.
        features: "product" or "sin".
        feature_size: of φ; None for hidden_size.
        value_size: of the values; None for hidden_size, with V the identity.
        half_life: tokens after which half is forgotten, at first; None for no forgetting.
        gate_hidden_size: units of the gates' hidden layers.

    `set_head` must be called with the head's rows before use. The states' means and inverse roots are
    buffers, 0 and the identity until `whiten` is called.

    Raises:
        ValueError: for settings outside these domains, naming the first.
    """

    state_mean: Tensor
    state_whitening: Tensor
    code_mean: Tensor
    code_whitening: Tensor

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        *,
        keys: Sequence[Sequence[int]] | None = None,
        features: str = "product",
        feature_size: int | None = None,
        value_size: int | None = None,
        half_life: float | None = 100_000.0,
        gate_hidden_size: int = 64,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, gate_hidden_size=gate_hidden_size)
        optional = dict(feature_size=feature_size, value_size=value_size)
        sizes |= {name: value for name, value in optional.items() if value is not None}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
        if features not in FEATURES:
            raise ValueError(f"features={features!r}: choose one of {', '.join(FEATURES)}")
        if half_life is not None and (type(half_life) not in (int, float) or not 0 < half_life < math.inf):
            raise ValueError(f"half_life={half_life!r}: give a positive number of tokens, or None")
        self.layers = _layers(layers)
        self.keys = _keys(keys, self.layers, features)
        self.hidden_size, self.num_heads = hidden_size, len(self.keys)
        self.features, self.feature_size = features, feature_size or hidden_size
        self.value_size, self.half_life = value_size or hidden_size, half_life
        places = [[self.layers.index(layer) for layer in of_head] for of_head in self.keys]
        count, heads = len(self.layers), self.num_heads
        self.inner = InnerProblem(
            MemoryNetwork(self.value_size, depth=1, key_dim=self.feature_size, residual=False, norm=False)
        )
        self.key_map = KeyMap(hidden_size, places, features, self.feature_size)
        self.value_weight = None
        if value_size is not None:
            self.value_weight = nn.Parameter(torch.empty(heads, value_size, hidden_size))
        forgets = half_life is not None
        self.write_gate = Gate((2 * count + 1) * hidden_size, gate_hidden_size, heads * (1 + forgets))
        self.output_gate = Gate((count + 1) * hidden_size + 2 * heads, gate_hidden_size, heads)
        self.output_weight = nn.Parameter(torch.zeros(heads, hidden_size, self.value_size))
        self.scale = nn.Parameter(torch.zeros(heads))
        self.register_buffer("state_mean", torch.zeros(count, hidden_size))
        self.register_buffer("state_whitening", torch.eye(hidden_size).repeat(count, 1, 1))
        # Known from the head, and therefore not saved.
        self.register_buffer("code_mean", torch.zeros(hidden_size), persistent=False)
        self.register_buffer("code_whitening", torch.eye(hidden_size), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random projections, the same for the same settings, and gates that see nothing but their bias."""
        generator = torch.Generator(self.scale.device).manual_seed(_SEED)
        self.key_map.reset_parameters(generator)
        if self.value_weight is not None:
            for weight in self.value_weight:
                nn.init.orthogonal_(weight, generator=generator)
        for gate in (self.write_gate, self.output_gate):
            gate.reset_parameters(generator)
        self.write_gate.bias[: self.num_heads] = -2.0
        if self.half_life is not None:
            # α = 1 − exp(−softplus(bias)), whose half-life is ln 2 / softplus(bias).
            self.write_gate.bias[self.num_heads :] = math.log(math.expm1(math.log(2) / self.half_life))

    @torch.no_grad()
    def set_head(self, rows: Tensor, scale: float = 1.0) -> None:
        """Set mean, A and the first B.

        Args:
            rows: (vocab, hidden), of the model's head. scale: the factor of its logits.
        """
        found = whitening_of(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        self.code_mean.copy_(found.mean)
        self.code_whitening.copy_(found.root)
        # E_i · A v_j is ‖A (E_j − mean)‖ for i = j, up to what is the same for all i.
        back = found.root / (found.length * scale)
        if self.value_weight is None:
            self.output_weight.copy_(back)
            return
        share = self.hidden_size / self.value_size if self.value_size < self.hidden_size else 1.0
        self.output_weight.copy_(back @ self.value_weight.mT.to(back.dtype) * share)

    @torch.no_grad()
    def whiten(self, states: Sequence[Tensor], floor: float = 0.01) -> None:
        """Set the means and inverse roots from the layers' states (…, hidden) of any text.

        floor: the share of the mean eigenvalue by which each eigenvalue of a covariance is raised.
        """
        found = [whitening_of(x.reshape(-1, self.hidden_size).double(), floor) for x in self._checked(states)]
        self.state_mean.copy_(torch.stack([each.mean for each in found]))
        self.state_whitening.copy_(torch.stack([each.root for each in found]))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> AssociationState:
        """The state of `batch` texts before their first token; at least float32."""
        options = dict(dtype=torch.promote_types(dtype, torch.float32), device=device or self.scale.device)
        return AssociationState(
            torch.zeros(batch, self.num_heads, self.value_size, self.feature_size, **options),
            torch.zeros(batch, len(self.layers), self.hidden_size, **options),
            torch.zeros(batch, dtype=torch.int64, device=options["device"]),
        )

    def forward(
        self,
        states: Sequence[Tensor],
        hidden: Tensor,
        ids: Tensor,
        rows: Tensor,
        state: AssociationState | None = None,
        *,
        lengths: Tensor | None = None,
        frozen: bool = False,
        surprise: bool = False,
    ) -> tuple[Tensor, AssociationState, Tensor | None]:
        """Change the head's input by what is recalled, and learn each token.

        Any split of a text into calls gives the same result. Rows may be at different positions.

        Args:
            states: of each layer in `layers`, (batch, time, hidden).
            hidden: (batch, time, hidden), the head's input, after the final norm.
            ids: (batch, time) int64, the tokens at these positions.
            rows: (vocab, hidden), of the head.
            state: after the tokens before these; None at the start of a text.
            lengths: (batch,) int64, how many of each row are real, and these come first; None for all. The
                others change nothing, and their hidden states are returned unchanged.
            frozen: recall only, and neither learn these tokens nor count them.
            surprise: whether to return ‖W_{t−1} φ(s_{t−1}) − v_t‖² at each token.

        Returns:
            hidden: (batch, time, hidden), in the dtype given.
            state: after these tokens.
            surprise: (batch, time, heads), outside the autograd graph, or None.
        """
        found = self.read(states, hidden, ids, rows, state, lengths=lengths, frozen=frozen, surprise=surprise)
        return found.hidden, found.state, found.surprise

    def read(
        self,
        states: Sequence[Tensor],
        hidden: Tensor,
        ids: Tensor,
        rows: Tensor,
        state: AssociationState | None = None,
        *,
        lengths: Tensor | None = None,
        frozen: bool = False,
        surprise: bool = False,
    ) -> AssociationRead:
        """`forward`, with everything in between."""
        self._check(self._checked(states), hidden, ids, state)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if state is None:
            state = self.initial_state(hidden.shape[0], hidden.device, wide)
        with torch.autocast(autocast_device(hidden), enabled=False):
            return self._read(states, hidden.to(wide), ids, rows, state, lengths, frozen, surprise, hidden)

    def _read(
        self, states: Sequence[Tensor], hidden: Tensor, ids: Tensor, rows: Tensor, state: AssociationState,
        lengths: Tensor | None, frozen: bool, surprise: bool, given: Tensor,
    ) -> AssociationRead:  # fmt: skip
        batch, time, _ = hidden.shape
        wide = hidden.dtype
        real = None
        if lengths is not None:
            real = torch.arange(time, device=ids.device) < lengths[:, None]
        # The token before the first, then these.
        x = torch.cat([state.previous[:, None].to(wide), self._whitened(states, wide)], 1)
        features = self.key_map(x)
        keys, queries = features[:, :-1], features[:, 1:]
        codes = self._codes(ids, rows, wide)
        values = codes[:, :, None].expand(-1, -1, self.num_heads, -1)
        if self.value_weight is not None:
            values = torch.einsum("btd,hvd->bthv", codes, self.value_weight.to(wide))
        memory = MemoryState((state.weight,), (torch.zeros_like(state.weight),), position=state.position)
        write = forget = lost = None
        if frozen:
            reads = memory_read(self.inner, queries, memory)
            if real is not None:
                reads = reads * real[..., None, None]
            if surprise:
                lost = (memory_read(self.inner, keys, memory) - values).square().sum(-1).detach()
        else:
            write, forget = self._write_gates(x, codes)
            # The squared error has no factor ½, so its gradient is twice the error.
            gates = (g[..., None] for g in (forget, torch.zeros_like(write), write / 2))
            reads, memory, lost = memory_scan(
                self.inner, queries, keys, values, *gates, memory, 1, mask=real, return_surprise=True
            )
        if lost is not None and real is not None:
            lost = lost * real[..., None]
        output = self._output_gate(x[:, 1:], hidden, reads)
        scaled = reads * (self.scale.to(wide) * output)[..., None]
        added = torch.einsum("bthv,hdv->btd", scaled, self.output_weight.to(wide))
        last = x[:, -1] if lengths is None else x[torch.arange(batch, device=ids.device), lengths]
        return AssociationRead(
            (hidden + added).to(given.dtype),
            AssociationState(memory.weights[0], last, memory.position),
            lost if surprise else None,
            reads,
            write,
            forget,
            output,
        )

    def _whitened(self, states: Sequence[Tensor], wide: torch.dtype) -> Tensor:
        """(batch, time, layers, hidden), of length 1."""
        means, roots = self.state_mean.to(wide), self.state_whitening.to(wide)
        found = [(s.to(wide) - mean) @ root.mT for s, mean, root in zip(states, means, roots, strict=True)]
        return F.normalize(torch.stack(found, 2), dim=-1)

    def _codes(self, ids: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
        """unit(A (E_j − mean)) of tokens (batch, time), (batch, time, hidden)."""
        centred = rows[ids].to(wide) - self.code_mean.to(wide)
        return F.normalize(centred @ self.code_whitening.to(wide).mT, dim=-1)

    def _write_gates(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """β and α, (batch, time, heads), of x (batch, 1 + time, layers, hidden)."""
        seen = torch.cat([x[:, :-1].flatten(2), x[:, 1:].flatten(2), codes], -1) * self.hidden_size**0.5
        logits = self.write_gate(seen)
        write = torch.sigmoid(logits[..., : self.num_heads])
        if self.half_life is None:
            return write, torch.zeros_like(write)
        return write, -torch.expm1(-F.softplus(logits[..., self.num_heads :]))

    def _output_gate(self, x: Tensor, hidden: Tensor, reads: Tensor) -> Tensor:
        """g, (batch, time, heads)."""
        squares = reads.square().sum(-1)
        # Rounded to 0.01: the root of an empty memory's 0 has no derivative.
        lengths = [(squares + 1e-4).sqrt(), 0.3 * (squares + 1e-4).log()]
        states = x.flatten(2) * self.hidden_size**0.5
        normal = F.rms_norm(hidden, (self.hidden_size,), eps=1e-6)
        return torch.sigmoid(self.output_gate(torch.cat([states, normal, *lengths], -1)))

    def _checked(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        if len(states) != len(self.layers):
            raise ValueError(
                f"states holds {len(states)} tensor(s): give one for each of the layers {self.layers}"
            )
        return states

    def _check(
        self, states: Sequence[Tensor], hidden: Tensor, ids: Tensor, state: AssociationState | None
    ) -> None:
        wanted = (*ids.shape, self.hidden_size)
        for name, x in (("hidden", hidden), *(("states", x) for x in states)):
            if x.dim() != 3 or x.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(x.shape)}: ids need {wanted}")
        wanted = (ids.shape[0], self.num_heads, self.value_size, self.feature_size)
        if state is not None and state.weight.shape != wanted:
            raise ValueError(
                f"state.weight has shape {tuple(state.weight.shape)}: these settings and ids need {wanted}"
            )


def _layers(layers: Sequence[int]) -> tuple[int, ...]:
    found = tuple(layers) if isinstance(layers, (list, tuple)) else ()
    if not found or any(type(layer) is not int or layer < 0 for layer in found):
        raise ValueError(f"layers={layers!r}: give numbers of layers, such as (4, 24)")
    if list(found) != sorted(set(found)):
        raise ValueError(f"layers={layers!r}: give each layer once, in increasing order")
    return found


def _keys(
    keys: Sequence[Sequence[int]] | None, layers: tuple[int, ...], features: str
) -> tuple[tuple[int, ...], ...]:
    if keys is None:
        return tuple((layer, layers[0]) if features == "product" else (layer,) for layer in layers)
    found = tuple(tuple(of_head) if isinstance(of_head, (list, tuple)) else () for of_head in keys)
    if not found or not all(found) or any(layer not in layers for of_head in found for layer in of_head):
        raise ValueError(
            f"keys={keys!r}: give for each head the layers of its key, each one of layers={layers}"
        )
    return found
