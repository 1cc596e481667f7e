"""Files and folders to read, as plain files of text: unpacked, taken out of PDF, or refused."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_TEXT_SUFFIXES = (".txt", ".md", ".text")
_PACKERS = {
    rb"\x1f\x8b\x08": (".gz", gzip.open),
    rb"BZh[1-9]1AY&SY": (".bz2", bz2.open),
    rb"\xfd7zXZ\x00": (".xz", lzma.open),
}
# The files that are read in a folder; named alone, a file may have any name.
SUFFIXES = (
    *_TEXT_SUFFIXES,
    ".pdf",
    *(text + suffix for text in _TEXT_SUFFIXES for suffix, _ in _PACKERS.values()),
)
# How files begin that hold no plain text, and what they are.
_REFUSED = {
    b"PK\x03\x04": "a ZIP archive, such as docx, odt and epub",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"{\\rtf": "a document in rich text format",
    b"%!PS": "a PostScript document",
    b"\x89PNG\r\n": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"RIFF": "a picture or a recording",
    b"ID3": "a recording",
    b"OggS": "a recording",
    b"fLaC": "a recording",
    b"\x7fELF": "a program",
    b"PAR1": "a Parquet table",
    b"SQLite format 3\x00": "a database",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """name: the file that was found. text: the plain file to read. num_bytes: its size."""

    name: str
    text: Path
    num_bytes: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text when this is first asked for."""
        with self.text.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_sources(paths: Sequence[Path], scratch: Path) -> list[Source]:
    """The files given, and those below the folders given, in order.

    Args:
        paths: files of any name, and folders, in which files with the endings in `SUFFIXES` are read.
        scratch: a folder in which unpacked text and the text of PDF files are put.

    Raises:
        ValueError: for a file that is missing, empty or cannot be read, or a folder with no text in it.
    """
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = files_below(path)
        if not inside:
            raise ValueError(f"{str(path)!r} has no {', '.join(SUFFIXES)} file: name files instead")
        filled = [file for file in inside if _size(file)]
        if not filled:
            raise ValueError(f"{str(path)!r} holds no text: all its files are empty; leave it out")
        found += filled
    return [_source(path, scratch / str(number)) for number, path in enumerate(found)]


def read_text(path: Path) -> bytes:
    """The text of a file of any name, unpacked or taken out of PDF; empty for an empty file.

    Raises:
        ValueError: if the file cannot be read or holds no text.
    """
    if not _size(path):
        return b""
    with tempfile.TemporaryDirectory(prefix="titans-") as scratch:
        text = _plain(path, path, Path(scratch) / "text")
        try:
            return text.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from None


def files_below(folder: Path) -> list[Path]:
    """Files that end in one of `SUFFIXES`, in a folder and its folders, in a fixed order; no hidden ones.

    Raises:
        ValueError: if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(str(error.filename)), error) from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _source(path: Path, scratch: Path) -> Source:
    if not _size(path):
        raise ValueError(f"{str(path)!r} is empty: leave it out")
    text = _plain(path, path, scratch)
    return Source(str(path), text, _size(text))


def _size(path: Path) -> int:
    try:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not a file: name files or folders to read")
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


def _plain(path: Path, name: Path, scratch: Path) -> Path:
    """The file itself, or one in place of `scratch` that holds its text; `name` is its name in errors."""
    try:
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise _unreadable(name, error) from None
    if begin.startswith(b"%PDF-") or path.suffix.lower() == ".pdf":
        _extract(path, name, scratch)
        return scratch
    for pattern, (suffix, unpack) in _PACKERS.items():
        if re.match(pattern, begin):
            unpacked = scratch.with_name(f"{scratch.name}-{suffix[1:]}")
            try:
                with unpack(path, "rb") as packed, unpacked.open("wb") as text:
                    shutil.copyfileobj(packed, text, _BLOCK)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{str(name)!r} is compressed and could not be unpacked ({error})") from None
            if not _size(unpacked):
                raise ValueError(f"{str(name)!r} is empty: leave it out")
            return _plain(unpacked, name, scratch)
    if kind := _refused_kind(begin):
        raise ValueError(f"{str(name)!r} is {kind}, not plain text: save its text as UTF-8 and read that")
    return path


def _refused_kind(begin: bytes) -> str | None:
    if begin[257:262] == b"ustar":
        return "a tar archive"
    if begin[4:8] == b"ftyp":
        return "a recording"
    # The length of a header of JSON, which is never beyond 100 MB.
    if begin[8:10] == b'{"' and begin[4:8] == bytes(4):
        return "a file of tensors, such as a memory"
    return next((kind for magic, kind in _REFUSED.items() if begin.startswith(magic)), None)


def _extract(path: Path, name: Path, output: Path) -> None:
    """The text of a PDF, a page at a time."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise ValueError(
            f"{str(name)!r} is a PDF, and the package pypdf is missing: pip install 'titans-ltm[train]'"
        ) from None
    try:
        with output.open("w", encoding="utf-8", errors="replace") as text:
            written = 0
            for page in PdfReader(path).pages:
                shown = page.extract_text().strip()
                text.write(shown + "\n\n")
                written += len(shown)
    except Exception as error:  # the library raises what its parsers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{str(name)!r} is a PDF that could not be read ({reason})") from error
    if not written:
        raise ValueError(f"{str(name)!r} is a PDF without text, of pictures perhaps: leave it out")


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{str(path)!r} could not be read ({error.strerror}): change its rights or leave it out"
    )
