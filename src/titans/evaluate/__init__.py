"""Model in, numbers out: bits per byte by position; and a memory that may not write, or stands alone."""

from titans.evaluate.memory import frozen_memory, keep_memory_only
from titans.evaluate.perplexity import Perplexity, PositionLoss, bits_per_byte, score

__all__ = [
    "Perplexity",
    "PositionLoss",
    "bits_per_byte",
    "frozen_memory",
    "keep_memory_only",
    "score",
]
