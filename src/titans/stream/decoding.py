"""Sessions of one model that generate at the same time, a token of each in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titans.stream.reader import StateReader
from titans.stream.rows import can_share_calls, row_of, side_by_side
from titans.stream.session import Session


@dataclass(eq=False)
class _Member:
    """A session that generates. cache: as it was when the session joined, or what it has read since where
    rows are not shared. read, new: ids that were read and chosen since."""

    session: Session
    cache: Any
    read: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)


class Decoding:
    """Sessions join and leave between tokens; each gets the tokens that it would get alone, up to the
    rounding of the model's kernels. While it is a member, a session takes in nothing else.

    Titans models and grafts read one token of every member in one call, other models in one call for each.

    Args:
        reader: that of all sessions.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self._members: list[_Member] = []
        # The states of all members, in their order.
        self._rows: Any = None

    @property
    def sessions(self) -> list[Session]:
        """The members, in the order of the rows of `step`."""
        return [member.session for member in self._members]

    def join(self, session: Session) -> None:
        """Have a session generate from now on.

        Raises:
            ValueError: for another model's session, or one that has read nothing.
            RuntimeError: while it generates already.
        """
        if session.reader.inner is not self.reader.inner:
            raise ValueError("session is of another model: sessions of one model generate together")
        member = _Member(session, session._begin_stream())
        self._members.append(member)
        if can_share_calls(self.reader):
            caches = [member.cache] if self._rows is None else [self._rows, member.cache]
            self._rows = side_by_side(self.reader, caches)

    def leave(self, session: Session) -> None:
        """Let a session go on alone, with all tokens that were chosen for it."""
        index = self.sessions.index(session)
        member = self._members[index]
        if self._rows is not None:
            if member.read:
                states = row_of(self.reader, self._rows, index)
                ids = torch.tensor([member.read], device=self.reader.inner.device)
                member.cache.store(states, len(member.read), ids)
            others = [row for row in range(len(self._members)) if row != index]
            if others:
                self._rows.batch_select_indices(torch.tensor(others))
            else:
                self._rows = None
        del self._members[index]
        session._end_stream(member.cache, tuple(member.new))

    def step(self) -> Tensor:
        """The logits of the token after the last one of each member, (members, vocab_size); `choose` comes
        next."""
        last = [member.new[-1] if member.new else member.session.recent[-1] for member in self._members]
        ids = torch.tensor(last)[:, None]
        if self._rows is not None:
            assert isinstance(self.reader, StateReader)
            logits = self.reader.read(ids, self._rows).logits
        else:
            found = [
                self.reader.read(ids[[row]], member.cache).logits for row, member in enumerate(self._members)
            ]
            logits = torch.cat(found)
        for member, token in zip(self._members, last, strict=True):
            member.read.append(token)
        assert logits is not None
        return logits[:, -1]

    def choose(self, tokens: Sequence[int]) -> None:
        """Continue each member with a token."""
        for member, token in zip(self._members, tokens, strict=True):
            member.new.append(token)
