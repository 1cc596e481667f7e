"""One model, and the thread that reads and generates with it for everybody who waits.

Each turn of the thread generates one token of every text that generates, in one call, and then reads a piece
of some texts that are read, in one call: a long text holds up an answer by a piece, never by its length.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titans.serve.answer import Answer
from titans.serve.choosing import Chooser, Chosen
from titans.serve.errors import ApiError
from titans.stream import FeedResult, Session, feed_together, reader_of
from titans.stream.decoding import Decoding
from titans.stream.rows import can_share_calls

# Tokens of one text that are read between two tokens of the others' answers, and of all texts together.
PIECE, PIECES = 256, 512


@dataclass(eq=False)
class Reading:
    """Ids (n,) for a session to read. on_piece: called by the engine's thread after each piece."""

    session: Session
    ids: Tensor
    on_piece: Callable[[FeedResult], None] | None = None
    done: Future[None] = field(default_factory=Future)
    cancelled: bool = False


@dataclass(eq=False)
class Generation:
    """An answer for a session to give. on_token: called by the engine's thread with each token and the text
    that can be shown after it."""

    session: Session
    chooser: Chooser
    answer: Answer
    on_token: Callable[[Chosen, str], None] | None = None
    done: Future[None] = field(default_factory=Future)
    cancelled: bool = False


class Engine:
    """Reads and generates for many sessions of a model at once.

    Args:
        model, tokenizer: as of `Session`.
        rows: how many sessions generate at the same time; others wait for their turn.

    Raises:
        ValueError: for a model that cannot read a text in pieces.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, rows: int = 64) -> None:
        self.name, self.model, self.tokenizer, self.rows = name, model, tokenizer, rows
        self.reader: Any = reader_of(model)
        self.tokens_read = self.tokens_generated = 0
        self._decoding = Decoding(self.reader)
        self._generating: dict[Session, Generation] = {}
        self._to_generate: deque[Generation] = deque()
        self._to_read: deque[Reading] = deque()
        self._now_read: list[Reading] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"engine of {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that are read or wait for their turn to generate."""
        return len(self._to_read) + len(self._now_read) + len(self._to_generate)

    @property
    def generating(self) -> int:
        """Texts that generate."""
        return len(self._generating)

    def session(self) -> Session:
        """A new session."""
        return Session(self.model, self.tokenizer)

    async def read(
        self, session: Session, ids: Tensor, on_piece: Callable[[FeedResult], None] | None = None
    ) -> None:
        """Have a session read ids (n,). Cancelled, it ends after a piece.

        Raises:
            ValueError: for more tokens than the model has positions.
            ApiError: 422 where the model gives NaN to the text, or to what the memory holds.
        """
        session.reader.check_room(session.num_tokens + len(ids))
        if len(ids):
            await self._wait_for(Reading(session, ids, on_piece), self._to_read)

    async def generate(
        self,
        session: Session,
        chooser: Chooser,
        answer: Answer,
        on_token: Callable[[Chosen, str], None] | None = None,
    ) -> None:
        """Have a session generate until its answer is finished; errors as of `read`. Cancelled, it ends after
        a token."""
        await self._wait_for(Generation(session, chooser, answer, on_token), self._to_generate)

    def close(self) -> None:
        """End the thread; what is under way fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    async def _wait_for(self, work: Any, queue: deque[Any]) -> None:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            queue.append(work)
            self._changed.notify()
        try:
            await asyncio.wrap_future(work.done)
        except asyncio.CancelledError:
            work.cancelled = True
            raise
        except (FloatingPointError, ValueError) as error:
            raise ApiError(422, str(error)[:500], code="model_failed") from None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._to_read or self._to_generate or self._generating):
                    self._changed.wait()
                if self._closed:
                    break
            self._admit()
            if self._generating:
                self._generate_one_token_each()
            if self._to_read:
                self._read_a_piece_of_some()
        for work in (*self._to_read, *self._to_generate, *self._generating.values()):
            _fail(work, RuntimeError("the server has stopped"))

    def _admit(self) -> None:
        """Have those generate that wait, as far as there is room, and end what nobody waits for."""
        for generation in [g for g in self._generating.values() if g.cancelled]:
            self._end(generation)
        while self._to_generate and len(self._generating) < self.rows:
            generation = self._to_generate.popleft()
            if generation.cancelled:
                continue
            try:
                self._decoding.join(generation.session)
                self._generating[generation.session] = generation
            except Exception as error:
                _fail(generation, error)

    def _generate_one_token_each(self) -> None:
        try:
            logits, failed = self._decoding.step()
            logits = logits.to("cpu", torch.float32)
        except Exception as error:
            for generation in list(self._generating.values()):
                self._end(generation, error)
            return
        for session, error in failed.items():
            _fail(self._generating.pop(session), error)
        chosen: list[int] = []
        ended: list[tuple[Generation, Exception | None]] = []
        for session, row in zip(self._decoding.sessions, logits, strict=True):
            generation, id = self._generating[session], 0
            try:
                token = generation.chooser.choose(row)
                id, text = token.id, generation.answer.add(token.id)
                if generation.on_token is not None:
                    generation.on_token(token, text)
                if generation.answer.finish:
                    ended.append((generation, None))
            except Exception as error:  # of one text, and none of the others' business
                ended.append((generation, error))
            chosen.append(id)
        self.tokens_generated += len(chosen)
        self._decoding.choose(chosen)
        for generation, error in ended:
            self._end(generation, error)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        del self._generating[generation.session]
        try:
            self._decoding.leave(generation.session)
        except Exception as other:
            error = error or other
        if error is None:
            _succeed(generation)
        else:
            _fail(generation, error)

    def _read_a_piece_of_some(self) -> None:
        """Read a piece of the first text, and of others as far as padding leaves the call short."""
        batch = self._now_read
        while self._to_read:
            reading = self._to_read[0]
            longest = max((min(len(r.ids), PIECE) for r in [*batch, reading]), default=0)
            if batch and (longest * (len(batch) + 1) > PIECES or not can_share_calls(self.reader)):
                break
            self._to_read.popleft()
            if not reading.cancelled:
                batch.append(reading)
        if batch:
            self._read_together(batch)
        self._now_read = []

    def _read_together(self, batch: list[Reading]) -> None:
        pieces = [reading.ids[:PIECE] for reading in batch]
        try:
            results = feed_together([reading.session for reading in batch], pieces, collect_surprise=True)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch[0], error)
            else:  # of one text, and none of the others' business
                for reading in batch:
                    self._read_together([reading])
            return
        self.tokens_read += sum(map(len, pieces))
        for reading, result in zip(batch, results, strict=True):
            reading.ids = reading.ids[PIECE:]
            try:
                if reading.on_piece is not None:
                    reading.on_piece(result)
            except Exception as error:
                _fail(reading, error)
                continue
            if len(reading.ids):
                # To the end of the queue: everybody's turn comes.
                self._to_read.append(reading)
            else:
                _succeed(reading)


def _succeed(work: Reading | Generation) -> None:
    if work.done.set_running_or_notify_cancel():
        work.done.set_result(None)


def _fail(work: Reading | Generation, error: Exception) -> None:
    if work.done.set_running_or_notify_cancel():
        work.done.set_exception(error)
