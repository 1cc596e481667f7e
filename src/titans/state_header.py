"""State files, without torch: the header of text and shapes, and the checksum over every byte.

`titans.hf.state_file` reads and writes the tensors. Nothing that is read is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = "titans-state/2"
_BLOCK = 1 << 20
# What the safetensors format allows.
_MAX_HEADER = 100_000_000
_CHECKSUM = re.compile(rb'(?<="checksum":")[0-9a-f]{64}(?=")')


@dataclass(frozen=True)
class Entry:
    """What a tensor is before it is read. dtype: as the safetensors format names it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class StateHeader:
    """The header of an open file. about: its text. entries: of all tensors, by name. same: which of
    them are not stored because another one is equal, and which that is.

    All is read through one handle: a file that takes its place meanwhile is not seen.
    """

    path: Path
    about: dict[str, str]
    entries: dict[str, Entry]
    same: dict[str, str]
    raw: bytes
    file: BinaryIO

    def check(self) -> None:
        """Read the whole file; ValueError if any byte of it was altered."""
        self.file.seek(0)
        place = checksum_place(self.path, self.raw)
        head = self.file.read(len(self.raw))
        digest = hashlib.sha256(head[:place])
        digest.update(head[place + 64 :])
        while block := self.file.read(_BLOCK):
            digest.update(block)
        if head != self.raw or head[place : place + 64] != digest.hexdigest().encode():
            raise damaged_content(self.path)


@contextmanager
def open_header(path: str | Path) -> Iterator[StateHeader]:
    """Read the header of a file written by `write_state_file`.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is damaged, or of another format.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} is not a file: give a memory written by `save` or `titans memorize`"
        ) from None
    with file:
        raw = _read_header(path, file)
        about, entries, size = _parsed(path, raw)
        if os.fstat(file.fileno()).st_size != len(raw) + size:
            raise damaged(path, "its length differs from the one in its header")
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} has format {about.get('format')!r}: this version reads {FORMAT!r}")
        same = _aliases(path, about, entries)
        whole = entries | {name: entries[of] for name, of in same.items()}
        yield StateHeader(path, about, whole, same, raw, file)


def _read_header(path: Path, file: BinaryIO) -> bytes:
    """The bytes before the tensors: the length of the header, and the header."""
    size = file.read(8)
    length = int.from_bytes(size, "little")
    rest = file.read(length) if len(size) == 8 and length <= _MAX_HEADER else b""
    if not rest or len(rest) != length:
        raise damaged(path, "its header is incomplete")
    return size + rest


def _parsed(path: Path, header: bytes) -> tuple[dict[str, str], dict[str, Entry], int]:
    """The header's text, what all tensors are, and how many bytes these take."""
    try:
        found = json.loads(header[8:])
        about = found.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in about.values()):
            raise TypeError("its metadata is not text")
        entries = {
            name: Entry(str(entry["dtype"]), tuple(map(int, entry["shape"])), _nbytes(entry))
            for name, entry in found.items()
        }
        size = max((int(entry["data_offsets"][1]) for entry in found.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise damaged(path, error) from None
    return about, entries, size


def _nbytes(entry: dict[str, Any]) -> int:
    begin, end = map(int, entry["data_offsets"])
    return end - begin


def damaged_content(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: its checksum does not fit its content; use another copy of it")


def damaged_header(path: str | Path) -> ValueError:
    return ValueError(f"{path} has a damaged header: write it again with `save`")


def damaged(path: Path, error: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged or not a safetensors file ({error})")


def _aliases(path: Path, about: dict[str, str], entries: dict[str, Entry]) -> dict[str, str]:
    """Which tensors are not stored because another one is equal, and which that is."""
    try:
        same = json.loads(about["same"])
        if all(name not in entries and of in entries for name, of in same.items()):
            return dict(same)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    raise damaged_header(path)


def seal(path: Path) -> None:
    """Put the checksum of a file in its place in the header, and wait until the disk has it all."""
    with path.open("r+b") as file:
        header = _read_header(path, file)
        place = checksum_place(path, header)
        digest = hashlib.sha256(header[:place])
        digest.update(header[place + 64 :])
        while block := file.read(_BLOCK):
            digest.update(block)
        file.seek(place)
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def checksum_place(path: Path, header: bytes) -> int:
    """Where in a header its checksum of 64 letters begins; ValueError where there is none."""
    # Quotes within a header's text have a backslash: this is found nowhere but where it belongs.
    found = _CHECKSUM.search(header, 8)
    if found is None:
        raise damaged_header(path)
    return found.start()
