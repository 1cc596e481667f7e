"""Commands in processes of their own, with the input and output that they are given."""

from __future__ import annotations

import os
import signal
import sys
import traceback

import torch

from titans.cli import main


def start(
    *arguments: object, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None
) -> int:
    """The number of a process that runs a command; a file descriptor that is None is /dev/null.

    It is a copy of this process, since a new one first loads libraries for seconds. Tests that call this
    ignore the warning of a fork next to threads: those of the tests' machinery hold nothing that it needs.
    """
    if process := os.fork():
        return process
    code = 1
    try:
        os.setsid()
        # Another number of threads would wait for those that stayed in the other process.
        torch.set_num_threads(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, given in enumerate((stdin, stdout, stderr)):
            os.dup2(nothing if given is None else given, number)
        # The other ends of pipes among them.
        os.closerange(3, 1024)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        # Where the tests run in the background, the shell has them ignore the signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main([str(argument) for argument in arguments])
        # As at the end of any program.
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """The exit code of a process, waited for; the signal that killed it is below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
