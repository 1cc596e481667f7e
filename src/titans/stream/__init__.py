"""One text, read on and on: feed it, generate from it, save what was read, go on later."""

from titans.stream.reader import Reader, reader_of
from titans.stream.saved import LayerStats, MemoryFile, SessionStats, describe_memory, fingerprint
from titans.stream.session import Session
from titans.stream.session_state import FeedResult
from titans.stream.together import feed_together

__all__ = [
    "FeedResult",
    "LayerStats",
    "MemoryFile",
    "Reader",
    "Session",
    "SessionStats",
    "describe_memory",
    "feed_together",
    "fingerprint",
    "reader_of",
]
