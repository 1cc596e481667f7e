"""Memories as files in a folder: who owns which, what is in RAM, and limits.

A memory `mem_…` is `mem_….json`, which says whose it is and of which model, and, once anything was read,
`mem_….memory`, an ordinary memory file. Both are written to a temporary name, flushed and renamed: after a
crash there is what was acknowledged. A session that is kept here never changes; whoever reads on forks it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans.hf.state_file import open_state_file
from titans.memory_file import recent_tokens, saved_model, surprise_so_far
from titans.serve.engine import Engine
from titans.serve.errors import ApiError
from titans.serve.settings import Settings
from titans.stream import Session
from titans.stream.turns import BEGUN

_ID = re.compile(r"mem_[0-9a-f]{24}")


def owner_of(key: str | None) -> str:
    """How a key's memories are marked; the key itself is written nowhere."""
    return "" if key is None else hashlib.sha256(b"titans serve\0" + key.encode()).hexdigest()


@dataclass(frozen=True)
class State:
    """A session that stands still, and whether a message of a conversation was answered in it."""

    session: Session
    begun: bool = False


@dataclass(eq=False)
class Memory:
    """A memory. tokens, surprise: read so far, and their mean surprise. size: of its file in bytes, 0 before
    anything was read. changes: how often it was written. turn: held by whoever changes it."""

    id: str
    owner: str
    model: str
    created: int
    tokens: int = 0
    size: int = 0
    surprise: float | None = None
    begun: bool = False
    deleted: bool = False
    changes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def shown(self) -> dict[str, Any]:
        """What a client sees."""
        return {
            "id": self.id, "object": "memory", "model": self.model, "created": self.created,
            "tokens": self.tokens, "bytes": self.size, "surprise": self.surprise,
        }  # fmt: skip


class Memories:
    """All memories of a server.

    Its methods block on the disk, and threads may share them.

    Args:
        engines: by the name of their model.

    Raises:
        ValueError: if the folder is used by another server, or cannot be used.
    """

    def __init__(self, settings: Settings, engines: Mapping[str, Engine]) -> None:
        self.settings, self.engines = settings, engines
        self._lock = threading.RLock()
        self._known: dict[str, Memory] = {}
        # Of models that are not served now: left unchanged.
        self._unserved: dict[str, Memory] = {}
        self._held: OrderedDict[str, State] = OrderedDict()
        try:
            settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._guard = (settings.folder / ".lock").open("w")
        except OSError as error:
            raise ValueError(
                f"memories={str(settings.folder)!r} cannot be used ({error.strerror}): give another folder"
            ) from None
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._guard.close()
            raise ValueError(
                f"memories={str(settings.folder)!r} is used by another server: give another folder"
            ) from None
        # What a server that was killed has left there is text of users.
        self._incoming = settings.folder / ".incoming"
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700, exist_ok=True)
        self._find()

    def incoming(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for a file on its way here, on the same disk."""
        return tempfile.TemporaryDirectory(dir=self._incoming, ignore_cleanup_errors=True)

    def close(self) -> None:
        """Let another server use the folder."""
        self._guard.close()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def held_bytes(self) -> int:
        """Bytes of the memories in RAM; what forks share counts for each."""
        with self._lock:
            return sum(state.session.state_bytes for state in self._held.values())

    def all_of(self, owner: str) -> list[Memory]:
        """A key's memories, the newest first."""
        with self._lock:
            own = [memory for memory in self._known.values() if memory.owner == owner]
        return sorted(own, key=lambda memory: (-memory.created, memory.id))

    def get(self, owner: str, id: str) -> Memory:
        """A key's memory; 404 for those of others and for those that do not exist, without a difference."""
        memory = self._known.get(id) if _ID.fullmatch(id) else None
        if memory is None or memory.owner != owner:
            other = self._unserved.get(id)
            raise _missing(id, other.model if other and other.owner == owner else None)
        return memory

    def create(self, owner: str, model: str, source: Memory | None = None) -> Memory:
        """A new memory: empty, or a copy of one as it stands now.

        Raises:
            ApiError: 403 where the key has as many as it may have, or as many bytes.
        """
        self._check_count(owner)
        memory = Memory("mem_" + secrets.token_hex(12), owner, model, int(time.time()))
        state = None if source is None else self.state(source)
        if state is not None and state.session.num_tokens:
            self._save(memory, state)
        with self._lock:
            try:
                self._check_count(owner)
                # Last: without it there is no such memory after a crash.
                self._write_record(memory)
            except ApiError:
                self.file(memory).unlink(missing_ok=True)
                raise
            self._known[memory.id] = memory
            if state is not None:
                self._keep(memory, state)
        return memory

    def state(self, memory: Memory) -> State:
        """What a memory holds, from RAM or its file.

        Raises:
            ApiError: 404 if it was deleted meanwhile, 409 if its file is damaged or of other weights.
        """
        engine = self.engines[memory.model]
        while True:
            with self._lock:
                if memory.deleted:
                    raise _missing(memory.id)
                if (state := self._held.get(memory.id)) is not None:
                    self._held.move_to_end(memory.id)
                    return state
                changes = memory.changes
            if not memory.size:
                return State(engine.session())
            try:
                session = Session.load(self.file(memory), engine.model, engine.tokenizer)
            except (ValueError, OSError):
                if memory.deleted:
                    continue
                raise ApiError(
                    409,
                    "the file of this memory is damaged or of another checkpoint: upload one, or delete it",
                    param="memory",
                ) from None
            with self._lock:
                # What was written meanwhile must not be followed by what was there before.
                if not memory.deleted and memory.changes == changes:
                    state = State(session, memory.begun)
                    self._keep(memory, state)
                    return state

    def commit(self, memory: Memory, state: State) -> None:
        """Have a memory hold another state, on the disk when this returns.

        Raises:
            ApiError: 403 if the key has no room for it, 404 if it was deleted meanwhile; 507 if the disk has
                none. The memory then holds what it held.
        """
        self._save(memory, state)
        with self._lock:
            if memory.deleted:
                self.file(memory).unlink(missing_ok=True)
                raise _missing(memory.id)
            memory.changes += 1
            self._keep(memory, state)

    def accept(self, memory: Memory, path: Path) -> State:
        """The state in a file from outside, every part of it checked.

        Raises:
            ApiError: 400 for what is no memory of this model.
        """
        engine = self.engines[memory.model]
        try:
            session = Session.load(path, engine.model, engine.tokenizer)
            with open_state_file(path) as file:
                return State(session, BEGUN in file.about)
        except (ValueError, OSError) as error:
            reason = str(error).replace(str(path), "the file")
            raise ApiError(400, reason[:1000], code="invalid_memory_file") from None

    def delete(self, memory: Memory) -> None:
        """Remove a memory, also from the disk."""
        with self._lock:
            memory.deleted = True
            self._known.pop(memory.id, None)
            self._held.pop(memory.id, None)
            # The record first: without it the rest is never found again.
            self._record(memory.id).unlink(missing_ok=True)
            self.file(memory).unlink(missing_ok=True)
            _flush(self.settings.folder)

    def file(self, memory: Memory) -> Path:
        """Where its memory file is, or will be."""
        return self.settings.folder / f"{memory.id}.memory"

    def _record(self, id: str) -> Path:
        return self.settings.folder / f"{id}.json"

    def _save(self, memory: Memory, state: State) -> None:
        """Write a state to a memory's file, and note what it holds; errors as of `commit`."""
        # A header comes on top; what is known of the file before is the better guess.
        self._check_room(memory, max(state.session.state_bytes, memory.size))
        try:
            state.session.save(self.file(memory), {BEGUN: "begun"} if state.begun else {})
        except OSError as error:
            raise ApiError(
                507,
                f"the memory could not be written ({error.strerror or 'no room'}); it is unchanged",
                code="disk_full",
            ) from None
        memory.tokens, memory.surprise = state.session.num_tokens, state.session.mean_surprise
        memory.size, memory.begun = self.file(memory).stat().st_size, state.begun

    def _check_count(self, owner: str) -> None:
        if len(own := self.all_of(owner)) >= self.settings.memories:
            raise ApiError(
                403,
                f"this key has {len(own):,} memories, as many as it may have: delete some first",
                code="too_many_memories",
            )

    def _check_room(self, memory: Memory, size: int) -> None:
        used = sum(other.size for other in self.all_of(memory.owner) if other is not memory)
        if used + size > self.settings.memory_bytes:
            raise ApiError(
                403,
                f"this key's memories take {used:,} of {self.settings.memory_bytes:,} bytes, and this one "
                f"needs {size:,}: delete some first",
                code="memory_quota_exceeded",
            )

    def _keep(self, memory: Memory, state: State) -> None:
        """Hold a state in RAM, and let go of those used least recently beyond the limit."""
        self._held[memory.id] = state
        self._held.move_to_end(memory.id)
        total = self.held_bytes
        while total > self.settings.ram and len(self._held) > 1:
            _, least = self._held.popitem(last=False)
            total -= least.session.state_bytes

    def _write_record(self, memory: Memory) -> None:
        path = self._record(memory.id)
        content = {name: getattr(memory, name) for name in ("id", "owner", "model", "created")}
        temporary = path.with_name(f".{path.name}.part")
        try:
            with temporary.open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ApiError(
                507, f"the memory could not be written ({error.strerror})", code="disk_full"
            ) from None
        _flush(self.settings.folder)

    def _find(self) -> None:
        """Find the memories that are there, and remove what was never acknowledged."""
        for path in self.settings.folder.glob("mem_*.json"):
            try:
                content = json.loads(path.read_bytes())
                memory = Memory(
                    str(content["id"]), str(content["owner"]), str(content["model"]), int(content["created"])
                )
            except (ValueError, TypeError, KeyError, OSError, RecursionError):
                continue
            if not _ID.fullmatch(path.stem) or memory.id != path.stem:
                continue
            if memory.model in self.engines:
                self._look_at(memory)
                self._known[memory.id] = memory
            else:
                self._unserved[memory.id] = memory
        for path in self.settings.folder.iterdir():
            id = path.name.removeprefix(".").partition(".")[0]
            mine = _ID.fullmatch(id) is not None
            if mine and (
                path.suffix == ".part" or (path.suffix == ".memory" and not self._record(id).exists())
            ):
                path.unlink(missing_ok=True)

    def _look_at(self, memory: Memory) -> None:
        """Note what a memory's file holds; a damaged one is found when it is used."""
        path = self.file(memory)
        with suppress(OSError, ValueError), open_state_file(path) as file:
            memory.size = path.stat().st_size
            _, num_columns = saved_model(file.header)
            memory.tokens = num_columns + bool(recent_tokens(path, file.about, None))
            total, count = surprise_so_far(path, file.about)
            memory.surprise = total / count if count else None
            memory.begun = BEGUN in file.about


def _missing(id: str, unserved: str | None = None) -> ApiError:
    """unserved: the memory's model, if the memory is there and its model is not served."""
    text = f"there is no memory {id[:40]!r}"
    if unserved is not None:
        text = (
            f"memory {id!r} is of the model {unserved[:200]!r}, which is not served: start the server with it"
        )
    return ApiError(404, text, param="memory", code="memory_not_found")


def _flush(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
