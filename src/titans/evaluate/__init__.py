"""Model in, numbers out: bits per byte by position, what the gates have learned, how many keys a memory
can distinguish; and a model reduced to its memory."""

from titans.evaluate.dimensions import KeyDimensions, effective_dimensions, key_dimensions
from titans.evaluate.gates import LayerGates, gate_statistics
from titans.evaluate.memory import keep_memory_only
from titans.evaluate.perplexity import Perplexity, PositionLoss, bits_per_byte, score

__all__ = [
    "KeyDimensions",
    "LayerGates",
    "Perplexity",
    "PositionLoss",
    "bits_per_byte",
    "effective_dimensions",
    "gate_statistics",
    "keep_memory_only",
    "key_dimensions",
    "score",
]
