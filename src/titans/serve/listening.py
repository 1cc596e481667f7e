"""The HTTP server around the application: uvicorn, and how long it waits for a request."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from titans.serve.app import application
from titans.serve.service import Service

_HEAD_BYTES, _IDLE_SECONDS = 65536, 30


def server_of(service: Service) -> uvicorn.Server:
    """A server, to be run with sockets that listen."""
    config = uvicorn.Config(
        application(service), http=_impatient(service.settings.body_seconds), ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=3,
    )  # fmt: skip
    return uvicorn.Server(config)


def _impatient(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which closes a connection where a request's head does not come in time, or whose
    client does not take what is sent: whoever never reads must not hold a place for ever."""

    class Impatient(H11Protocol):
        _waiting: Any = None
        _stalled: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self._moves()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            # What waits to be sent is thrown away with it.
            self._stalled = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._moves()
            super().resume_writing()

        def _moves(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _look(self) -> None:
            """Begin to wait where there is no request, and stop where there is one."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._waiting is None:
                self._waiting = self.loop.call_later(seconds, self._give_up)

        def _stop(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _give_up(self) -> None:
            self._waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Impatient
