"""Commands that a launcher such as torchrun has started several times."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

# Connections that break because another process has failed are logged as warnings, with a stack; and so is
# that a model might have parameters that take no part in a step.
_LOGGING = "TORCH_CPP_LOG_LEVEL"


def is_launched() -> bool:
    """Whether there are other processes of this command."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1" and "RANK" in os.environ


def quieten_torch() -> None:
    """Leave it to the process that failed to say why; before torch is loaded, unless the user chose."""
    if is_launched():
        os.environ.setdefault(_LOGGING, "ERROR")


def is_follower() -> bool:
    """Whether another process, the first, prints for this one."""
    return is_launched() and os.environ["RANK"] != "0"


@contextmanager
def one_process_explains() -> Iterator[None]:
    """All processes fail alike within this block, and the first one explains it."""
    if not is_follower():
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
            yield
    except (SystemExit, ValueError, OSError):
        # A launcher kills all as soon as one has ended, and the first needs time to explain.
        time.sleep(2)
        raise SystemExit(2) from None
