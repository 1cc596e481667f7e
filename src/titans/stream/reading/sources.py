"""What a reader is given, files and folders and PDF, as files of text of known size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".text")
PDF = ".pdf"


@dataclass(frozen=True)
class Source:
    """name: the file as it was found. text: the file to read, which of a PDF holds its text. num_bytes: its
    size."""

    name: str
    text: Path
    num_bytes: int


def find_sources(paths: Sequence[Path], scratch: Path) -> list[Source]:
    """The files given, and those below the folders given, in order.

    Args:
        paths: files of any kind, and folders, in which .txt, .md, .text and .pdf files are read.
        scratch: a folder in which the text of PDF files is put.

    Raises:
        ValueError: for a file that is missing, empty or cannot be read, a folder with no such file, or a PDF
            without text.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = files_below(path, (*TEXT_SUFFIXES, PDF))
            if not inside:
                raise ValueError(
                    f"files: {str(path)!r} has no {', '.join((*TEXT_SUFFIXES, PDF))} file: name files instead"
                )
            found += [file for file in inside if file.stat().st_size]
        else:
            found.append(path)
    return [_source(path, scratch / f"{number}.txt") for number, path in enumerate(found)]


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with such names in a folder and its folders, in a fixed order, hidden ones left out.

    Raises:
        ValueError: if a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} could not be read ({error.strerror})") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _source(path: Path, extracted: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"files: {str(path)!r} is not a file: name files or folders to read")
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"files: {str(path)!r} could not be read ({error.strerror})") from None
    if not size:
        raise ValueError(f"files: {str(path)!r} is empty: leave it out")
    if path.suffix.lower() != PDF:
        return Source(str(path), path, size)
    _extract(path, extracted)
    return Source(str(path), extracted, extracted.stat().st_size)


def _extract(path: Path, output: Path) -> None:
    """The text of a PDF, a page at a time."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise ValueError(
            f"files: {str(path)!r} is a PDF, and the package pypdf is missing: pip install pypdf"
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
        raise ValueError(f"files: {str(path)!r} is a PDF that could not be read ({reason})") from error
    if not written:
        raise ValueError(f"files: {str(path)!r} is a PDF without text, of pictures perhaps: leave it out")
