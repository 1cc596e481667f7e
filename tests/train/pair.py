"""Two processes connected as torchrun connects them, forked from the test: nothing is imported anew."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def run_pair(work: Callable[[int], int | None], folder: Path) -> list[int | None]:
    """Call `work` with ranks 0 and 1; their exit codes. What each wrote to stderr is in `folder`/RANK.err."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pair = [context.Process(target=_process, args=(work, rank, port, folder)) for rank in range(2)]
    with warnings.catch_warnings():
        # From Python 3.12 on, for any thread of the test runner.
        warnings.simplefilter("ignore", DeprecationWarning)
        for process in pair:
            process.start()
    for process in pair:
        process.join(240)
        process.kill()
    return [process.exitcode for process in pair]


def _process(work: Callable[[int], int | None], rank: int, port: int, folder: Path) -> None:
    # Trainer collects garbage before it begins, in all that the test runner has loaded.
    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with open(folder / f"{rank}.err", "w") as log:
        os.dup2(log.fileno(), 2)
        sys.stderr = log
        try:
            status = work(rank) or 0
        except BaseException:
            traceback.print_exc()
            status = 70
        log.flush()
        os._exit(status)
