"""The routes of memories: made, read into, listed, forked, deleted, and moved as files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fastapi import APIRouter, Request, Response
from starlette.datastructures import UploadFile
from starlette.responses import StreamingResponse

from titans.serve.bodies import NewMemoryBody, ReadBody, parsed
from titans.serve.engine import Engine
from titans.serve.errors import ApiError
from titans.serve.events import Events, respond
from titans.serve.guard import json_body, note, owner
from titans.serve.memories import Memory, State
from titans.serve.service import Deadline, Service
from titans.serve.uploads import text_of
from titans.stream import FeedResult, Session
from titans.stream.reading.pieces import read_pieces
from titans.stream.text import NUM_RECENT, text_after
from titans.stream.tokenizer import leading_tokens

_BLOCK = 1 << 20


def routes(service: Service) -> APIRouter:
    """The routes, for an application."""
    router, memories = APIRouter(prefix="/v1/memories"), service.memories

    @router.post("")
    async def create(request: Request) -> dict[str, Any]:
        content = await request.body()
        body = parsed(NewMemoryBody, content if content.strip() else b"{}")
        source = None if body.copy_of is None else memories.get(owner(request), body.copy_of)
        engine = service.engine(body.model, source)
        return (await asyncio.to_thread(memories.create, owner(request), engine.name, source)).shown()

    @router.get("")
    async def all_memories(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [memory.shown() for memory in memories.all_of(owner(request))]}

    @router.get("/{id}")
    async def one(request: Request, id: str) -> dict[str, Any]:
        return memories.get(owner(request), id).shown()

    @router.delete("/{id}")
    async def delete(request: Request, id: str) -> dict[str, Any]:
        memory = memories.get(owner(request), id)
        await asyncio.to_thread(memories.delete, memory)
        return {"id": memory.id, "object": "memory", "deleted": True}

    @router.post("/{id}/fork")
    async def fork(request: Request, id: str) -> dict[str, Any]:
        source = memories.get(owner(request), id)
        return (await asyncio.to_thread(memories.create, owner(request), source.model, source)).shown()

    @router.post("/{id}/read")
    async def read(request: Request, id: str) -> Response:
        memory = memories.get(owner(request), id)
        task = _Reading(service, request, memory)
        try:
            with service.admitted():
                await task.receive()
        except BaseException:
            task.discard()
            raise
        return await respond(request, task.events(), task.stream)

    @router.get("/{id}/file")
    async def download(request: Request, id: str) -> Response:
        memory = memories.get(owner(request), id)
        if not memory.size:
            raise ApiError(409, "the memory is empty: there is no file before something is read")
        try:
            file = await asyncio.to_thread(memories.file(memory).open, "rb")
        except FileNotFoundError:
            raise ApiError(409, "the file of this memory is gone: upload one, or delete it") from None
        # Of the file that is open now: another one may take its name meanwhile.
        size = os.fstat(file.fileno()).st_size
        headers = {
            "content-length": str(size), "content-disposition": f'attachment; filename="{memory.id}.memory"'
        }  # fmt: skip
        return StreamingResponse(_blocks(file), media_type="application/octet-stream", headers=headers)

    @router.put("/{id}/file")
    async def upload(request: Request, id: str) -> dict[str, Any]:
        memory = memories.get(owner(request), id)
        with service.admitted(), memories.incoming() as folder:
            path = Path(folder) / "file"
            await _receive_file(request, path)
            deadline = Deadline(service.settings.request_seconds)
            async with AsyncExitStack() as stack:
                await deadline.wait(memory.turn.acquire())
                stack.callback(memory.turn.release)
                state = await asyncio.to_thread(memories.accept, memory, path)
                await service.commit(memory, state)
        return memory.shown()

    return router


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while block := file.read(_BLOCK):
            yield block


async def _receive_file(request: Request, path: Path) -> dict[str, str]:
    """Write an upload to a file: that of a form, or else the body; what the form or the headers say of it."""
    kind = request.headers.get("content-type", "").lower()
    if not kind.startswith("multipart/form-data"):
        with path.open("wb") as target:
            async for block in request.stream():
                target.write(block)
        return {"name": "", "type": kind, **request.query_params}
    async with request.form(max_files=1, max_fields=10) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "the form has no file: name it file", param="file")
        with path.open("wb") as target:
            while block := await file.read(_BLOCK):
                target.write(block)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        return {
            **request.query_params,
            **fields,
            "name": file.filename or "",
            "type": file.content_type or "",
        }


class _Reading:
    """A text on its way into a memory. What fails or is interrupted has not been read."""

    def __init__(self, service: Service, request: Request, memory: Memory) -> None:
        self.service, self.request, self.memory = service, request, memory
        self.engine: Engine = service.engine(None, memory)
        self.deadline = Deadline(service.settings.request_seconds)
        self.stream = self.detail = False
        self._scratch = service.memories.incoming()
        self._source = Path(self._scratch.name) / "source"
        self._about = {"name": "", "type": "text/plain"}

    async def receive(self) -> None:
        """Take in the body: JSON with a text, a form with a file, or the text or file itself."""
        kind = self.request.headers.get("content-type", "").lower()
        if kind.startswith("application/json"):
            body = parsed(ReadBody, await json_body(self.request))
            self.stream, self.detail = body.stream, body.detail
            await asyncio.to_thread(self._source.write_text, body.text, "utf-8")
            return
        if not kind.startswith(("multipart/form-data", "text/", "application/pdf", "application/xhtml")):
            raise ApiError(
                415, "send JSON with a text, a form with a file, or text/plain, text/html or application/pdf"
            )
        self._about = await _receive_file(self.request, self._source)
        self.stream, self.detail = (self._about.get(name) == "true" for name in ("stream", "detail"))

    def discard(self) -> None:
        """Remove what was received."""
        self._scratch.cleanup()

    async def events(self) -> Events:
        """See `titans.serve.events`."""
        memory, engine, about = self.memory, self.engine, self._about
        async with AsyncExitStack() as stack:
            stack.callback(self.discard)
            stack.enter_context(self.service.admitted())
            parsed = text_of(self._source, about["name"], about["type"], self.service.parsers)
            text = await self.deadline.wait(parsed)
            await self.deadline.wait(memory.turn.acquire())
            stack.callback(memory.turn.release)
            state = await self.service.state(memory, engine)
            session = state.session.fork()
            yield None
            began, total = session.num_tokens, text.stat().st_size
            if not began:
                leading = torch.tensor(leading_tokens(engine.tokenizer), dtype=torch.int64)
                await self.deadline.wait(engine.read(session, leading))
            shown = _Shown(engine, session)
            pieces = read_pieces(text, engine.tokenizer, name="the text")
            try:
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    ids, taken = torch.from_numpy(piece.ids.astype("int64")), 0
                    shown.add(piece.ids.tolist())
                    async with aclosing(self._results(session, ids)) as results:
                        async for result in results:
                            taken += result.tokens
                            done = piece.offset + round(piece.num_bytes * taken / max(len(ids), 1))
                            yield self._progress(session.num_tokens - began, done, total, result, shown)
            except ValueError as error:
                raise ApiError(400, str(error)[:500], code="context_length_exceeded") from None
            finally:
                note(self.request, read_tokens=session.num_tokens - began)
            await self.service.commit(memory, State(session, state.begun))
            read = {"tokens": session.num_tokens - began, "bytes": total, "surprise": shown.mean}
            yield {**memory.shown(), "read": read}

    def _progress(
        self, tokens: int, done: int, total: int, result: FeedResult, shown: _Shown
    ) -> dict[str, Any]:
        found = {
            "object": "memory.read.progress", "id": self.memory.id, "tokens": tokens, "bytes": done,
            "total_bytes": total, "surprise": result.mean_surprise,
        }  # fmt: skip
        return found | shown.take(result, self.stream and self.detail)

    async def _results(self, session: Session, ids: torch.Tensor) -> AsyncGenerator[FeedResult, None]:
        """What was found in each piece of some ids."""
        loop, results = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def found(result: FeedResult) -> None:
            loop.call_soon_threadsafe(results.put_nowait, result)

        reading = asyncio.ensure_future(self.engine.read(session, ids, found))
        reading.add_done_callback(lambda _: results.put_nowait(None))
        try:
            while (result := await self.deadline.wait(results.get())) is not None:
                yield result
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class _Shown:
    """The texts of tokens with their surprise, where this is known: the last one always waits."""

    def __init__(self, engine: Engine, session: Session) -> None:
        self._tokenizer, self._recent = engine.tokenizer, session.recent
        self._pending: list[int] = []
        # The place in the session of the first of them.
        self._next = session.num_tokens
        self._total, self._count = 0.0, 0

    @property
    def mean(self) -> float | None:
        """Of all tokens read."""
        return self._total / self._count if self._count else None

    def add(self, ids: list[int]) -> None:
        """Ids that are about to be read."""
        self._pending += ids

    def take(self, result: FeedResult, detail: bool) -> dict[str, Any]:
        """What to send for a piece."""
        if result.surprises is None:
            self._pending.clear()
            return {}
        found = result.surprises.mean(-1)
        self._total, self._count = self._total + float(found.double().sum()), self._count + len(found)
        # The first may be of a token from before.
        found = found[max(self._next - result.start, 0) :]
        ids, self._pending = self._pending[: len(found)], self._pending[len(found) :]
        self._next += len(ids)
        if not detail:
            return {}
        texts = []
        for token in ids:
            texts.append(text_after(self._tokenizer, self._recent, (token,)))
            self._recent = (*self._recent, token)[-NUM_RECENT:]
        return {"texts": texts, "surprises": [float(f"{value:.4g}") for value in found.tolist()]}
