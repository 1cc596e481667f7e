"""What `titans graft` says while it caches and trains, and at the end, whatever it trains."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titans.cli.progress import SECONDS_BETWEEN_LINES
from titans.cli.terminal import report
from titans.train.progress import clock

if TYPE_CHECKING:
    from titans.train.graft.loop import LoopResult
    from titans.train.graft.settings import LoopSettings


@dataclass(frozen=True)
class Training:
    """How a training is reported.

    of_step, of_evaluation: the parts of a logged step's line, and what an evaluation found. outcome: of its
    result, a sentence.
    """

    settings: LoopSettings
    of_step: Callable[[dict[str, Any]], list[str]]
    of_evaluation: Callable[[dict[str, Any]], str]
    outcome: Callable[[LoopResult[Any]], str]


class Progress:
    """A line on stderr now and then.

    Args:
        trainings: by name, those that there may be.
    """

    def __init__(self, trainings: Mapping[str, Training]) -> None:
        self._trainings = trainings
        self._last = 0.0
        # The training that was heard of last, and the first step that was logged of it, with its time.
        self._name = ""
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

    def training(self, name: str, line: dict[str, Any]) -> None:
        if name != self._name:
            self._name, self._first = name, None
        step, steps, of = line["step"], line["steps"], self._trainings[name]
        if line["kind"] == "held out":
            report(f"{name} · step {step}/{steps} · {of.of_evaluation(line)}")
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
        if not self._is_time() and step < steps:
            return
        parts = [f"{name} · step {step}/{steps}", *of.of_step(line)]
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


def finish(command: Any, trainings: Mapping[str, Training], results: Mapping[str, LoopResult[Any]]) -> None:
    """Report how the trainings ended, and print their results if the command has --json.

    Raises:
        KeyboardInterrupt: for a training that was interrupted.
    """
    for name, result in results.items():
        if not result.finished:
            settings = trainings[name].settings
            message = (
                f"{name}: stopped after step {result.step} of {settings.steps}, which is saved: the same "
                "command goes on"
            )
            if settings.minutes is None:
                raise KeyboardInterrupt(message)
            report(message)
            break
        report(f"{name}: {trainings[name].outcome(result)}")
    else:
        report(f"done: {command.output} holds the graft")
    if command.json:
        found = {name: dataclasses.asdict(result) for name, result in results.items()}
        print(json.dumps({**found, "output": str(command.output)}))
