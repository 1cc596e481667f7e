"""A fast matrix and a fast bias at the head of a language model, updated by its own cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory.precision import autocast_device
from titans.nn.adaptation.head import Head, as_head, curvature
from titans.nn.adaptation.state import AdaptationState
from titans.nn.whitening import whitening_of


class Adaptation(nn.Module):
    """Test-time learning for any language model; the adaptation needs no training.

    h_t is the hidden state that the model's head takes. With features x_t = √d · unit(A (h_t − mean)) the
    logits are

        head(h_t + W x_t) + b,

    and W and b, both 0 at first, minimise the model's loss ℓ_t = −log p(id_{t+1}). Chunks are counted from
    the start of the text, and the weights at a chunk's start predict all its tokens. All its losses are known
    when the first token of the next chunk arrives. Then, before that token's own prediction,

        S ← η S − (1−η) θ Σ_t ∇ℓ_t,     W ← (1−α) W + r S_W,     b ← (1−α) b + S_b.

    A trained start W_0, b_0 is added to both, so that forgetting returns to it.

    A bound on the curvature of the chunk's loss limits the step. In the variables (W / √r, b) the largest
    eigenvalue of its Hessian is at most r λ + C/2. Here λ is the largest eigenvalue of Σ_t κ_t x_t x_tᵀ, κ_t
    (`curvature`) is the curvature of ℓ_t in the adapted state, and ½ is that of any loss in the logits. With

        θ = 2 s / (r λ + C/2),   0 < s < 1,   r = ratio / (d · row_variance),

    a step of gradient descent does not increase the distance ‖W‖²/r + ‖b‖² of two states wherever the
    curvature stays below 2/θ. This would be certain if κ_t bounded the curvature at every prediction, but
    that bound is far larger than what text reaches. κ_t is the maximum over the predictions between the
    present one and the label, and tests check the distance on hostile streams. λ is computed as
    (Σ λ_i⁸)^⅛ ≥ λ over all eigenvalues, from three products of C × C matrices. After t < warm_up
    tokens θ is t / warm_up of that: the first lines of a text, such as a list of persons, may teach what
    misleads in the next.

    Args:
        hidden_size: d. vocab_size: that of the head.
        row_variance: of the model's head, `LinearHead(weight).row_variance()`; the unit of `ratio`.
        chunk_size: C.
        step: s at first. ratio: how fast the matrix learns compared with the bias, at first.
        half_life: tokens after which half is forgotten, at first; None for no forgetting.
        momentum: η at first, in [0, 1).
        warm_up: tokens of a text during which the step grows to its full size; 0 for none.
        learned_start: whether there are W_0 and b_0, zeros at first, to be trained through the updates.

    The mean and A are buffers, 0 and the identity until `whiten` is called.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        row_variance: float,
        *,
        chunk_size: int = 32,
        step: float = 0.9,
        ratio: float = 3.0,
        half_life: float | None = None,
        momentum: float = 0.0,
        warm_up: int = 512,
        learned_start: bool = False,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, vocab_size=vocab_size, chunk_size=chunk_size, warm_up=warm_up)
        numbers = dict(row_variance=row_variance, step=step, ratio=ratio, momentum=momentum)
        for name, value in {**numbers, **({} if half_life is None else {"half_life": half_life})}.items():
            if type(value) not in (int, float):
                raise ValueError(f"{name} must be a number, not {value!r}")
        for name, value in sizes.items():
            if type(value) is not int:
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        limits = (
            ("hidden_size", hidden_size >= 1, "at least 1"),
            ("vocab_size", vocab_size >= 1, "at least 1"),
            ("chunk_size", chunk_size >= 1, "at least 1"),
            ("row_variance", 0 < row_variance < math.inf, "positive"),
            ("step", 0 < step < 1, "between 0 and 1"),
            ("ratio", 0 < ratio < math.inf, "positive"),
            ("half_life", half_life is None or 0 < half_life < math.inf, "positive, or None"),
            ("momentum", 0 <= momentum < 1, "in [0, 1)"),
            ("warm_up", warm_up >= 0, "at least 0"),
        )
        for name, holds, rule in limits:
            if not holds:
                raise ValueError(f"{name} must be {rule}, not {locals()[name]}")
        self.hidden_size, self.vocab_size, self.chunk_size = hidden_size, vocab_size, chunk_size
        self.row_variance, self.warm_up = float(row_variance), warm_up
        self.step_logit = nn.Parameter(torch.tensor(_logit(step)))
        self.log_ratio = nn.Parameter(torch.tensor(math.log(ratio)))
        self.log_half_life = None if half_life is None else nn.Parameter(torch.tensor(math.log(half_life)))
        self.momentum_logit = nn.Parameter(torch.tensor(_logit(momentum))) if momentum else None
        self.start_weight = nn.Parameter(torch.zeros(hidden_size, hidden_size)) if learned_start else None
        self.start_bias = nn.Parameter(torch.zeros(vocab_size)) if learned_start else None
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("whitening", torch.eye(hidden_size))

    @torch.no_grad()
    def whiten(self, hidden: Tensor, floor: float = 0.01) -> None:
        """Set the mean and A from hidden states (..., hidden_size) of any text.

        A is the symmetric inverse root of their covariance, whose eigenvalues are raised by `floor` of their
        mean.

        Raises:
            ValueError: for states that are all the same, or not finite.
        """
        found = whitening_of(hidden.reshape(-1, self.hidden_size).double(), floor)
        self.mean.copy_(found.mean)
        self.whitening.copy_(found.root)

    def initial_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> AdaptationState:
        """The state of `batch` texts before their first token; at least float32."""
        dtype = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device or self.mean.device)

        d, v, c = self.hidden_size, self.vocab_size, self.chunk_size
        momentum = () if self.momentum_logit is None else (zeros(d, d), zeros(v))
        return AdaptationState(
            zeros(d, d), zeros(v), momentum, zeros(dtype=torch.int64), zeros(c, d), zeros(c, d), zeros(c),
            zeros(v), zeros(d), zeros(v), zeros(d), zeros(), zeros(dtype=torch.int64),
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,
        ids: Tensor,
        head: Head | Tensor,
        state: AdaptationState | None = None,
        *,
        frozen: bool = False,
        keep: int = 0,
        surprise: bool = False,
    ) -> tuple[Tensor, AdaptationState, Tensor | None]:
        """Predict each token with the current fast weights, and learn from each label when it is known.

        Any split of a text into calls gives the same result. Rows may be at different positions.

        Args:
            hidden: (batch, time, hidden), the head's input at each token, after the final norm.
            ids: (batch, time) int64, the tokens at these positions: each is the label of the one before.
            head: a `Head`, or the weight (vocab, hidden) of a linear one.
            state: after the tokens before these; None at the start of a text.
            frozen: predict only; neither learn from the tokens nor count them.
            keep: how many of the last positions to return logits for, 0 for all.
            surprise: whether to return the loss at each token.

        Returns:
            logits: (batch, kept, vocab), in the dtype of `hidden`.
            state: after these tokens.
            surprise: (batch, time), −log p of each token under the prediction before it, 0 for the first of a
                text; or None.
        """
        self._check(hidden, ids, state)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if state is None:
            state = self.initial_state(hidden.shape[0], hidden.device, wide)
        with torch.autocast(autocast_device(hidden), enabled=False):
            return self._read(hidden, ids, as_head(head), state, frozen, keep, surprise)

    def _check(self, hidden: Tensor, ids: Tensor, state: AdaptationState | None) -> None:
        if hidden.dim() != 3 or hidden.shape[-1] != self.hidden_size or ids.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden must be (batch, time, {self.hidden_size}) and ids (batch, time), not "
                f"{tuple(hidden.shape)} and {tuple(ids.shape)}"
            )
        wanted = (hidden.shape[0], self.chunk_size, self.hidden_size)
        if state is not None and (state.inputs.shape != wanted or state.bias.shape[-1] != self.vocab_size):
            raise ValueError(
                f"the state is one of (batch, chunk_size, hidden_size) {tuple(state.inputs.shape)} and a "
                f"vocabulary of {state.bias.shape[-1]}; this needs {wanted} and {self.vocab_size}"
            )

    def _read(
        self, hidden: Tensor, ids: Tensor, head: Head, state: AdaptationState, frozen: bool, keep: int,
        surprise: bool,
    ) -> tuple[Tensor, AdaptationState, Tensor | None]:  # fmt: skip
        batch, time, _ = hidden.shape
        if not time:
            return hidden.new_zeros(batch, 0, self.vocab_size), state, state.bias[:, :0] if surprise else None
        if frozen and keep and not surprise:
            # Nothing is learned from the others, and nobody looks at them.
            hidden, ids, time = hidden[:, -keep:], ids[:, -keep:], min(time, keep)
        kept_from = max(time - keep, 0) if keep else 0
        # Rows in the middle of a chunk are moved right by as many slots as they are ahead of the last row, so
        # that all of them begin a chunk in the same slot.
        phases = (state.position % self.chunk_size).tolist()
        first = min(phases, default=0)
        shift = [phase - first for phase in phases]
        slots = time + max(shift, default=0)
        rows = torch.arange(batch, device=ids.device)[:, None]
        offset = torch.tensor(shift, device=ids.device)
        if any(shift):
            times = torch.arange(slots, device=ids.device) - offset[:, None]
            real = (times >= 0) & (times < time)
            place = times.clamp(0, time - 1)
            hidden, ids = hidden[rows, place], ids[rows, place]
        else:
            real = torch.ones_like(ids, dtype=torch.bool)
        logits, losses = [], []
        for start, stop, column in self._segments(slots, first):
            part = slice(start, stop)
            if not frozen:
                state = self._labels(head, state, ids[:, part], real[:, part], column, hidden.dtype)
                begins = real[:, start] & (state.position > 0)
                if column == 0 and begins.any():
                    state = self._update(state, begins)
            some, loss, state = self._predict(
                hidden[:, part], ids[:, part], real[:, part], head, state, column, frozen
            )
            if stop > kept_from:
                logits.append(some[:, max(kept_from - start, 0) :].to(hidden.dtype))
            losses.append(loss)
        found, lost = torch.cat(logits, 1), torch.cat(losses, 1)
        if any(shift):
            back = torch.arange(time, device=ids.device) + offset[:, None]
            found, lost = found[rows, back[:, kept_from:] - kept_from], lost[rows, back]
        return found, state, lost if surprise else None

    def _segments(self, slots: int, column: int) -> Iterator[tuple[int, int, int]]:
        """Cuts of a call at the ends of chunks: first slot, end, and place of the first in its chunk."""
        start = 0
        while start < slots:
            stop = min(start + self.chunk_size - column, slots)
            yield start, stop, column
            start, column = stop, 0

    def _labels(
        self, head: Head, state: AdaptationState, ids: Tensor, real: Tensor, column: int, dtype: torch.dtype
    ) -> AdaptationState:
        """Learn the loss of the last token before this segment; its label is each row's first real token."""
        learns = real.any(1) & state.awaits.bool()
        first = real.int().argmax(1)
        label = ids.gather(1, first[:, None])
        probs = state.log_probs.exp()
        error = state.mean - head.row(state.pending.to(dtype), label[:, 0], probs.dtype)
        curved = curvature(state.trace, error)
        in_logits = torch.where(learns[:, None], _minus_one_at(probs, label), 0)
        place = (column + first - 1) % self.chunk_size
        at = (torch.arange(self.chunk_size, device=ids.device) == place[:, None]) & learns[:, None]
        return replace(
            state,
            errors=torch.where(at[..., None], error[:, None], state.errors),
            curvatures=torch.where(at, curved[:, None], state.curvatures),
            bias_gradient=state.bias_gradient + in_logits,
            awaits=torch.where(learns, 0, state.awaits),
        )

    def _update(self, state: AdaptationState, rows: Tensor) -> AdaptationState:
        """End a chunk in the rows (batch,) that begin the next."""
        wide = state.bias.dtype
        every = bool(rows.all())

        def begun(new: Tensor, old: Tensor) -> Tensor:
            return new if every else torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new, old)

        weight_gradient = state.errors.transpose(1, 2) @ state.inputs
        # The eigenvalues of Σ κ x xᵀ that are not 0 are those of its Gram matrix.
        gram = state.inputs @ state.inputs.transpose(1, 2)
        gram = gram * (state.curvatures[:, :, None] * state.curvatures[:, None]).clamp_min(1e-30).sqrt()
        scale = self.log_ratio.to(wide).exp() / (self.hidden_size * self.row_variance)
        bound = scale * _largest_eigenvalue(gram) + self.chunk_size / 2
        step = 2 * torch.sigmoid(self.step_logit.to(wide)) / bound
        if self.warm_up:
            step = step * (state.position.to(wide) / self.warm_up).clamp_max(1)
        changes = (
            -(step * scale)[:, None, None] * weight_gradient,
            -step[:, None] * state.bias_gradient,
        )
        momentum = state.momentum
        if self.momentum_logit is not None:
            eta = torch.sigmoid(self.momentum_logit.to(wide))
            changes = tuple(eta * s + (1 - eta) * c for s, c in zip(momentum, changes, strict=True))
            momentum = tuple(begun(c, s) for s, c in zip(momentum, changes, strict=True))
        left = 1.0
        if self.log_half_life is not None:
            left = torch.exp2(-self.chunk_size * (-self.log_half_life.to(wide)).exp())
        return replace(
            state,
            weight=begun(left * state.weight + changes[0], state.weight),
            bias=begun(left * state.bias + changes[1], state.bias),
            momentum=momentum,
            inputs=begun(torch.zeros_like(state.inputs), state.inputs),
            errors=begun(torch.zeros_like(state.errors), state.errors),
            curvatures=begun(torch.zeros_like(state.curvatures), state.curvatures),
            bias_gradient=begun(torch.zeros_like(state.bias_gradient), state.bias_gradient),
        )

    def _predict(
        self, hidden: Tensor, ids: Tensor, real: Tensor, head: Head, state: AdaptationState, column: int,
        frozen: bool,
    ) -> tuple[Tensor, Tensor, AdaptationState]:  # fmt: skip
        """Predict within one chunk, and learn the losses whose labels are in it.

        Returns:
            logits (batch, slots, vocab), losses (batch, slots), state.
        """
        wide = state.bias.dtype
        features = self._features(hidden.to(wide))
        weight, bias = state.weight, state.bias
        if self.start_weight is not None and self.start_bias is not None:
            weight, bias = weight + self.start_weight.to(wide), bias + self.start_bias.to(wide)
        adapted = hidden.to(wide) + features @ weight.transpose(1, 2)
        given = adapted.to(hidden.dtype)
        raw = head.logits(given)
        logits = raw.to(wide) + bias[:, None]
        log_probs = logits.log_softmax(-1)
        count = real.sum(1)
        first = real.int().argmax(1)
        # A label is the next token's id; the first real token is the label of the state's last one.
        labelled = real[:, :-1] & real[:, 1:]
        labels = ids[:, 1:]
        losses = -log_probs[:, :-1].gather(2, labels[..., None])[..., 0]
        losses = torch.where(labelled, losses, 0)
        losses = torch.cat([losses.new_zeros(len(ids), 1), losses], 1)
        arrived = -state.log_probs.gather(1, ids.gather(1, first[:, None]))
        losses = losses.scatter_add(1, first[:, None], torch.where(real.any(1, keepdim=True), arrived, 0))
        last = (first + count - 1).clamp_min(0)[:, None, None]
        some = (count > 0)[:, None]
        state = replace(
            state,
            pending=torch.where(some, adapted.take_along_dim(last, 1)[:, 0], state.pending),
            log_probs=torch.where(some, log_probs.take_along_dim(last, 1)[:, 0], state.log_probs),
            awaits=torch.where(count > 0, 0 if frozen else 1, state.awaits),
        )
        if frozen:
            return logits, losses, state
        probs = log_probs.exp()
        mean, trace = head.moments(given, probs, raw)
        error = mean[:, :-1] - head.row(given[:, :-1], labels, wide)
        curved = curvature(trace[:, :-1], error)
        # Σ over the labelled tokens of p minus one at the label, without another tensor as large as p.
        counted = labelled.to(wide)
        in_logits = (counted[:, None] @ probs[:, :-1])[:, 0].scatter_add(1, labels, -counted)

        def written(old: Tensor, new: Tensor, real: Tensor) -> Tensor:
            """The chunk's tensor `old` with `new` in the places of this segment, where real."""
            end = column + new.shape[1]
            real = real if new.dim() == 2 else real[..., None]
            return torch.cat([old[:, :column], torch.where(real, new, old[:, column:end]), old[:, end:]], 1)

        state = replace(
            state,
            inputs=written(state.inputs, features, real),
            errors=written(state.errors, error, labelled),
            curvatures=written(state.curvatures, curved, labelled),
            bias_gradient=state.bias_gradient + in_logits,
            mean=torch.where(some, mean.take_along_dim(last, 1)[:, 0], state.mean),
            trace=torch.where(count > 0, trace.take_along_dim(last[..., 0], 1)[:, 0], state.trace),
            position=state.position + count,
        )
        return logits, losses, state

    def _features(self, hidden: Tensor) -> Tensor:
        centred = (hidden - self.mean.to(hidden.dtype)) @ self.whitening.to(hidden.dtype).T
        return F.rms_norm(centred, (self.hidden_size,), eps=1e-6)


def _minus_one_at(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.scatter_add(-1, labels, -torch.ones_like(probs[..., :1]))


def _logit(share: float) -> float:
    return math.log(share) - math.log1p(-share)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """(Σ λ_i⁸)^⅛ of positive semidefinite matrices (batch, n, n) → (batch,): λ to n^⅛ λ; 0 for zeros."""
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)
    tiny = 1e-30
    fourth = torch.linalg.matrix_power(gram / (trace + tiny)[:, None, None], 4)
    return trace * (fourth.square().sum((1, 2)) + tiny) ** 0.125
