"""Reading as people watch it: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from titans.cli.terminal import printable

SECONDS_BETWEEN_LINES = 10.0


class Tokenising:
    """Shows a corpus being tokenised, from the first call on, if there is one; use it inside `with`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._shown: ReadingProgress | None = None

    def __enter__(self) -> Tokenising:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown.__exit__(kind, error, trace)

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """So many of so many bytes are done."""
        if self._shown is None or self._shown.total != total:  # another corpus
            self.__exit__(None, None, None)
            self._shown = ReadingProgress(total, self._console)
            self._shown.__enter__()
        self._shown.update(done, tokens, "tokenising")


class ReadingProgress:
    """Shows on stderr how much of `total` is done, tokens per second and the time left; use it inside
    `with`."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total = total
        self.console = console or Console(file=sys.stderr)
        self._began = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
            )
            self._task = self._bar.add_task("reading", total=total, rate="–")

    def __enter__(self) -> ReadingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, tokens: int, what: str = "reading") -> None:
        """`done` of the total is read, which were so many tokens; `what` is being read."""
        what = printable(what)
        now = time.perf_counter()
        rate = tokens / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=escape(what), rate=f"{rate:,.0f}")
        elif done >= self.total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) * (self.total - done) / max(done, 1e-9)
            self.console.print(
                f"{what} · {done / self.total:.0%} · {rate:,.0f} tokens/s · {left:.0f} s left",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
