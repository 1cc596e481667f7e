"""Memory Caching (arXiv 2602.24281): checkpoints of a memory are kept along the text and read, too."""

from titans.nn.memory.caching.checkpoints import Caching, Checkpoints
from titans.nn.memory.caching.layer import CachedMemory, CachedMemoryState

__all__ = ["CachedMemory", "CachedMemoryState", "Caching", "Checkpoints"]
