"""Layers and blocks, in torch alone. State goes in as an argument and comes out as a value."""

from titans.nn.blocks import BLOCKS, Block, BlockResult, BlockSettings
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.memory import FEATURES, FORMS, FeatureMap, MemoryForm, NeuralMemory, NeuralMemoryState
from titans.nn.memory.caching import CachedMemory, CachedMemoryState, Caching
from titans.nn.memory.tnt.layer import TNTMemory, TNTMemoryState

__all__ = [
    "BLOCKS",
    "FEATURES",
    "FORMS",
    "Block",
    "BlockContext",
    "BlockResult",
    "BlockSettings",
    "CachedMemory",
    "CachedMemoryState",
    "Caching",
    "FeatureMap",
    "MemoryForm",
    "MemoryTrace",
    "NeuralMemory",
    "NeuralMemoryState",
    "TNTMemory",
    "TNTMemoryState",
]
