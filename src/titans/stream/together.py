"""Many readers of one model in one forward call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from titans.stream.reader import StateReader
from titans.stream.rows import can_share_calls, row_of, side_by_side
from titans.stream.session import PIECE_LENGTH, Session
from titans.stream.session_state import FeedResult
from titans.stream.text import token_ids


def feed_together(
    sessions: Sequence[Session], texts: Sequence[Any], *, collect_surprise: bool = False
) -> list[FeedResult]:
    """Feed each session its own text, all of them in one call of the model: what `feed` does one by one.

    Interrupted, every session ends after its last whole piece of 2048 tokens. Models other than Titans and
    grafts read one session after the other.

    Args:
        sessions: of one model, each once; they may have read as much or as little as they like.
        texts: for each session a string, bytes or token ids, of any length.
        collect_surprise: return the surprise at every token.

    Returns:
        For each session what `feed` reports; the seconds are those of all.

    Raises:
        ValueError: for sessions of several models or one given twice, for another number of texts, or for a
            text that `feed` refuses; then nothing was read.
        RuntimeError: while one of them has a stream of generated text open.
        FloatingPointError: where the model gives NaN for one of them; all are after the same piece.
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
        began, before = time.perf_counter(), [session._now for session in sessions]
        collected: list[list[Tensor]] = [[] for _ in sessions]
        _feed(list(sessions), left, collected)
        seconds = time.perf_counter() - began
        return [
            session._now.since(was, seconds, surprises if collect_surprise else None)
            for session, was, surprises in zip(sessions, before, collected, strict=True)
        ]


def _feed(sessions: list[Session], left: list[Tensor], collected: list[list[Tensor]]) -> None:
    """Take in all ids, and note the surprise of every piece."""
    if not can_share_calls(sessions[0].reader if sessions else None):
        for session, ids, surprises in zip(sessions, left, collected, strict=True):
            surprises += [surprise for surprise in session._pieces(ids) if surprise is not None]
        return
    while rows := [row for row, ids in enumerate(left) if len(ids)]:
        found = _read([sessions[row] for row in rows], [left[row][:PIECE_LENGTH].long() for row in rows])
        for row, surprise in zip(rows, found, strict=True):
            collected[row] += [] if surprise is None else [surprise]
            left[row] = left[row][PIECE_LENGTH:]


def _read(sessions: list[Session], pieces: list[Tensor]) -> list[Tensor | None]:
    """Take in at least one token more for each session; the surprise of what the model read, as of `feed`."""
    began, reader = time.perf_counter(), sessions[0].reader
    assert isinstance(reader, StateReader)
    unread = [session._now.unread(piece) for session, piece in zip(sessions, pieces, strict=True)]
    ids, caches = pad_sequence(unread, batch_first=True), [session.cache for session in sessions]
    surprises: Sequence[Tensor] = ()
    if ids.shape[1]:
        together = side_by_side(reader, caches)
        lengths = torch.tensor([len(mine) for mine in unread])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        surprises = reader.read(ids, together, output_surprise=True, real=real).surprises or ()
        for row, cache in enumerate(caches):
            count = len(unread[row])
            cache.store(row_of(reader, together, row), count, ids[[row], :count].to(reader.inner.device))
    seconds = (time.perf_counter() - began) / len(sessions)
    found: list[Tensor | None] = []
    for row in range(len(sessions)):
        of_row = [s[row, : len(unread[row])].mean(-1).float() for s in surprises]
        found.append(torch.stack(of_row, -1) if of_row else None)
    # All of them or none: NaN in one text must not leave some of the others a piece ahead.
    each = zip(sessions, pieces, caches, found, strict=True)
    after = [session._now.after(piece, cache, surprise, seconds) for session, piece, cache, surprise in each]
    for session, now in zip(sessions, after, strict=True):
        session._now = now
    return found
