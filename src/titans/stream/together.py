"""Many readers of one model in one forward call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from titans.hf import TitansCache
from titans.memory import MemoryState
from titans.nn.attention.full import FullAttentionState
from titans.state import flatten_alike, map_state
from titans.stream.model import reading
from titans.stream.reader import TitansReader, initial_states
from titans.stream.session import PIECE_LENGTH, Session
from titans.stream.text import token_ids


def feed_together(sessions: Sequence[Session], texts: Sequence[Any]) -> None:
    """Feed each session its own text, all of them in one call of the model: what `feed` does one by one.

    Interrupted, every session ends after its last whole piece of 2048 tokens. Models other than Titans read
    one session after the other.

    Args:
        sessions: of one model, each once; they may have read as much or as little as they like.
        texts: for each session a string, bytes or token ids, of any length.

    Raises:
        ValueError: for sessions of several models or one given twice, for another number of texts, or for a
            text that `feed` refuses; then nothing was read.
        RuntimeError: while one of them has a stream of generated text open.
    """
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts is one {type(texts).__name__}: give a sequence with a text for each session")
    if len(texts) != len(sessions):
        raise ValueError(f"texts has {len(texts)} entries: give one for each of the {len(sessions)} sessions")
    if len({id(session) for session in sessions}) < len(sessions):
        raise ValueError("sessions has one session twice: fork() it to read two texts")
    if len({id(session.model) for session in sessions}) > 1:
        raise ValueError("sessions has sessions of several models: feed those of one model at a time")
    left = [
        token_ids(text, session.tokenizer, session.reader.vocab_size)
        for session, text in zip(sessions, texts, strict=True)
    ]
    for session, ids in zip(sessions, left, strict=True):
        session.reader.check_room(session.num_tokens + len(ids))
    with ExitStack() as stack:
        # In one order, whatever the caller's, so that two threads never wait for each other.
        for session in sorted(sessions, key=id):
            stack.enter_context(session._alone())
        _feed(list(sessions), left)


def _feed(sessions: list[Session], left: list[Tensor]) -> None:
    if not all(isinstance(session.reader, TitansReader) for session in sessions):
        # Rows of several lengths would have to be padded, which corrupts recurrent states of other models.
        for session, ids in zip(sessions, left, strict=True):
            for _ in session._pieces(ids):
                pass
        return
    while rows := [row for row, ids in enumerate(left) if len(ids)]:
        _read([sessions[row] for row in rows], [left[row][:PIECE_LENGTH].long() for row in rows])
        for row in rows:
            left[row] = left[row][PIECE_LENGTH:]


def _read(sessions: list[Session], pieces: list[Tensor]) -> None:
    """Take in at least one token more for each session."""
    began, reader = time.perf_counter(), sessions[0].reader
    model = reader.inner
    unread = [session._unread(piece) for session, piece in zip(sessions, pieces, strict=True)]
    lengths = torch.tensor([len(ids) for ids in unread], device=model.device)
    ids = pad_sequence(unread, batch_first=True).to(model.device)
    caches = [session.cache for session in sessions]
    surprises: Sequence[Tensor] = ()
    if ids.shape[1]:
        together = TitansCache(model.config)
        fresh = initial_states(model) if any(cache.states is None for cache in caches) else None
        together.store(_stacked([cache.states or fresh for cache in caches]), 0)
        with reading(model):
            output = reader.model(
                input_ids=ids,
                attention_mask=(torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long(),
                past_key_values=together,
                logits_to_keep=1,
                output_surprise=True,
            )
        surprises = output.surprises or ()
        for row, cache in enumerate(caches):
            count = len(unread[row])
            cache.store(_row_of(together.states, row), count, ids[[row], :count])
    seconds = (time.perf_counter() - began) / len(sessions)
    for row, (session, cache) in enumerate(zip(sessions, caches, strict=True)):
        of_row = [s[row, : len(unread[row])].mean(-1).float() for s in surprises]
        session._took_in(pieces[row], cache, torch.stack(of_row, -1) if of_row else None, seconds)


def _stacked(states: list[Any]) -> Any:
    """One row each, side by side; whoever holds fewer slots than another has empty ones after them."""
    leaves, structure = flatten_alike(states)

    def together(parts: tuple[Tensor, ...]) -> Tensor:
        if parts[0].dim() < 2:
            return torch.cat(parts)
        most = max(part.shape[1] for part in parts)
        padding = [(0, 0) * (part.dim() - 2) + (0, most - part.shape[1]) for part in parts]
        return torch.cat([F.pad(part, pad) for part, pad in zip(parts, padding, strict=True)])

    return pytree.tree_unflatten([together(parts) for parts in zip(*leaves, strict=True)], structure)


def _row_of(states: Any, row: int) -> Any:
    """One row's states as it would hold them alone: nothing of the others is kept alive."""

    def alone(state: Any) -> Any:
        if not isinstance(state, (MemoryState, FullAttentionState)):
            return state[[row]]
        mine = map_state(lambda x: x[[row]], state)
        if isinstance(mine, FullAttentionState):
            slots = int(mine.position)
            return replace(mine, keys=mine.keys[:, :slots].clone(), values=mine.values[:, :slots].clone())
        return mine.compact()

    return pytree.tree_map(alone, states, is_leaf=lambda x: isinstance(x, (MemoryState, FullAttentionState)))
