"""What `titans graft` says while it caches and trains, and at the end, whatever it trains."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from titans.cli.progress import SECONDS_BETWEEN_LINES
from titans.cli.terminal import report
from titans.train.progress import clock

if TYPE_CHECKING:
    from titans.train.graft.loop import LoopResult


class Progress:
    """A line on stderr now and then.

    Args:
        of_step, of_evaluation: the parts of a logged step's line, and what an evaluation found.
    """

    def __init__(
        self, of_step: Callable[[dict[str, Any]], list[str]], of_evaluation: Callable[[dict[str, Any]], str]
    ) -> None:
        self._of_step, self._of_evaluation = of_step, of_evaluation
        self._last = 0.0
        self._first: tuple[int, float] | None = None

    def _is_time(self) -> bool:
        now = time.perf_counter()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return False
        self._last = now
        return True

    def features(self, progress: Any) -> None:
        if progress.done == progress.units or self._is_time():
            report(
                f"features {progress.tokens / progress.total:.0%} · {progress.rate:,.0f} tokens/s · "
                f"{clock(progress.seconds_left)} left"
            )

    def training(self, line: dict[str, Any]) -> None:
        step, steps = line["step"], line["steps"]
        if line["kind"] == "held out":
            report(f"step {step}/{steps} · {self._of_evaluation(line)}")
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        if not self._is_time() and step < steps:
            return
        parts = [f"step {step}/{steps}", *self._of_step(line)]
        if (done := step - self._first[0]) > 0:
            parts.append(f"{clock((now - self._first[1]) / done * (steps - step))} left")
        report(" · ".join(parts))


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C says that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; what was computed is kept: the same command goes on") from None


def finish(command: Any, settings: Any, result: LoopResult[Any], outcome: Callable[[], str]) -> None:
    """Report how a training ended, and print its result if the command has --json.

    Raises:
        KeyboardInterrupt: for a training that was interrupted.
    """
    if result.finished:
        report(f"done: {outcome()}; {command.output} holds the graft")
    else:
        message = (
            f"stopped after step {result.step} of {settings.steps}, which is saved: the same command goes on"
        )
        if settings.minutes is None:
            raise KeyboardInterrupt(message)
        report(message)
    if command.json:
        print(json.dumps({**dataclasses.asdict(result), "output": str(command.output)}))
