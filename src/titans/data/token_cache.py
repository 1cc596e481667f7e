"""A corpus tokenised once and kept on disk, from where it is mapped into memory.

One file for each corpus and tokenizer, in `$XDG_CACHE_HOME/titans/tokens`, else `~/.cache/titans/tokens`:

    head     magic bytes, where the index begins, its length and CRC-32
    tokens   all documents one after the other, uint16 or, for more than 65,536 ids, uint32; little-endian
    index    JSON: fingerprint of tokenizer and text, CRC-32 of the tokens, and of each document
             name, bytes and tokens

It is written under another name, and its head last. A file whose fingerprint differs is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from titans.data.archives import cache_folder
from titans.data.corpora import load_corpus, text_files
from titans.data.documents import Document
from titans.locks import alone
from titans.stream.reading.sources import read_text
from titans.stream.tokenizer import encode_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnTokenised = Callable[[int, int, int], None]
"""Called with bytes done, bytes of all, tokens so far."""
_MAGIC, _HEAD = b"TITANTOK", struct.Struct("<8sQQI")
_BLOCK = 1 << 26


@dataclass(frozen=True)
class TokenisedDocument:
    """`tokens`, shape (tokens,), of a document that had `num_bytes` bytes of text."""

    name: str
    num_bytes: int
    tokens: np.ndarray


def tokenised(document: Document, tokenizer: PreTrainedTokenizerBase) -> TokenisedDocument:
    """A document's tokens, without a cache."""
    tokens = encode_document(tokenizer, document.data, document.name)
    return TokenisedDocument(document.name, len(document.data), tokens)


def tokenised_corpus(
    source: str, tokenizer: PreTrainedTokenizerBase, on_tokenised: OnTokenised | None = None
) -> list[TokenisedDocument]:
    """The documents of `load_corpus(source)`, read from the cache, which is made where there is none.

    Processes that ask at the same time wait for the first one to make it. The text of a folder is read one
    file at a time; whether it has changed is seen from the names, sizes and times of its files.

    Raises:
        ValueError: as `load_corpus`; for text that is not UTF-8; for a damaged cache.
        OSError: if the cache cannot be written.
    """
    of_tokenizer = _of_tokenizer(tokenizer)
    place = str(Path(source).resolve()) if Path(source).exists() else source
    key = hashlib.sha256(f"{of_tokenizer} {place}".encode()).hexdigest()[:24]
    file = cache_folder() / "tokens" / f"{key}.tokens"
    files = text_files(source)
    documents = [] if files else load_corpus(source)
    fingerprint = f"{of_tokenizer} {_of_files(files) if files else _of_documents(documents)}"
    found = _read(file, fingerprint)
    if found is None:
        with ExitStack() as lock:
            with _writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                lock.enter_context(alone(file.with_suffix(".lock")))
            found = _read(file, fingerprint)
            if found is None:
                sizes = [path.stat().st_size for path in files.values()] or [len(d.data) for d in documents]
                total, texts = sum(sizes), _texts(files) if files else iter(documents)
                _make(file, fingerprint, texts, total, tokenizer, on_tokenised)
                found = _read(file, fingerprint)
    if not found:
        return [tokenised(document, tokenizer) for document in load_corpus(source)]  # says what is missing
    return found


def _texts(files: dict[str, Path]) -> Iterator[Document]:
    for name, path in files.items():
        if text := read_text(path):
            yield Document(name, text)


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = backend.to_str()
    else:
        described = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(described.encode()).hexdigest()


def _of_files(files: dict[str, Path]) -> str:
    stats = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _of_documents(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.name, len(document.data)]).encode() + document.data)
    return digest.hexdigest()


def _make(
    file: Path,
    fingerprint: str,
    documents: Iterator[Document],
    total: int,
    tokenizer: PreTrainedTokenizerBase,
    on_tokenised: OnTokenised | None,
) -> None:
    kind = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    entries: list[tuple[str, int, int]] = []
    checksum = done = count = 0
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as opened:
            with _writing(file):
                opened.write(bytes(_HEAD.size))
            for document in documents:
                tokens = encode_document(tokenizer, document.data, document.name).astype(kind).tobytes()
                with _writing(file):
                    opened.write(tokens)
                checksum = zlib.crc32(tokens, checksum)
                entries.append((document.name, len(document.data), len(tokens) // kind.itemsize))
                done, count = done + len(document.data), count + entries[-1][2]
                if on_tokenised is not None:
                    on_tokenised(min(done, total), total, count)
            with _writing(file):
                _finish(opened, {"fingerprint": fingerprint, "dtype": kind.str, "crc32": checksum,
                                 "documents": entries})  # fmt: skip
        with _writing(file):
            os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _finish(opened: BinaryIO, index: dict[str, Any]) -> None:
    text = json.dumps(index).encode()
    begin = opened.tell()
    opened.write(text)
    opened.seek(0)
    opened.write(_HEAD.pack(_MAGIC, begin, len(text), zlib.crc32(text)))
    opened.flush()
    os.fsync(opened.fileno())


def _read(file: Path, fingerprint: str) -> list[TokenisedDocument] | None:
    """What the cache holds, or None where there is none, or one of other text or another tokenizer."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD.size)
            magic, begin, size, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0)
            if magic != _MAGIC or file.stat().st_size != begin + size:
                raise _damaged(file, "it is cut off or of another kind")
            opened.seek(begin)
            text = opened.read(size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    if zlib.crc32(text) != checksum:
        raise _damaged(file, "its index has another checksum")
    index = json.loads(text)
    if index["fingerprint"] != fingerprint:
        return None
    kind = np.dtype(index["dtype"])
    count = (begin - _HEAD.size) // kind.itemsize
    if not count:
        return []
    tokens = np.asarray(np.memmap(file, dtype=kind, mode="r", offset=_HEAD.size, shape=(count,)))
    found = 0
    for start in range(0, count, _BLOCK):
        found = zlib.crc32(tokens[start : start + _BLOCK].data, found)
    if found != index["crc32"]:
        raise _damaged(file, "its tokens have another checksum")
    ends = np.cumsum([length for _, _, length in index["documents"]])
    return [
        TokenisedDocument(name, num_bytes, tokens[end - length : end])
        for (name, num_bytes, length), end in zip(index["documents"], ends.tolist(), strict=True)
    ]


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"token cache {file} is damaged ({reason}): delete it, and it is made anew")


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"token cache {file} could not be written ({error.strerror or error}): make room there, or set "
            "XDG_CACHE_HOME to a folder on another disk"
        ) from error
