"""State files: tensors and a header of text in one safetensors file, with a checksum over every byte of it.

Written to a temporary name, flushed and renamed, so that what was there before stays until all is written.
Nothing that is read is executed, and no tensor is read before names, shapes and types are known to be right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from titans import __version__
from titans.state_header import (
    FORMAT,
    StateHeader,
    checksum_place,
    damaged,
    damaged_content,
    damaged_header,
    open_header,
    seal,
)

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
}  # fmt: skip

__all__ = ["Kind", "StateFile", "damaged_header", "open_state_file", "seal", "write_state_file"]


@dataclass(frozen=True)
class Kind:
    """What a tensor is before it is read. dtype: a name where no state has such values."""

    dtype: torch.dtype | str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateFile:
    """An open file. about: its header. kinds: of all tensors, by name."""

    header: StateHeader
    kinds: dict[str, Kind]

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def about(self) -> dict[str, str]:
        return self.header.about

    def tensors(self) -> dict[str, Tensor]:
        """Read them all; those that were equal share their storage.

        Raises:
            ValueError: if any byte of the file was altered.
        """
        header = self.header
        header.file.seek(0)
        content = header.file.read()
        place = checksum_place(self.path, header.raw)
        digest = hashlib.sha256(content[:place])
        digest.update(memoryview(content)[place + 64 :])
        written = content[place : place + 64].decode("ascii", "replace")
        if written != digest.hexdigest() or not content.startswith(header.raw):
            raise damaged_content(self.path)
        try:
            stored = load(content)
        except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise damaged(self.path, error) from None
        return stored | {name: stored[of] for name, of in header.same.items()}


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
    with open_header(path) as header:
        kinds = {
            name: Kind(_DTYPES.get(entry.dtype, entry.dtype), entry.shape)
            for name, entry in header.entries.items()
        }
        yield StateFile(header, kinds)
