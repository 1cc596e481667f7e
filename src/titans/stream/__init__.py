"""One text, read on and on: feed it, generate from it, save what was learned, go on later."""

from titans.stream.saved import LayerStats, MemoryFile, SessionStats, describe_memory, fingerprint
from titans.stream.session import FeedResult, Session
from titans.stream.together import feed_together

__all__ = [
    "FeedResult",
    "LayerStats",
    "MemoryFile",
    "Session",
    "SessionStats",
    "describe_memory",
    "feed_together",
    "fingerprint",
]
