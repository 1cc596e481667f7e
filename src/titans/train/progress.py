"""Progress of a run on stderr: one live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_LINES = 20
# From this share of the time on a run says that its steps wait for examples.
LOADING_WORTH_SAYING = 0.1


class ProgressLine:
    """Shows the lines of a run's metrics on stderr; use it as the run's `on_log`, inside `with`."""

    def __init__(self, steps: int, bytes_are_tokens: bool, console: Console | None = None) -> None:
        self.steps = steps
        self.bytes_are_tokens = bytes_are_tokens
        self.console = console or Console(file=sys.stderr)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._held_out: float | None = None
        self._next_plain = 0
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        self._entered = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        """Show one object of metrics.jsonl."""
        step = line["step"]
        if line["kind"] == "eval":
            self._held_out = line["bits_per_byte"]
            if self._live is None:
                self.console.print(
                    f"step {step}/{self.steps} · held out {self._held_out:.3f} bits/byte", soft_wrap=True
                )
            return
        text = self._text(line)
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif step >= self._next_plain or step >= self.steps:
            self._next_plain = step + self.steps / PLAIN_LINES
            self.console.print(text, soft_wrap=True, highlight=False)

    def _text(self, line: dict[str, Any]) -> str:
        parts = [f"step {line['step']}/{self.steps}", f"loss {line['loss']:.4f}"]
        if self.bytes_are_tokens:
            parts.append(f"{line['loss'] / math.log(2):.3f} bits/byte")
        if self._held_out is not None:
            parts.append(f"held out {self._held_out:.3f}")
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        if line.get("loading", 0.0) >= LOADING_WORTH_SAYING:
            parts.append(f"{line['loading']:.0%} of the time waiting for data")
        if self._first is not None:
            steps, seconds = line["step"] - self._first[0], line["elapsed"] - self._first[1]
            parts.append(f"{clock((self.steps - line['step']) * seconds / steps)} left")
        else:
            self._first = line["step"], line["elapsed"]
        return " · ".join(parts)


def clock(seconds: float) -> str:
    """A time as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
