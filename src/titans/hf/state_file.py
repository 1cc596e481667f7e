"""State files: tensors and a header of text in one safetensors file, with a checksum over every byte of it.

Written to a temporary name, flushed and renamed, so that what was there before stays until all is written.
Nothing that is read is executed, and no tensor is read before names, shapes and types are known to be right.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from titans import __version__

FORMAT = "titans-state/2"
_BLOCK = 1 << 20
# What the safetensors format allows.
_MAX_HEADER = 100_000_000
_CHECKSUM = re.compile(rb'(?<="checksum":")[0-9a-f]{64}(?=")')
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What a tensor is before it is read. dtype: a name where no state has such values."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateFile:
    """An open file. about: its header. kinds: of all tensors, by name.

    All is read through one handle: a file that takes its place meanwhile is not seen.
    """

    path: Path
    about: dict[str, str]
    kinds: dict[str, Kind]
    _file: BinaryIO
    _header: bytes
    _same: dict[str, str]

    def tensors(self) -> dict[str, Tensor]:
        """Read them all; those that were equal share their storage.

        Raises:
            ValueError: if any byte of the file was altered.
        """
        self._file.seek(0)
        content = self._file.read()
        place = _checksum_place(self.path, self._header)
        digest = hashlib.sha256(content[:place])
        digest.update(memoryview(content)[place + 64 :])
        written = content[place : place + 64].decode("ascii", "replace")
        if written != digest.hexdigest() or not content.startswith(self._header):
            raise ValueError(
                f"{self.path} is damaged: its checksum does not fit its content; use another copy of it"
            )
        try:
            stored = load(content)
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise _damaged(self.path, error) from None
        return stored | {name: stored[of] for name, of in self._same.items()}


def write_state_file(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors, equal ones once, and a header.

    Raises:
        OSError, SafetensorError: if the file cannot be written; what was there before is left.
    """
    first: dict[bytes, str] = {}
    stored: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        content = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + values).digest()
        like = first.setdefault(content, name)
        if like == name:
            # safetensors refuses tensors that share their storage.
            stored[name] = tensor.clone()
        else:
            same[name] = like
    about = {**about, "format": FORMAT, "library": __version__, "same": json.dumps(same)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(stored, temporary, {**about, "checksum": "0" * 64})
        seal(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The name is on the disk when the folder is; not every file system has that.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def open_state_file(path: str | Path) -> Iterator[StateFile]:
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
        header = _read_header(path, file)
        about, kinds, size = _parsed(path, header)
        if os.fstat(file.fileno()).st_size != len(header) + size:
            raise _damaged(path, "its length differs from the one in its header")
        if about.get("format") != FORMAT:
            raise ValueError(f"{path} has format {about.get('format')!r}: this version reads {FORMAT!r}")
        same = _aliases(path, about, kinds)
        yield StateFile(
            path, about, kinds | {name: kinds[of] for name, of in same.items()}, file, header, same
        )


def _read_header(path: Path, file: BinaryIO) -> bytes:
    """The bytes before the tensors: the length of the header, and the header."""
    size = file.read(8)
    length = int.from_bytes(size, "little")
    rest = file.read(length) if len(size) == 8 and length <= _MAX_HEADER else b""
    if not rest or len(rest) != length:
        raise _damaged(path, "its header is incomplete")
    return size + rest


def _parsed(path: Path, header: bytes) -> tuple[dict[str, str], dict[str, Kind], int]:
    """The header's text, the kinds of all tensors, and how many bytes these take."""
    try:
        entries = json.loads(header[8:])
        about = entries.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in about.values()):
            raise TypeError("its metadata is not text")
        kinds = {
            name: Kind(_DTYPES.get(entry["dtype"], entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        }
        size = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(path, error) from None
    return about, kinds, size


def damaged_header(path: str | Path) -> ValueError:
    return ValueError(f"{path} has a damaged header: write it again with `save`")


def _damaged(path: Path, error: Exception | str) -> ValueError:
    return ValueError(f"{path} is damaged or not a safetensors file ({error})")


def _aliases(path: Path, about: dict[str, str], kinds: dict[str, Kind]) -> dict[str, str]:
    """Which tensors are not stored because another one is equal, and which that is."""
    try:
        same = json.loads(about["same"])
        if all(name not in kinds and of in kinds for name, of in same.items()):
            return dict(same)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    raise damaged_header(path)


def seal(path: Path) -> None:
    """Put the checksum of a file in its place in the header, and wait until the disk has it all."""
    with path.open("r+b") as file:
        header = _read_header(path, file)
        place = _checksum_place(path, header)
        digest = hashlib.sha256(header[:place])
        digest.update(header[place + 64 :])
        while block := file.read(_BLOCK):
            digest.update(block)
        file.seek(place)
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


def _checksum_place(path: Path, header: bytes) -> int:
    # Quotes within a header's text have a backslash: this is found nowhere but where it belongs.
    found = _CHECKSUM.search(header, 8)
    if found is None:
        raise damaged_header(path)
    return found.start()
