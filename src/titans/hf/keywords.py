"""Keywords with which transformers, PEFT and TRL call a model, beyond those of `TitansModel.forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Values that ask for what happens anyway.
_GRANTED = {"output_attentions": False, "output_router_logits": False, "is_causal": True}
_REMEDIES = {
    "output_attentions": "a memory has no attention map; see titans.inspection",
    "output_router_logits": "a Titans model has no experts; leave it out",
    "is_causal": "a memory reads forwards; leave it out",
    "num_logits_to_keep": "it is called logits_to_keep",
    "past_key_value": "it is called past_key_values",
    "token_type_ids": "a Titans model knows no segments; leave it out",
}
# Where documents begin, for attention kernels; `position_ids` state it already.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# A cache knows where it is, and `generate` passes the tokenizer of its `stop_strings` on.
_REDUNDANT = ("cache_position", "tokenizer", "assistant_tokenizer")


def check_keywords(keywords: dict[str, Any], position_ids: Tensor | None) -> None:
    """Accept what changes nothing, None above all, and refuse the rest.

    Raises:
        ValueError: for a keyword whose request cannot be met; names it and the remedy.
        TypeError: for a keyword that does not exist.
    """
    for name, value in keywords.items():
        if value is None or name in _REDUNDANT or value is _GRANTED.get(name):
            continue
        if name in _BOUNDARIES:
            if position_ids is None:
                raise ValueError(f"{name}: give position_ids, which restart where a document begins, instead")
        elif name in _REMEDIES:
            raise ValueError(f"{name}={value!r}: {_REMEDIES[name]}")
        else:
            raise TypeError(f"{name}={value!r}: a Titans model's forward has no such keyword; leave it out")


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> None:
    """Raise ValueError unless one of both is given, ids (batch, time) or embeddings (batch, time,
    hidden_size)."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != hidden_size):
        raise ValueError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}: give (batch, time, "
            f"hidden_size={hidden_size})"
        )
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32)):
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}: give (batch, "
            "time) in torch.int64"
        )


def check_targets(labels: Tensor | None, logits_to_keep: int | Tensor, given: Tensor | None) -> None:
    """Raise ValueError for labels or logits that the tokens given do not have, before these are read.

    Args:
        given: (batch, time), or embeddings (batch, time, hidden_size).
    """
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep={logits_to_keep}: give the number of last positions, or 0 for all")
    if labels is not None and given is not None and labels.shape != given.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: give {tuple(given.shape[:2])}, the input ids again"
        )


def real_tokens(attention_mask: Tensor | None, batch: int, time: int, seen: set[int]) -> Tensor | None:
    """Which tokens (batch, time) bool of a call are real; None where all are.

    Args:
        attention_mask: (batch, time), or with the columns seen before as well; 0 for padding.
        seen: how many columns may have been seen before; none is always possible.

    Raises:
        ValueError: for a mask of another shape.
    """
    if attention_mask is None:
        return None
    lengths = {0, *seen}
    if tuple(attention_mask.shape) not in {(batch, n + time) for n in lengths}:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give ({batch}, {time}), or "
            f"({batch}, {max(lengths) + time}) with everything seen; 0 for padding"
        )
    real = attention_mask[:, attention_mask.shape[1] - time :].bool()
    # A compiled graph cannot look, and takes a mask for one that hides something.
    return real if torch.compiler.is_compiling() or not bool(real.all()) else None


def documents_of(position_ids: Tensor | None, real: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The documents that are packed into rows, by the positions that restart.

    Args:
        position_ids: (batch, time) or (1, time) int64. Real tokens of a document have consecutive positions.
        real: (batch, time) bool, False for padding; or None for none.
        shape: (batch, time).

    Returns (batch, time) int64, the number of the document of each token in its row, counted from 0; None
    where each row is one document.

    Raises:
        ValueError: for another shape, or in a compiled model, which cannot look where positions restart.
    """
    if position_ids is None:
        return None
    batch, time = shape
    if tuple(position_ids.shape) not in {(batch, time), (1, time)}:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: give ({batch}, {time}), consecutive "
            "numbers that restart where a document begins"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids in a compiled model: it cannot look where they restart; leave them out"
        )
    position_ids = position_ids.expand(batch, time)
    if real is None:
        restarts = position_ids.diff(dim=1) != 1
    else:
        # Each token is compared with the real one before it.
        columns = torch.arange(time, device=real.device)
        before = torch.where(real, columns, -1).cummax(1).values[:, :-1]
        step = position_ids[:, 1:] - position_ids.gather(1, before.clamp(min=0))
        restarts = (step != 1) & (before >= 0) & real[:, 1:]
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.long().cumsum(1), (1, 0))


class Documents:
    """Where each document of packed rows goes when every one has a row of its own.

    Args:
        documents: (batch, time) int64, of `documents_of`.
        real: (batch, time) bool, or None where no token is padding.
    """

    def __init__(self, documents: Tensor, real: Tensor | None) -> None:
        batch, time = documents.shape
        self._real = torch.ones_like(documents, dtype=torch.bool) if real is None else real
        rows = torch.arange(batch, device=documents.device)[:, None] * time
        _, self._row, lengths = torch.unique_consecutive(
            (rows + documents)[self._real], return_inverse=True, return_counts=True
        )
        begins = lengths.cumsum(0) - lengths
        self._column = torch.arange(len(self._row), device=documents.device) - begins[self._row]
        self.mask = torch.arange(int(lengths.max()), device=documents.device) < lengths[:, None]

    def split(self, x: Tensor) -> Tensor:
        """x (batch, time, ...) as (documents, longest, ...), zeros after each document; see `mask`."""
        rows = x.new_zeros(*self.mask.shape, *x.shape[2:])
        return rows.index_put((self._row, self._column), x[self._real])

    def join(self, rows: Tensor) -> Tensor:
        """What `split` took apart, (batch, time, ...); zeros for padding."""
        x = rows.new_zeros(*self._real.shape, *rows.shape[2:])
        return x.index_put(self._real.nonzero(as_tuple=True), rows[self._row, self._column])
