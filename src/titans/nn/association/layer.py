"""A memory that recalls, from a frozen language model's states, which word followed such a context."""

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
from titans.nn.association.keys import KeyMap, Salience
from titans.nn.association.state import AssociationState
from titans.nn.association.words import Words
from titans.nn.packing import newest
from titans.nn.whitening import whitening_of

# Any: the memory is the same whenever and wherever it is made with the same settings.
_SEED = 0
# Logits of λ and β at first, and τ.
_MIXING, _WRITING, _SHARPNESS = -3.0, -2.0, 20.0
# A λ below this counts as 0: the loss of a word is not changed by more than 1e-4 nats upwards.
LEAST_SHARE = 1e-4
# Tokens whose predictions are mixed at once.
_AT_ONCE = 64


@dataclass(frozen=True)
class AssociationRead:
    """What an association did with some tokens; float32 at least.

    reads: (batch, time, hidden), r_t. mixing: (batch, time), the logit of λ. state: after these tokens.
    surprise: (batch, time), ‖W_{t−1} φ_{t−1} − v_t‖² outside the autograd graph, or None. write, write_logit,
    forget: (batch, time), the gate β and its logit, and α; None while frozen.
    """

    reads: Tensor
    mixing: Tensor
    state: AssociationState
    surprise: Tensor | None
    write: Tensor | None
    write_logit: Tensor | None
    forget: Tensor | None


class Association(nn.Module):
    """An associative memory whose prediction is mixed with that of a frozen language model.

    A fast matrix W, 0 at first, learns by the gated delta rule, which is equations 12 to 15 of the Titans
    paper with a linear memory, no momentum and chunks of one token:

        W_t = (1 − α_t) W_{t−1} − β_t (W_{t−1} φ_{t−1} − v_t) φ_{t−1}ᵀ,      r_t = W_t φ_t.

    φ_t are features of the last words up to token t and of the model's states at t (`KeyMap`), v_t is the
    code of token t (`Words`). The key is that of the token *before*: a later context like that before token t
    recalls it. ‖φ‖ < 1, so any β ≤ 1 is stable. β_t and α_t are functions of the states at t − 1 and t and of
    v_t. The prediction of the next word is

        p = (1 − λ_t) p_model + λ_t softmax_j(τ v_j · r_t),

    where λ_t in (0, 1) is a function of the states at t, the head's input and ‖r_t‖. So −log p exceeds the
    model's loss by −log(1 − λ_t) at most. λ_t counts as 0 below 1e-4, and where r_t is 0 because nothing was
    learned. Until the buffer `trained` is 1, `mix` changes nothing.

    Args:
        hidden_size, vocab_size: of the model's head.
        layers: the layers whose states `read` gets, as a caller numbers them, increasing. The gates see all.
        key_layers: those of which keys are made; None for the last.
        num_ordered, num_topic: how many of the last words keys are made of, with their order and without.
        feature_size: of φ; None for 2 · hidden_size.
        half_life: tokens after which half is forgotten, at first; None for no forgetting.
        gate_hidden_size: units of the gates' hidden layers.

    `set_head` must be called with the head's rows before use. The means and inverse roots of the states are
    buffers, 0 and the identity until `whiten` is called.

    Raises:
        ValueError: for settings outside these domains, naming the first.
    """

    state_mean: Tensor
    state_whitening: Tensor
    trained: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        layers: Sequence[int],
        *,
        key_layers: Sequence[int] | None = None,
        num_ordered: int = 4,
        num_topic: int = 24,
        feature_size: int | None = None,
        half_life: float | None = None,
        gate_hidden_size: int = 64,
    ) -> None:
        super().__init__()
        sizes = dict(
            hidden_size=hidden_size, vocab_size=vocab_size, num_ordered=num_ordered, num_topic=num_topic,
            feature_size=2 * hidden_size if feature_size is None else feature_size,
            gate_hidden_size=gate_hidden_size,
        )  # fmt: skip
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
        if half_life is not None and (type(half_life) not in (int, float) or not 0 < half_life < math.inf):
            raise ValueError(f"half_life={half_life!r}: give a positive number of tokens, or None")
        self.layers = _numbers("layers", layers)
        self.key_layers = self.layers[-1:] if key_layers is None else _numbers("key_layers", key_layers)
        if not {*self.key_layers} <= {*self.layers}:
            raise ValueError(f"key_layers={key_layers!r}: give some of layers={self.layers}")
        self.hidden_size, self.feature_size = hidden_size, sizes["feature_size"]
        self.half_life = half_life
        count = len(self.layers)
        self.inner = InnerProblem(
            MemoryNetwork(hidden_size, depth=1, key_dim=self.feature_size, residual=False, norm=False)
        )
        self.key_map = KeyMap(hidden_size, num_ordered, num_topic, len(self.key_layers), self.feature_size)
        self.num_recent = self.key_map.num_recent
        self.salience = Salience(hidden_size, count)
        self.write_gate = Gate((2 * count + 1) * hidden_size, gate_hidden_size, 1 if half_life is None else 2)
        self.mixing_gate = Gate((count + 1) * hidden_size + 2, gate_hidden_size, 1)
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))
        self.words = Words(hidden_size, vocab_size)
        self.register_buffer("state_mean", torch.zeros(count, hidden_size))
        self.register_buffer("state_whitening", torch.eye(hidden_size).repeat(count, 1, 1))
        self.register_buffer("trained", torch.zeros(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random features, the same for the same settings, and gates that see nothing but their bias."""
        generator = torch.Generator(self.trained.device).manual_seed(_SEED)
        for part in (self.key_map, self.write_gate, self.mixing_gate):
            part.reset_parameters(generator)
        self.mixing_gate.bias.fill_(_MIXING)
        self.write_gate.bias[0] = _WRITING
        if self.half_life is not None:
            # α = 1 − exp(−softplus(bias)), whose half-life is ln 2 / softplus(bias).
            self.write_gate.bias[1] = math.log(math.expm1(math.log(2) / self.half_life))
        self.trained.zero_()

    def set_head(self, rows: Tensor) -> None:
        """Take the codes of words from the rows (vocab, hidden) of the model's head."""
        self.words.set_rows(rows)

    @torch.no_grad()
    def whiten(self, states: Sequence[Tensor], floor: float = 0.1) -> None:
        """Set the means and inverse roots from the layers' states (…, hidden) of any text.

        The first token of a text should be left out: many models give it states far from all others.

        Args:
            floor: the share of the mean eigenvalue by which each eigenvalue of a covariance is raised.

        Raises:
            ValueError: for states that are all the same, or not finite.
        """
        self._check_count(states)
        found = [whitening_of(x.reshape(-1, self.hidden_size).double(), floor) for x in states]
        self.state_mean.copy_(torch.stack([each.mean for each in found]))
        self.state_whitening.copy_(torch.stack([each.root for each in found]))

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> AssociationState:
        """The state of `batch` texts before their first token; at least float32."""
        dtype, device = torch.promote_types(dtype, torch.float32), device or self.trained.device
        return AssociationState(
            torch.zeros(batch, self.hidden_size, self.feature_size, dtype=dtype, device=device),
            torch.zeros(batch, len(self.layers), self.hidden_size, dtype=dtype, device=device),
            torch.full((batch, self.num_recent), -1, device=device),
            torch.zeros(batch, self.num_recent, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def forward(self, *args: Tensor | Sequence[Tensor], **options: object) -> AssociationRead:
        """`read`."""
        return self.read(*args, **options)  # type: ignore[arg-type]

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
        """Learn each token, and recall what followed contexts like its own.

        Any split of a text into calls gives the same result. Rows may be at different positions.

        Args:
            states: of each layer in `layers`, (batch, time, hidden).
            hidden: (batch, time, hidden), the head's input, after the final norm.
            ids: (batch, time) int64, the tokens at these positions.
            rows: (vocab, hidden), of the head.
            state: after the tokens before these; None at the start of a text.
            lengths: (batch,) int64, how many of each row are real, and these come first; None for all. The
                others change no state, and recall 0.
            frozen: recall only, and neither learn these tokens nor count them. The token after them is
                learned with the last of them as its context.
            surprise: whether to return ‖W_{t−1} φ_{t−1} − v_t‖² at each token, 1 for the first of a text.
        """
        self._check(states, hidden, ids, state)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if state is None:
            state = self.initial_state(hidden.shape[0], hidden.device, wide)
        with torch.autocast(autocast_device(hidden), enabled=False):
            return self._read(states, hidden.to(wide), ids, rows, state, lengths, frozen, surprise)

    def word_logits(self, reads: Tensor, rows: Tensor, chosen: Tensor | None = None) -> Tensor:
        """τ v_j · r, the logits of what is recalled.

        Args:
            reads: (…, hidden), r.
            rows: (vocab, hidden), of the head, or those of the chosen words. Their precision is that of the
                product.
            chosen: (n,) int64, which words the rows are of; None for all.

        Returns (…, n), in the dtype of `reads`.
        """
        return self.log_sharpness.to(reads.dtype).exp() * self.words.products(reads, rows, chosen)

    def mix(self, logits: Tensor, reads: Tensor, mixing: Tensor, rows: Tensor) -> Tensor:
        """The model's prediction mixed with what is recalled; unchanged until `trained` is 1.

        Args:
            logits: (batch, time, vocab), of the model.
            reads: (batch, time, hidden) and mixing: (batch, time), of `read`.
            rows: (vocab, hidden), of the head.

        Returns logits (batch, time, vocab), whose normaliser is that of the logits given. Where λ counts as 0
        they are the logits given.
        """
        counts = (torch.sigmoid(mixing) >= LEAST_SHARE) & reads.any(-1)
        if not self.trained or not bool(counts.any()):
            return logits
        with torch.autocast(autocast_device(logits), enabled=False):
            given = logits[counts].split(_AT_ONCE)
            pieces = zip(given, reads[counts].split(_AT_ONCE), mixing[counts].split(_AT_ONCE), strict=True)
            mixed = [self._mixed(own, r, m[:, None], rows).to(logits.dtype) for own, r, m in pieces]
        return logits.index_put(counts.nonzero(as_tuple=True), torch.cat(mixed))

    def _mixed(self, logits: Tensor, reads: Tensor, mixing: Tensor, rows: Tensor) -> Tensor:
        logits = logits.to(reads.dtype)
        recalled = self.word_logits(reads, rows).log_softmax(-1) + logits.logsumexp(-1, keepdim=True)
        return torch.logaddexp(F.logsigmoid(-mixing) + logits, F.logsigmoid(mixing) + recalled)

    def _read(
        self, states: Sequence[Tensor], hidden: Tensor, ids: Tensor, rows: Tensor, state: AssociationState,
        lengths: Tensor | None, frozen: bool, surprise: bool,
    ) -> AssociationRead:  # fmt: skip
        batch, time, _ = hidden.shape
        wide = hidden.dtype
        real = None
        if lengths is not None:
            real = torch.arange(time, device=ids.device) < lengths[:, None]
        # The tokens before the first, then these.
        codes = self.words.codes(torch.cat([state.recent, ids], 1), rows, wide)
        whitened = torch.cat([state.states[:, None].to(wide), self._whitened(states, wide)], 1)
        in_keys = whitened[:, :, [self.layers.index(layer) for layer in self.key_layers]]
        salience = self.salience(whitened[:, 1:], codes[:, self.num_recent :])
        salience = torch.cat([state.salience.to(wide), salience], 1)
        features = self.key_map(codes, salience, in_keys)[:, :, None]
        keys, queries = features[:, :-1], features[:, 1:]
        values = codes[:, self.num_recent :, None]
        weight = state.weight[:, None]
        memory = MemoryState((weight,), (torch.zeros_like(weight),), position=state.position)
        write = write_logit = forget = lost = None
        if frozen:
            reads = memory_read(self.inner, queries, memory)
            if real is not None:
                reads = reads * real[..., None, None]
            if surprise:
                lost = (memory_read(self.inner, keys, memory) - values).square().sum(-1).detach()
        else:
            write_logit, forget = self._write_gates(whitened, values[:, :, 0])
            write = torch.sigmoid(write_logit)
            # The squared error has no factor ½, so its gradient is twice the error.
            gates = (g[..., None, None] for g in (forget, torch.zeros_like(write), write / 2))
            reads, memory, lost = memory_scan(
                self.inner, queries, keys, values, *gates, memory, 1, mask=real, return_surprise=True
            )
        if lost is not None:
            lost = lost[..., 0] if real is None else lost[..., 0] * real
        last = (
            whitened[:, -1] if lengths is None else whitened[torch.arange(batch, device=ids.device), lengths]
        )
        recent = newest(state.recent, ids, lengths, self.num_recent)
        salience = newest(state.salience, salience[:, self.num_recent :], lengths, self.num_recent)
        return AssociationRead(
            reads[:, :, 0],
            self._mixing(whitened[:, 1:], hidden, reads[:, :, 0]),
            AssociationState(memory.weights[0][:, 0], last, recent, salience, memory.position),
            lost if surprise else None,
            write,
            write_logit,
            forget,
        )

    def _whitened(self, states: Sequence[Tensor], wide: torch.dtype) -> Tensor:
        """(batch, time, layers, hidden), of length 1."""
        means, roots = self.state_mean.to(wide), self.state_whitening.to(wide)
        found = [(s.to(wide) - mean) @ root for s, mean, root in zip(states, means, roots, strict=True)]
        return F.normalize(torch.stack(found, 2), dim=-1)

    def _write_gates(self, whitened: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of β, and α, (batch, time), of whitened (batch, 1 + time, layers, hidden)."""
        seen = torch.cat([whitened[:, :-1].flatten(2), whitened[:, 1:].flatten(2), codes], -1)
        logits = self.write_gate(seen * self.hidden_size**0.5)
        if self.half_life is None:
            return logits[..., 0], torch.zeros_like(logits[..., 0])
        return logits[..., 0], -torch.expm1(-F.softplus(logits[..., 1]))

    def _mixing(self, whitened: Tensor, hidden: Tensor, reads: Tensor) -> Tensor:
        """The logit of λ, (batch, time)."""
        # Rounded to 0.01: the root of an empty memory's 0 has no derivative.
        square = reads.square().sum(-1, keepdim=True) + 1e-4
        states = whitened.flatten(2) * self.hidden_size**0.5
        normal = F.rms_norm(hidden, (self.hidden_size,), eps=1e-6)
        seen = torch.cat([states, normal, 3 * square.sqrt(), 0.3 * square.log()], -1)
        return self.mixing_gate(seen)[..., 0]

    def _check_count(self, states: Sequence[Tensor]) -> None:
        if len(states) != len(self.layers):
            raise ValueError(
                f"states holds {len(states)} tensor(s): give one for each of the layers {self.layers}"
            )

    def _check(
        self, states: Sequence[Tensor], hidden: Tensor, ids: Tensor, state: AssociationState | None
    ) -> None:
        self._check_count(states)
        wanted = (*ids.shape, self.hidden_size)
        for name, x in (("hidden", hidden), *(("states", x) for x in states)):
            if x.dim() != 3 or x.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(x.shape)}: ids need {wanted}")
        wanted = (ids.shape[0], self.hidden_size, self.feature_size)
        if state is not None and state.weight.shape != wanted:
            raise ValueError(
                f"state.weight has shape {tuple(state.weight.shape)}: these settings and ids need {wanted}"
            )


def _numbers(name: str, layers: Sequence[int]) -> tuple[int, ...]:
    found = tuple(layers) if isinstance(layers, (list, tuple)) else ()
    if not found or any(type(layer) is not int or layer < 0 for layer in found):
        raise ValueError(f"{name}={layers!r}: give numbers of layers, such as (16, 24)")
    if list(found) != sorted(set(found)):
        raise ValueError(f"{name}={layers!r}: give each layer once, in increasing order")
    return found
