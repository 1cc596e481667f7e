"""Titans: sequence models whose long-term memory learns while it reads.

Public names are loaded on first use, so that `import titans` costs nothing and the memory and the layers need
torch alone; the models (`TitansForCausalLM` and its relatives) need the `hf` extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "MemoryNetwork": "titans.memory",
    "MemoryState": "titans.memory",
    "memory_read": "titans.memory",
    "memory_scan": "titans.memory",
    "NeuralMemory": "titans.nn",
    "GraftedForCausalLM": "titans.hf",
    "PRESETS": "titans.hf",
    "TitansCache": "titans.hf",
    "TitansConfig": "titans.hf",
    "TitansForCausalLM": "titans.hf",
    "TitansModel": "titans.hf",
    "graft": "titans.hf.graft",
    "Session": "titans.stream",
    "load": "titans.zoo",
}

__all__ = [
    "PRESETS",
    "GraftedForCausalLM",
    "MemoryNetwork",
    "MemoryState",
    "NeuralMemory",
    "Session",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansModel",
    "__version__",
    "graft",
    "load",
    "memory_read",
    "memory_scan",
]

if TYPE_CHECKING:
    from titans.hf import (
        PRESETS,
        GraftedForCausalLM,
        TitansCache,
        TitansConfig,
        TitansForCausalLM,
        TitansModel,
    )
    from titans.hf.graft import graft
    from titans.memory import MemoryNetwork, MemoryState, memory_read, memory_scan
    from titans.nn import NeuralMemory
    from titans.stream import Session
    from titans.zoo import load


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'titans' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("titans", "torch"):
            raise
        raise ImportError(f"titans.{name}: {error}; pip install 'titans-ltm[hf]'", name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
