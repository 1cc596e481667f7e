"""Kernels for what surrounds a scan in a layer: convolution and head vectors before, norm and gate after.

Each computes the same as the plain torch next to its call, which is the place to read it: C++ in `native.py`,
Triton in `filter.py`. A layer's `backend` decides which kernels may run. A kernel refuses tensors that it
does not take; then the plain path runs, whatever the backend.
"""

from __future__ import annotations

# By the name of a scan's backend. Any other name, as "chunkwise" and "reference", means the plain path.
_ALLOWED = {
    "auto": ("native", "triton"),
    "native": ("native",),
    "native_bfloat16": ("native",),
    "triton": ("triton",),
}


def allows(backend: str, kernels: str) -> bool:
    """Whether a layer with this `backend` may run these kernels, "native" or "triton"."""
    return kernels in _ALLOWED.get(backend, ())
