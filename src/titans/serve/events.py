"""Answers that come in parts: sent one by one (server-sent events), or collected into one.

What a route does is an async generator. It first yields None, when all that can be wrong with a request is
known to be right, and then what is to be sent; the last one is the whole. Whoever hangs up ends it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from titans.serve.errors import ApiError, failure_of

Events = AsyncGenerator[dict[str, Any] | None, None]
Result = TypeVar("Result")


async def respond(request: Request, events: Events, stream: bool) -> Response:
    """The response to a request; errors before the first part are the request's own."""
    try:
        await _unless_gone(request.receive, anext(events))
        if stream:
            return EventStream(events)
        last = await _unless_gone(request.receive, _last(events))
        return JSONResponse(last)
    except _Gone:
        return Response(status_code=499)
    finally:
        if not stream:
            await events.aclose()


class EventStream(Response):
    """Sends what a generator gives, until it ends or nobody listens."""

    media_type = "text/event-stream"

    def __init__(self, events: Events) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _unless_gone(receive, self._send_all(send))
            await send({"type": "http.response.body", "body": b""})
        except _Gone:
            scope.setdefault("titans", {})["gone"] = True
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        async def part(text: str) -> None:
            content = f"data: {text}\n\n".encode()
            await send({"type": "http.response.body", "body": content, "more_body": True})

        try:
            async for event in self._events:
                await part(json.dumps(event))
        except ApiError as error:
            await part(json.dumps(error.body()))
            return
        except Exception as error:
            # The client gets an error event; the guard logs the exception.
            await part(json.dumps(failure_of(error).body()))
            raise
        await part("[DONE]")


class _Gone(Exception):
    """The client has hung up."""


async def _unless_gone(receive: Receive, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled if the client hangs up."""
    task = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Gone
        return task.result()
    finally:
        for each in (task, listening):
            each.cancel()
        await asyncio.gather(task, listening, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _last(events: Events) -> dict[str, Any]:
    last: dict[str, Any] = {}
    async for event in events:
        last = event or last
    return last
