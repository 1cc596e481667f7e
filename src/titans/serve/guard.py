"""What stands before every route: who asks, how much they send and how slowly, and what is noted of it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from titans.serve.errors import ApiError, failure_of
from titans.serve.memories import owner_of
from titans.serve.service import Service

_LOCAL = ("localhost", "::1", "127.0.0.1")
# Everybody may see these: they hold nobody's texts or memories.
_OPEN = ("/", "/metrics", "/health")
# Bytes a second that a body must bring on average, once it is late.
_SLOWEST = 1024
log = logging.getLogger("titans.serve")


def owner(request: Request) -> str:
    """Whose memories a request may use."""
    return str(request.scope["titans"]["owner"])


def note(request: Request, **numbers: int) -> None:
    """Have numbers stand in the request's line of the log."""
    request.scope["titans"]["numbers"].update(numbers)


async def json_body(request: Request) -> bytes:
    """A body of JSON; 415 for another kind."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON with the header content-type: application/json", code="not_json")
    return await request.body()


class _NobodyListens(Exception):
    """An answer could not be sent."""


class Guard:
    """Checks a request before the application sees it, and notes how it ended.

    Without keys only requests that name this machine are answered, and none that a page of another origin
    sends: any page in a browser may send requests to this machine.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings
        self._keys = [(hashlib.sha256(key.encode()).digest(), owner_of(key)) for key in self.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        began, status = time.perf_counter(), 0
        known: dict[str, Any] = {"owner": "", "numbers": {}}
        scope["titans"] = known

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                await send(message)
            except Exception as error:  # what a broken connection raises is the server's own affair
                raise _NobodyListens from error

        try:
            self._check_origin(scope)
            if scope["path"] not in _OPEN:
                known["owner"] = self._owner(scope)
            await self.app(scope, self._limited(scope, receive), noting)
        except ApiError as error:
            if not status:
                await _answer(error)(scope, receive, noting)
        except (ClientDisconnect, _NobodyListens):
            known["gone"] = True
        except Exception as error:
            # A message may quote a text: the log has the place alone.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            log.error(
                _line(event="error", kind=type(error).__name__, place=f"{frame.filename}:{frame.lineno}")
            )
            if not status:
                await _answer(failure_of(error))(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            if known.get("gone"):
                status = 499
            self.service.metrics.note(scope["method"][:8], route, status, seconds)
            log.info(
                _line(
                    event="request", method=scope["method"][:8], route=route, status=status,
                    seconds=round(seconds, 4), key=str(known["owner"])[:8], **known["numbers"],
                )
            )  # fmt: skip

    def _owner(self, scope: Scope) -> str:
        """Whose key a request has; 401 for none of ours. Every key is compared, in constant time."""
        if not self._keys:
            return ""
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                given = value[7:].strip()
        digest, found = hashlib.sha256(given).digest(), None
        for known, owner in self._keys:
            if hmac.compare_digest(known, digest):
                found = owner
        if found is None:
            raise ApiError(
                401, "send one of the server's API keys: Authorization: Bearer KEY", code="invalid_api_key"
            )
        return found

    def _check_origin(self, scope: Scope) -> None:
        if self.settings.keys or not self.settings.local:
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is not None and _hostname(f"//{host}") not in _LOCAL:
            raise ApiError(403, "this server answers under the names of its own machine alone", code="host")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            raise ApiError(403, "this server does not answer pages of other origins", code="origin")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Receives a body up to its limit; no piece may take longer than `body_seconds`, nor all of them
        together, but for a second more for each `_SLOWEST` bytes."""
        large = scope["path"].endswith(("/read", "/file"))
        limit = self.settings.body if large else self.settings.json
        size, ended, began = 0, False, time.monotonic()
        patience = self.settings.body_seconds
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", code="too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large

        async def limited() -> Message:
            nonlocal size, ended
            if ended:
                return await receive()
            try:
                left = began + patience + size / _SLOWEST - time.monotonic()
                async with asyncio.timeout(min(patience, max(left, 0))):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come in time", code="timeout") from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > limit:
                raise too_large
            return message

        return limited


def _answer(error: ApiError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        # What is left of the body is not read.
        headers["connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


def error_response(error: ApiError) -> JSONResponse:
    """An error as a response."""
    return _answer(error)


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _line(**fields: Any) -> str:
    return json.dumps({"time": round(time.time(), 3), **fields})
