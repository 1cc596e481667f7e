"""Ctrl-C during a training: the step ends, and a checkpoint is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Stoppable(Protocol):
    """A training that ends at a checkpoint after the step in which this becomes True."""

    stop_requested: bool


@contextmanager
def stops_on_interrupt(training: Stoppable) -> Iterator[None]:
    """The first SIGINT lets the step end and a checkpoint be written; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if training.stop_requested:
            raise KeyboardInterrupt
        training.stop_requested = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
