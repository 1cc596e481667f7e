"""The long-term memory as layers: `NeuralMemory` here, its schedule for parallel shards in `tnt/`."""

from titans.nn.memory.features import FEATURES, FeatureMap
from titans.nn.memory.form import FORMS, MemoryForm
from titans.nn.memory.layer import NeuralMemory, NeuralMemoryState

__all__ = ["FEATURES", "FORMS", "FeatureMap", "MemoryForm", "NeuralMemory", "NeuralMemoryState"]
