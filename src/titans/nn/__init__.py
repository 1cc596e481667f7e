"""Layers and blocks, in torch alone. State goes in as an argument and comes out as a value."""

from titans.nn.blocks import BLOCKS, BlockContext, BlockSettings
from titans.nn.memory import NeuralMemory, NeuralMemoryState

__all__ = ["BLOCKS", "BlockContext", "BlockSettings", "NeuralMemory", "NeuralMemoryState"]
