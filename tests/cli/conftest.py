from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

CtrlC = Callable[[Callable[[], bool]], AbstractContextManager[None]]


@pytest.fixture
def ctrl_c_when() -> CtrlC:
    """Interrupts what runs in this process, as Ctrl-C does, as soon as something has happened.

    A command in a process of its own first takes seconds to load its libraries.
    """

    @contextmanager
    def interrupting(happened: Callable[[], bool]) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            deadline = time.monotonic() + 100
            while not happened() and time.monotonic() < deadline:
                if over.wait(0.02):
                    return
            os.kill(os.getpid(), signal.SIGINT)

        # Where the tests run in the background, the shell has them ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGINT, before)

    return interrupting
