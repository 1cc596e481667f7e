"""One reader of files for every command: what it reads, however packed, and what it refuses by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from titans.data import load_corpus
from titans.stream.reading.sources import find_sources, read_text

TEXT = "Full fathom five thy father lies — é\n".encode() * 40


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_compressed_files_are_read_whatever_their_names(tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    packed = {
        "a.txt": TEXT,
        "b.txt.gz": gzip.compress(TEXT),
        "c.md.bz2": bz2.compress(TEXT),
        "d.text.xz": lzma.compress(TEXT),
        "e.txt": gzip.compress(lzma.compress(TEXT)),
    }
    for name, content in packed.items():
        (folder / name).write_bytes(content)
    sources = find_sources([folder], scratch)
    assert [Path(source.name).name for source in sources] == [*packed]
    assert all(source.text.read_bytes() == TEXT and source.num_bytes == len(TEXT) for source in sources)
    assert len({source.digest for source in sources}) == 1
    documents = load_corpus(folder)
    assert [document.name for document in documents] == [*packed]
    assert all(document.data == TEXT for document in documents)


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.txt", TEXT)
    else:
        with tarfile.open(fileobj=file, mode=kind) as packed:
            packed.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive("zip"), "is a ZIP archive, such as docx"),
        (archive("w"), "is a tar archive"),
        (archive("w:gz"), "is a tar archive"),
        (gzip.compress(b"\x89PNG\r\n\x1a\n"), "is a picture, not plain text"),
        ("To be".encode("utf-16"), "is text in UTF-16, not plain text: save its text as UTF-8"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__":{}}', "is a file of tensors, such as a memory"),
        (gzip.compress(TEXT)[:-20], "is compressed and could not be unpacked"),
        (lzma.compress(TEXT)[:60], "is compressed and could not be unpacked"),
        (b"%PDF-1.7 and no more", "is a PDF that could not be read"),
        (gzip.compress(b""), "is empty"),
    ],
    # Compressed bytes hold the time; a test's name must not.
    ids=["zip", "tar", "tar.gz", "png.gz", "utf-16", "tensors", "cut gzip", "cut xz", "pdf", "empty gzip"],
)
def test_what_holds_no_plain_text_is_refused(
    content: bytes, message: str, tmp_path: Path, scratch: Path
) -> None:
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    for read in (lambda: find_sources([file], scratch), lambda: load_corpus(file)):
        with pytest.raises(ValueError, match=rf"file\.txt' {message}"):
            read()


def test_bytes_of_no_known_format_are_read(tmp_path: Path) -> None:
    for content in (b"\xff\x00caf\xe9", b"BZhou", b"\x1f\x8b", b"{not rtf"):
        (tmp_path / "file").write_bytes(content)
        assert read_text(tmp_path / "file") == content
