"""Uploaded files as plain text, within limits."""

from __future__ import annotations

import asyncio
import codecs
import sys
from pathlib import Path

from titans.serve.errors import ApiError

_SECONDS, _TEXT_BYTES = 60, 256 << 20
_BLOCK = 1 << 20
_PROGRAM = Path(__file__).with_name("extract.py")
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


async def text_of(path: Path, name: str, media_type: str, parsers: asyncio.Semaphore) -> Path:
    """A file of UTF-8 text with what an uploaded file says; the file itself where it is text.

    Args:
        name: what it was called, for its ending alone. media_type: as the client gave it.
        parsers: of PDF and HTML, of which so many at a time are parsed.

    Raises:
        ApiError: 400 for a file without text, or one that cannot be read within the limits.
    """
    kind = await asyncio.to_thread(_checked, path, name, media_type)
    if kind == "text":
        return path
    async with parsers:
        return await _extracted(path, kind)


def _checked(path: Path, name: str, media_type: str) -> str:
    """Whether a file is "text", in UTF-8, or a "pdf" or "html"; errors as of `text_of`."""
    with path.open("rb") as file:
        begin = file.read(512)
    if not begin:
        raise ApiError(400, f"the file is empty: {_NO_TEXT}", param="file", code="no_text")
    ending = Path(name).suffix.lower()
    if begin.startswith(b"%PDF-"):
        return "pdf"
    if kind := next((kind for magic, kind in _REFUSED.items() if begin.startswith(magic)), None):
        raise ApiError(400, f"the file is {kind}: {_NO_TEXT}", param="file", code="no_text")
    if b"\0" in begin:
        raise ApiError(400, f"the file holds no text: {_NO_TEXT}", param="file", code="no_text")
    if ending in (".html", ".htm", ".xhtml") or "html" in media_type:
        return "html"
    _check_utf8(path)
    return "text"


async def _extracted(path: Path, kind: str) -> Path:
    """The text of a file, from a process that ends when nobody waits for it any more."""
    target = path.with_name(f"{path.name}.text")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(_PROGRAM), kind, str(path), str(target), str(_SECONDS), str(_TEXT_BYTES),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(3 * _SECONDS):
            said = (await process.communicate())[1]
        lines = said.decode(errors="replace").strip().splitlines()
        reason = "" if not process.returncode else (lines or ["it takes too long"])[-1]
    except TimeoutError:
        reason = "it takes too long"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if reason:
        raise ApiError(
            400, f"the {kind.upper()} could not be read: {reason[:300]}", param="file", code="no_text"
        )
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
