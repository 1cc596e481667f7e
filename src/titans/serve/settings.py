"""What a server allows, and to whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits of a server. Sizes in bytes, times in seconds.

    folder: where memories are kept. keys: API keys; without any everybody who reaches the server is one user.
    local: only requests that a browser on this machine would send to this machine are answered.
    max_tokens: of one answer. default_tokens: of an answer in a chat that names no number.
    requests: how many may be under way or wait at the same time; the next one gets 429.
    request_seconds: of one answer or reading. body_seconds: between two pieces of a body, or of an
    answer that a client takes.
    body: of a text, upload or memory file. json: of any other body. ram: of memories held in RAM, beyond
    which those used least recently are on disk alone. memories, memory_bytes: of one key.
    """

    folder: Path
    keys: tuple[str, ...] = field(default=(), repr=False)
    local: bool = True
    rows: int = 64
    max_tokens: int = 16_384
    default_tokens: int = 400
    requests: int = 256
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    body: int = 64 * MIB
    json: int = 4 * MIB
    ram: int = 1024 * MIB
    memories: int = 1_000
    memory_bytes: int = 10_240 * MIB
