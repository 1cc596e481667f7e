"""An LSTM: a baseline without a memory, whose state is two vectors (Hochreiter and Schmidhuber 1997)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from titans.memory.precision import autocast_device
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.norm import RMSNorm
from titans.state import register_state


@register_state
@dataclass(frozen=True)
class LSTMState:
    """hidden, cell: (batch, hidden_size) each, in at least float32."""

    hidden: Tensor
    cell: Tensor


class LSTMBlock(nn.Module):
    """x + LSTM(norm(x)). The state's width is hidden_size; heads are not used."""

    has_memory = False

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        self.norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.lstm = _RememberingLSTM(settings.hidden_size, settings.hidden_size, batch_first=True)

    def initial_state(self, batch: int) -> LSTMState:
        """Zeros."""
        weight = self.norm.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(batch, weight.shape[0], dtype=dtype, device=weight.device)
        return LSTMState(zeros, zeros.clone())

    def fresh_context(self, state: LSTMState) -> LSTMState:
        """An initial state: nothing is kept, for there is no memory."""
        return self.initial_state(state.cell.shape[0])

    def forward(self, x: Tensor, state: LSTMState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        lengths = context.packed.lengths
        if lengths is None:
            lengths = x.new_full((x.shape[0],), x.shape[1], dtype=torch.int64)
        rows = lengths.nonzero().squeeze(1)  # a row without a token keeps its state
        y = torch.zeros_like(x)
        if not len(rows):
            return BlockResult(x, state)
        with torch.autocast(autocast_device(x), enabled=False):
            wide = self.norm(x)[rows].to(state.cell.dtype)
            packed = pack_padded_sequence(wide, lengths[rows].cpu(), batch_first=True, enforce_sorted=False)
            before = state.hidden[rows][None], state.cell[rows][None]
            weights = {name: weight.to(wide.dtype) for name, weight in self.lstm.named_parameters()}
            found, (hidden, cell) = torch.func.functional_call(self.lstm, weights, (packed, before))
            read, _ = pad_packed_sequence(found, batch_first=True, total_length=x.shape[1])
        y = y.index_copy(0, rows, read.to(x.dtype))
        after = LSTMState(
            state.hidden.index_copy(0, rows, hidden[0]), state.cell.index_copy(0, rows, cell[0])
        )
        return BlockResult(x + y, after)


class _RememberingLSTM(nn.LSTM):
    """Its forget gates are open at first (Jozefowicz, Zaremba and Sutskever 2015)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            _, forget, *_ = self.get_parameter("bias_ih_l0").chunk(4)
            forget.fill_(1.0)
