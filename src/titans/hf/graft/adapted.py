"""An adaptation over rows of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.nn.adaptation import Adaptation, AdaptationState, Head
from titans.nn.packing import Packed
from titans.state import flatten_alike, map_state


def read_adapted(
    adaptation: Adaptation,
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    state: AdaptationState,
    rows: Packed,
    *,
    frozen: bool,
    keep: int,
    surprise: bool,
) -> tuple[Tensor, AdaptationState, Tensor | None]:
    """Predict and learn; each row gets the result of a batch of one.

    Args:
        hidden: (batch, time, hidden_size) and ids: (batch, time), packed: a row's real tokens come first.
        keep: for how many of the last columns, in the order before packing, to return logits; 0: all.
        frozen, surprise: of `Adaptation.forward`.

    Returns logits (batch, kept, vocab_size) and the surprise (batch, time) at the places before packing, 0
    at padding, and the new state.
    """
    if rows.lengths is None or rows.place is None or rows.kept is None:
        return adaptation(hidden, ids, head, state, frozen=frozen, keep=keep, surprise=surprise)
    batch, time = ids.shape
    kept = min(keep or time, time)
    real, place = rows.kept[:, time - kept :], rows.place[:, time - kept :]
    logits = hidden.new_zeros(batch, kept, adaptation.vocab_size)
    losses = state.bias.new_zeros(batch, time) if surprise else None
    lengths = rows.lengths.tolist()
    for length in sorted({*lengths} - {0}):
        # Rows of one length are read together.
        chosen = torch.tensor([row for row in range(batch) if lengths[row] == length], device=ids.device)
        found, after, lost = adaptation(
            hidden[chosen, :length],
            ids[chosen, :length],
            head,
            map_state(lambda x, chosen=chosen: x[chosen], state),
            frozen=frozen,
            keep=min(keep, length),
            surprise=surprise,
        )
        first = length - found.shape[1]
        at = (place[chosen] - first).clamp(0, found.shape[1] - 1)[..., None].expand(-1, -1, found.shape[2])
        logits[chosen] = torch.where(real[chosen][..., None], found.gather(1, at), 0)
        if losses is not None and lost is not None:
            losses[chosen, :length] = lost
        state = _with_rows(state, chosen, after)
    return logits, state, None if losses is None else rows.unpack(losses)


def _with_rows(state: AdaptationState, rows: Tensor, new: AdaptationState) -> AdaptationState:
    """The state with `new` in these rows (n,)."""
    (old, leaves), structure = flatten_alike((state, new))
    parts = [x.index_copy(0, rows, y) for x, y in zip(old, leaves, strict=True)]
    return pytree.tree_unflatten(parts, structure)
