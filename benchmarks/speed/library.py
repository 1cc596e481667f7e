"""What differs between the versions of this library that `--against` times side by side, in one place."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn


def full_attention(width: int, num_heads: int, head_dim: int) -> nn.Module:
    """A layer of full attention, (batch, time, width)."""
    try:
        from titans.nn.attention.full import FullAttention
    except ModuleNotFoundError:
        from titans.nn.full_attention import FullAttention
    return FullAttention(width, num_heads, head_dim)


def run_on(backend: str, model: nn.Module) -> nn.Module:
    """The layer or model, with one backend for all that it computes, whatever "auto" would prefer."""
    if find_spec("titans.nn.kernels") is None and backend != "native_bfloat16":
        # Before titans.nn.kernels, the compiled parts of layers looked into the registry alone.
        from titans.memory import BACKENDS

        for name in [name for name in BACKENDS if name not in (backend, "reference")]:
            del BACKENDS[name]
        return model
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model
