"""A file of any size as token ids, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from titans.stream.tokenizer import BYTES, encode_document, is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_BYTES = 1 << 16


@dataclass(frozen=True)
class Piece:
    """ids: token ids (n,). offset, num_bytes: where in its file, in bytes."""

    ids: np.ndarray
    offset: int
    num_bytes: int


def read_pieces(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    piece_bytes: int = PIECE_BYTES,
    *,
    begin: int = 0,
    name: str | None = None,
) -> Iterator[Piece]:
    """Encode a file at constant memory.

    A tokenizer of text sees pieces that end with a line where there is one, so that no word is cut.

    Args:
        begin: where in the file, in bytes; at the end of a piece the others are the same.
        name: what the file is called in errors.

    Raises:
        ValueError: for an empty file, or one that is not UTF-8 where it must be; names file and offset.
        OSError: if it cannot be read.
    """
    as_bytes, offset, rest, name = is_byte_tokenizer(tokenizer), begin, b"", name or str(path)
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(max(piece_bytes - len(rest), 1)):
            block = rest + block
            cut = len(block) if as_bytes else _end_of_text(block)
            block, rest = block[:cut], block[cut:]
            if block:
                yield _encode(name, tokenizer, block, offset)
            offset += len(block)
    if rest:
        yield _encode(name, tokenizer, rest, offset)
    elif not offset:
        raise ValueError(f"{name} is empty: leave it out")


def _encode(name: str, tokenizer: PreTrainedTokenizerBase, block: bytes, offset: int) -> Piece:
    if not is_byte_tokenizer(tokenizer):
        try:
            block.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"byte 0x{block[error.start]:02x} at offset {offset + error.start}"
            raise ValueError(
                f"{name} is not valid UTF-8: {place}; "
                f"convert it to UTF-8 or use a model with the {BYTES!r} tokenizer, which reads any file"
            ) from None
    return Piece(encode_document(tokenizer, block, name), offset, len(block))


def _end_of_text(block: bytes) -> int:
    """Where to cut: after the last line, else before the last word, else before the last character."""
    if line := block.rfind(b"\n") + 1:
        return line
    if (blank := block.rfind(b" ")) > 0:
        return blank
    cut = len(block) - 1
    while cut > max(len(block) - 4, 0) and block[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
