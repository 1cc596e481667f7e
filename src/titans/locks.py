"""One process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Wait until no other process is inside with this folder, or this file, which is made if there is none; a
    process that dies lets go.

    Systems and file systems without locks do not wait.

    Args:
        wait: otherwise whoever finds another inside is refused.

    Raises:
        BlockingIOError: without `wait`, if another process is inside.
        OSError: if the file cannot be made.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
