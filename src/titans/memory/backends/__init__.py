"""The ways to run a scan. A backend is one function and one verifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from titans.memory.backends.native import native_bfloat16_scan, native_scan
from titans.memory.backends.native import refuses as native_refuses
from titans.memory.backends.native import refuses_bfloat16 as native_refuses_bfloat16
from titans.memory.backends.triton import refuses as triton_refuses
from titans.memory.backends.triton import triton_scan
from titans.memory.checks import hand_written_refuses
from titans.memory.chunkwise.scan import chunkwise_scan
from titans.memory.problem import ScanProblem
from titans.memory.reference import reference_scan
from titans.memory.state import MemoryState

Scan = Callable[[ScanProblem], tuple[Tensor, MemoryState, Tensor]]


class Backend(NamedTuple):
    """A way to run a scan. `refuses` says in a sentence why it cannot run a problem, or returns None."""

    scan: Scan
    refuses: Callable[[ScanProblem], str | None]


# In the order in which "auto" tries them.
BACKENDS: dict[str, Backend] = {
    "native": Backend(native_scan, native_refuses),
    "triton": Backend(triton_scan, triton_refuses),
    "chunkwise": Backend(chunkwise_scan, lambda problem: hand_written_refuses()),
    "reference": Backend(reference_scan, lambda problem: None),
    # After one that never refuses: less exact than asked for only where it is asked for.
    "native_bfloat16": Backend(native_bfloat16_scan, native_refuses_bfloat16),
}


def choose_backend(name: str, problem: ScanProblem) -> Backend:
    """The backend of that name, or for "auto" the first that does not refuse.

    Raises:
        ValueError: for an unknown name, or a named backend that refuses, with its reason.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.refuses(problem) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not known here: choose one of {['auto', *BACKENDS]}")
    reason = BACKENDS[name].refuses(problem)
    if reason is not None:
        raise ValueError(f"backend={name!r} refuses this call: {reason}")
    return BACKENDS[name]
