"""Sessions of one model that generate at the same time, a token of each in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from titans.hf.causal_cache import CausalCache
from titans.stream.causal import CausalReader
from titans.stream.reader import StateReader
from titans.stream.rows import row_of, side_by_side
from titans.stream.session import Session

# Texts of a causal model are read side by side where the longest is not longer than so many times the
# shortest and so many tokens more: the shorter ones are padded.
_TIMES_LONGER, _LONGER = 2, 256


@dataclass(eq=False)
class _Member:
    """A session that generates. read, new: ids that were read and chosen since it joined."""

    session: Session
    read: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)


class Decoding:
    """Sessions join and leave between tokens; each gets the tokens that it would get alone, up to the
    rounding of the model's kernels. While it is a member, a session takes in nothing else.

    Titans models and grafts read one token of every member in one call. Causal models of transformers do for
    members whose lengths are alike, if a trial shows that this changes nothing, and read one member after
    the other if not.

    Args:
        reader: that of all sessions.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        # Those of a group are read in one call.
        self._groups: list[tuple[_Rows, list[_Member]]] = []

    @property
    def sessions(self) -> list[Session]:
        """The members, in the order of the rows of `step`."""
        return [member.session for member in self._members]

    @property
    def _members(self) -> list[_Member]:
        return [member for _, members in self._groups for member in members]

    def join(self, session: Session) -> None:
        """Have a session generate from now on.

        Raises:
            ValueError: for another model's session, or one that has read nothing.
            RuntimeError: while it generates already.
        """
        if session.reader.inner is not self.reader.inner:
            raise ValueError("session is of another model: sessions of one model generate together")
        cache = session._begin_stream()
        for rows, members in self._groups:
            if rows.takes(cache):
                rows.join(cache)
                members.append(_Member(session))
                return
        self._groups.append((_rows_of(self.reader, cache), [_Member(session)]))

    def leave(self, session: Session) -> None:
        """Let a session go on alone, with all tokens that were chosen for it."""
        for rows, members in self._groups:
            for index, member in enumerate(members):
                if member.session is session:
                    self._take_out(rows, members, index)
                    self._groups = [group for group in self._groups if group[1]]
                    return
        raise ValueError("session does not generate: it never joined, or has left")

    def _take_out(self, rows: _Rows, members: list[_Member], index: int) -> None:
        member = members.pop(index)
        member.session._end_stream(rows.leave(index, member.read), tuple(member.new))

    def step(self) -> tuple[Tensor, dict[Session, Exception]]:
        """Read the last token of each member; `choose` comes next.

        Returns the logits after it, (members, vocab_size), and the errors of members whose text the model
        fails at. These have left, with what they held before that token, and have no row.
        """
        found, failed = [], {}
        for rows, members in self._groups:
            try:
                logits = rows.read(_last(members))
            except Exception as error:
                errors = rows.errors(_last(members)) or dict.fromkeys(range(len(members)), error)
                for index in sorted(errors, reverse=True):
                    failed[members[index].session] = errors[index]
                    self._take_out(rows, members, index)
                if not members:
                    continue
                # Nothing of them was read.
                logits = rows.read(_last(members))
            found.append(logits[:, -1])
            for member, token in zip(members, _last(members)[:, 0].tolist(), strict=True):
                member.read.append(token)
        self._groups = [group for group in self._groups if group[1]]
        none = torch.zeros(0, self.reader.vocab_size)
        return torch.cat(found) if found else none, failed

    def choose(self, tokens: Sequence[int]) -> None:
        """Continue each member with a token."""
        for member, token in zip(self._members, tokens, strict=True):
            member.new.append(token)


def _last(members: Sequence[_Member]) -> Tensor:
    """The token that each has not read yet, (members, 1)."""
    last = [member.new[-1] if member.new else member.session.recent[-1] for member in members]
    return torch.tensor(last)[:, None]


class _Rows(Protocol):
    """What several texts have left in a model, each a row."""

    def takes(self, cache: Any) -> bool:
        """Whether a text may join."""

    def join(self, cache: Any) -> None:
        """Have it be the last row."""

    def read(self, ids: Tensor) -> Tensor:
        """Read ids (rows, 1); the logits (rows, 1, vocab_size)."""

    def errors(self, ids: Tensor) -> dict[int, Exception]:
        """After `read` has failed: what it raises for single rows, without which the others may read again;
        empty where no row is to blame, or none can go on."""

    def leave(self, index: int, read: list[int]) -> Any:
        """Remove a row, and return its cache; read: the ids it has read since it joined."""


def _rows_of(reader: Any, cache: Any) -> _Rows:
    return _StateRows(reader, cache) if isinstance(reader, StateReader) else _CausalRows(reader, cache)


class _StateRows:
    """Of a Titans model or a graft, which know padding: of any lengths."""

    def __init__(self, reader: StateReader, cache: Any) -> None:
        self.reader, self.caches = reader, [cache]
        # The states of all rows.
        self.rows = side_by_side(reader, [cache])

    def takes(self, cache: Any) -> bool:
        return True

    def join(self, cache: Any) -> None:
        self.caches.append(cache)
        self.rows = side_by_side(self.reader, [self.rows, cache])

    def read(self, ids: Tensor) -> Tensor:
        logits = self.reader.read(ids, self.rows).logits
        assert logits is not None
        return logits

    def errors(self, ids: Tensor) -> dict[int, Exception]:
        found: dict[int, Exception] = {}
        for index in range(len(ids) if len(ids) > 1 else 0):
            alone = self.reader.start()
            alone.store(row_of(self.reader, self.rows, index), 0)
            try:
                self.reader.read(ids[[index]], alone)
            except Exception as error:
                found[index] = error
        return found

    def leave(self, index: int, read: list[int]) -> Any:
        cache = self.caches.pop(index)
        if read:
            ids = torch.tensor([read], device=self.reader.inner.device)
            cache.store(row_of(self.reader, self.rows, index), len(read), ids)
        if self.caches:
            self.rows.batch_select_indices(_others(index, len(self.caches) + 1))
        return cache


class _CausalRows:
    """Of a causal model of transformers: of lengths that are alike, or one alone."""

    def __init__(self, reader: CausalReader, cache: CausalCache) -> None:
        self.reader, self.cache, self.lengths = reader, cache, [cache.num_columns]

    def takes(self, cache: CausalCache) -> bool:
        lengths = [*self.lengths, cache.num_columns]
        alike = max(lengths) <= _TIMES_LONGER * min(lengths) + _LONGER
        # A text of one token has left nothing yet.
        return alike and min(lengths) > 0 and self.reader.can_read_side_by_side()

    def join(self, cache: CausalCache) -> None:
        self.cache = CausalCache.side_by_side([self.cache, cache])
        self.lengths.append(cache.num_columns)

    def read(self, ids: Tensor) -> Tensor:
        if len(self.lengths) > 1:
            logits = self.reader.read_one_each(ids, self.cache, self.lengths)
        else:
            logits = self.reader.read(ids, self.cache).logits
        self.lengths = [length + 1 for length in self.lengths]
        assert logits is not None
        return logits

    def errors(self, ids: Tensor) -> dict[int, Exception]:
        # A cache of transformers is changed in place, layer by layer: none is unchanged.
        return {}

    def leave(self, index: int, read: list[int]) -> CausalCache:
        if len(self.lengths) == 1:
            return self.cache
        cache = self.cache.row(index, self.lengths[index])
        others = _others(index, len(self.lengths))
        del self.lengths[index]
        if len(others) == 1:
            self.cache = self.cache.row(int(others), self.lengths[0])
        else:
            self.cache.batch_select_indices(others)
        return cache


def _others(index: int, count: int) -> Tensor:
    return torch.tensor([row for row in range(count) if row != index])
