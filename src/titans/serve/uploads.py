"""Uploaded files as plain text, within limits."""

from __future__ import annotations

import codecs
import subprocess
import sys
from pathlib import Path

from titans.serve.errors import ApiError

_SECONDS, _TEXT_BYTES = 60, 256 << 20
_BLOCK = 1 << 20
# Beginnings of files that are no text, and what they are.
_REFUSED = {
    b"PK\x03\x04": "a ZIP archive, such as docx, odt and epub",
    b"\x1f\x8b": "compressed",
    b"BZh": "compressed",
    b"\xfd7zXZ": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"{\\rtf": "a document in rich text format",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
_NO_TEXT = "upload txt, md, html or pdf"


def text_of(path: Path, name: str, media_type: str) -> Path:
    """A file of UTF-8 text with what an uploaded file says; the file itself where it is text.

    Args:
        name: what it was called, for its ending alone. media_type: as the client gave it.

    Raises:
        ApiError: 400 for a file without text, or one that cannot be read within the limits.
    """
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        raise ApiError(400, f"the file is empty: {_NO_TEXT}", param="file", code="no_text")
    ending = Path(name).suffix.lower()
    if begin.startswith(b"%PDF-"):
        return _extracted(path, "pdf")
    if kind := next((kind for magic, kind in _REFUSED.items() if begin.startswith(magic)), None):
        raise ApiError(400, f"the file is {kind}: {_NO_TEXT}", param="file", code="no_text")
    if b"\0" in begin:
        raise ApiError(400, f"the file holds no text: {_NO_TEXT}", param="file", code="no_text")
    if ending in (".html", ".htm", ".xhtml") or "html" in media_type:
        return _extracted(path, "html")
    _check_utf8(path)
    return path


def _extracted(path: Path, kind: str) -> Path:
    target = path.with_name(f"{path.name}.text")
    program = [
        sys.executable,
        "-I",
        str(Path(__file__).with_name("extract.py")),
        kind,
        str(path),
        str(target),
    ]
    try:
        done = subprocess.run(
            [*program, str(_SECONDS), str(_TEXT_BYTES)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=3 * _SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        reason = "it takes too long"
    else:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        reason = "" if not done.returncode else (lines or ["it takes too long"])[-1]
    if reason:
        raise ApiError(
            400, f"the {kind.upper()} could not be read: {reason[:300]}", param="file", code="no_text"
        )
    with target.open("rb") as text:
        empty = not any(line.strip() for line in text)
    if empty:
        raise ApiError(400, f"the {kind.upper()} holds no text", param="file", code="no_text")
    return target


def _check_utf8(path: Path) -> None:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = max(offset + error.start, 0)
                raise ApiError(
                    400,
                    f"the file is not valid UTF-8 near byte {place:,}: {_NO_TEXT}",
                    param="file",
                    code="no_text",
                ) from None
            if not block:
                return
            offset += len(block)
