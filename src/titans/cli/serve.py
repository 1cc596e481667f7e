"""`titans serve`."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.models import ModelOptions
from titans.cli.terminal import report

_KEYS = "TITANS_API_KEYS"


@dataclass(frozen=True, kw_only=True)
class Serve(ModelOptions):
    """Answer OpenAI's API over HTTP, with memories that clients name, and a page to try it.

    Example: titans serve titans-smollm2-135m --port 8000

    Reached from this machine alone unless --host names another address, which needs --api-key. A memory file
    may reveal the text that was read; it is kept until it is deleted.
    """

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of Titans models, grafts or any causal models of transformers, or names of the library."""
    port: int = 8000
    """Where to listen; 0 for any free port, which is shown."""
    host: str = "127.0.0.1"
    """The address to listen on."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that clients must send; may be given several times, and each has memories of its own. The
    environment variable TITANS_API_KEYS, keys with blanks between, does the same and is not seen in lists of
    processes."""
    memories: Path = Path("titans-memories")
    """Folder in which memories are kept, also for the next start. A relative path is that below the current
    folder."""
    max_memories: int = 1_000
    """How many memories a key may have."""
    max_memory_mb: int = 10_240
    """How many megabytes (2^20 bytes) the memories of a key may take on the disk."""
    ram_mb: int = 1_024
    """How many megabytes of memories are held in RAM; others are read from the disk when they are used."""
    max_body_mb: int = 64
    """The largest text or file that is taken, in megabytes."""
    max_requests: int = 256
    """How many requests may be under way or wait; further ones are answered with 429."""
    rows: int = 64
    """How many answers are generated at the same time."""
    timeout: float = 600.0
    """The most seconds that a request may take."""

    def run(self) -> int:
        """Serve until interrupted."""
        keys = (*self.api_key, *os.environ.get(_KEYS, "").split())
        local = self._check(keys)
        try:
            from titans.serve.listening import server_of
        except ModuleNotFoundError as error:
            if (error.name or "titans").partition(".")[0] == "titans":
                raise
            raise ValueError(
                f"{error.name} is not installed: titans serve needs pip install 'titans-ltm[serve]'"
            ) from None
        from titans.serve.engine import Engine
        from titans.serve.service import Service
        from titans.serve.settings import MIB, Settings

        settings = Settings(
            self.memories, keys, local, rows=self.rows, requests=self.max_requests,
            request_seconds=self.timeout, body=self.max_body_mb * MIB, ram=self.ram_mb * MIB,
            memories=self.max_memories, memory_bytes=self.max_memory_mb * MIB,
        )  # fmt: skip
        # Before the models, which may take long: a port in use is reported at once.
        listening = self._listen()
        engines: dict[str, Any] = {}
        for path in self.models:
            model, tokenizer = self.open_model(path)
            engines[path.name] = Engine(path.name, model, tokenizer, self.rows)
        service = Service(settings, engines)
        _log_to_stderr()
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        kept = self.memories.resolve()
        report(f"serving {', '.join(engines)} at http://{shown}:{port}; memories are in {kept}; Ctrl-C stops")
        try:
            server_of(service).run(sockets=[listening])
        finally:
            service.close()
        return 0

    def _check(self, keys: tuple[str, ...]) -> bool:
        """Whether only this machine reaches the server; UsageError for options that make no sense."""
        if not self.models:
            raise UsageError("models: none given; name at least one")
        names = [path.name for path in self.models]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"models: two are called {double!r}: rename one, because clients choose by name")
        if not 0 <= self.port < 65536:
            raise UsageError(f"port={self.port}: give a whole number from 0 to 65535")
        for name in (
            "max_memories",
            "max_memory_mb",
            "ram_mb",
            "max_body_mb",
            "max_requests",
            "rows",
            "timeout",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name}={getattr(self, name)}: give a number above 0")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise UsageError("api_key: a key is made of letters, digits and signs of ASCII, without blanks")
        try:
            local = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            local = self.host == "localhost"
        if not local and not keys:
            raise UsageError(f"host={self.host!r} is reached from other machines: give --api-key as well")
        return local

    def _listen(self) -> socket.socket:
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            listening = socket.socket(family)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.host, self.port))
            listening.listen(512)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"host={self.host!r}, port={self.port}: {reason}; give another one") from None
        return listening


def _log_to_stderr() -> None:
    """One JSON object a line."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("titans.serve", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
