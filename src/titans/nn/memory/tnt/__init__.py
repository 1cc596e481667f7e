"""The TNT schedule: one memory of large chunks, and local memories that begin anew with every shard."""

from titans.nn.memory.tnt.layer import TNTMemory, TNTMemoryState

__all__ = ["TNTMemory", "TNTMemoryState"]
