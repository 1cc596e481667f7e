"""The memories that a graft can have; one class for each, and one line here.

Their names are the fields of `GraftConfig`, the arguments of `titans.graft` and the attributes of a graft and
of its state. They read a text in this order; the last one's surprise is that of the graft.
"""

from titans.hf.graft.memories.adaptation import AdaptationMemory
from titans.hf.graft.memories.association import AssociationMemory
from titans.hf.graft.memories.protocol import Call, Found, GraftMemory, Inside
from titans.hf.graft.memories.residual import ResidualMemory

MEMORIES: dict[str, type[GraftMemory]] = {
    "residual": ResidualMemory,
    "association": AssociationMemory,
    "adaptation": AdaptationMemory,
}

__all__ = ["MEMORIES", "Call", "Found", "GraftMemory", "Inside"]
