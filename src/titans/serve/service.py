"""What all routes share: models, memories, limits, and the time a request has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from titans.serve.engine import Engine
from titans.serve.errors import ApiError, too_busy
from titans.serve.memories import Memories, Memory, State
from titans.serve.metrics import Labels, Metrics
from titans.serve.settings import Settings
from titans.stream.turns import Turns

Result = TypeVar("Result")


class Deadline:
    """The time that one request has left."""

    def __init__(self, seconds: float) -> None:
        self._end, self._seconds = time.monotonic() + seconds, seconds

    async def wait(self, work: Awaitable[Result]) -> Result:
        """The result of some work; 408 if it is not there in time, and the work is cancelled."""
        try:
            # Python 3.11's wait_for forgets a cancellation that comes together with the result: an answer
            # would go on after its client has hung up.
            async with asyncio.timeout(max(self._end - time.monotonic(), 0)):
                return await work
        except TimeoutError:
            raise ApiError(
                408, f"the request took longer than {self._seconds:g} seconds and was ended", code="timeout"
            ) from None


class Service:
    """Models by name, the memories, and who is being served.

    Args:
        engines: by name; the first one answers requests that name no model.

    Raises:
        ValueError: for a chat template that cannot be used, or a folder of memories that cannot.
    """

    def __init__(self, settings: Settings, engines: Mapping[str, Engine]) -> None:
        self.settings, self.engines = settings, dict(engines)
        self.turns = {name: Turns(engine.tokenizer) for name, engine in engines.items()}
        self.memories, self.metrics = Memories(settings, self.engines), Metrics()
        # So many uploads are parsed at a time.
        self.parsers = asyncio.Semaphore(2)
        self.started, self._active = int(time.time()), 0

    def close(self) -> None:
        """End all engines and let go of the folder."""
        for engine in self.engines.values():
            engine.close()
        self.memories.close()

    def engine(self, model: str | None, memory: Memory | None = None) -> Engine:
        """The model that a request names, or else that of its memory, or else the first.

        Raises:
            ApiError: 404 for an unknown one, 400 for another one than the memory's.
        """
        if model is None:
            model = next(iter(self.engines)) if memory is None else memory.model
        if model not in self.engines:
            raise ApiError(
                404,
                f"there is no model {model[:80]!r}: this server has {', '.join(self.engines)}",
                param="model",
                code="model_not_found",
            )
        if memory is not None and memory.model != model:
            raise ApiError(
                400, f"the memory belongs to the model {memory.model}, not to {model}", param="memory"
            )
        return self.engines[model]

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place among the requests under way; 429 if there is none."""
        if self._active >= self.settings.requests:
            raise too_busy(f"{self._active:,} requests are under way or wait: try again later")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def state(self, memory: Memory | None, engine: Engine) -> State:
        """What a request starts from: a memory, or nothing; whoever reads on must fork it."""
        if memory is None:
            return State(engine.session())
        return await asyncio.to_thread(self.memories.state, memory)

    async def commit(self, memory: Memory, state: State) -> None:
        """`Memories.commit`, to its end even if the client hangs up meanwhile."""
        await _to_its_end(self.memories.commit, memory, state)

    def gauges(self) -> Iterator[tuple[str, str, str, Labels, float]]:
        """The state of the server at this moment, for its metrics."""
        own: list[tuple[str, str, str, Callable[[Engine], float]]] = [
            ("titans_tokens_read_total", "counter", "Tokens read.", lambda e: e.tokens_read),
            ("titans_tokens_generated_total", "counter", "Tokens generated.", lambda e: e.tokens_generated),
            ("titans_generating", "gauge", "Answers that are generated now.", lambda e: e.generating),
            ("titans_waiting", "gauge", "Texts that are read or wait to answer.", lambda e: e.waiting),
        ]
        for name, kind, about, value in own:
            for model, engine in self.engines.items():
                yield name, kind, about, (("model", model),), value(engine)
        yield "titans_requests_active", "gauge", "Requests under way or waiting.", (), self._active
        yield "titans_memories", "gauge", "Memories kept.", (), len(self.memories)
        yield "titans_memory_ram_bytes", "gauge", "Memories in RAM.", (), self.memories.held_bytes


async def _to_its_end(function: Callable[..., Any], *arguments: Any) -> None:
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
