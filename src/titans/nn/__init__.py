"""Layers and blocks, in torch alone. State goes in as an argument and comes out as a value."""

from titans.nn.blocks import BLOCKS, BlockContext, BlockSettings
from titans.nn.memory import FORMS, MemoryForm, NeuralMemory, NeuralMemoryState
from titans.nn.memory.tnt.layer import TNTMemory, TNTMemoryState

__all__ = [
    "BLOCKS",
    "FORMS",
    "BlockContext",
    "BlockSettings",
    "MemoryForm",
    "NeuralMemory",
    "NeuralMemoryState",
    "TNTMemory",
    "TNTMemoryState",
]
