"""Model in, numbers out: bits per byte by position, what the gates have learned; and a memory that may not
write, or stands alone."""

from titans.evaluate.gates import LayerGates, gate_statistics
from titans.evaluate.memory import keep_memory_only
from titans.evaluate.perplexity import Perplexity, PositionLoss, bits_per_byte, score

__all__ = [
    "LayerGates",
    "Perplexity",
    "PositionLoss",
    "bits_per_byte",
    "gate_statistics",
    "keep_memory_only",
    "score",
]
