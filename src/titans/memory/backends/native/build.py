"""Compiling C++ operators: once for each source, compiler, processor and torch, then found again."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from titans.locks import alone

SOURCES = Path(__file__).parent


def flags(processor: str = "native", capability: str | None = None) -> list[str]:
    """The compiler's flags: for this processor, or for a named one and torch's name of what it can do."""
    # Resolved: the flags are part of a library's name, and one torch behind several links is built for once.
    torch_folder = Path(torch.__file__).resolve().parent
    if capability is None:
        capability = torch.backends.cpu.get_cpu_capability()
    include = torch_folder / "include"
    return [
        "-std=c++20",
        "-O3",
        f"-march={processor}",
        *(["-mprefer-vector-width=512"] if capability == "AVX512" else []),
        *(
            [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            if capability in ("AVX2", "AVX512")
            else []
        ),
        "-fopenmp",
        "-fPIC",
        "-shared",
        f"-I{include}",
        f"-I{include / 'torch/csrc/api/include'}",
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]


def _processor() -> str:
    """What decides which instructions -march=native may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "titans"


@functools.cache
def missing(sources: Path = SOURCES) -> str | None:
    """Build and load the operators of a folder's C++; why that cannot be done, or None if they are."""
    compiler = os.environ.get("CXX") or "g++"
    found = shutil.which(compiler)
    if found is None:
        return f"it is compiled on first use and there is no {compiler} (Debian, Ubuntu: apt-get install g++)"
    try:
        library = _built(found, sources)
        torch.ops.load_library(library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        why = f"compiling it with {found} failed: {error}"
        print(f"titans: no operators of {sources.name}, torch takes their place; {why}", file=sys.stderr)
        return why
    return None


def _built(compiler: str, folder: Path) -> Path:
    """The compiled library of a folder, from the cache or built now."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    sources = sorted(folder.glob("*.h")) + sorted(folder.glob("*.cpp"))
    decisive = [
        version,
        torch.__version__,
        _processor(),
        *flags(),
        *(path.read_text("utf-8") for path in sources),
    ]
    name = hashlib.sha256("\0".join(decisive).encode("utf-8", "replace")).hexdigest()[:16]
    cache = _cache()
    if library := _kept(cache, f"{folder.name}-{name}"):
        return library
    cache.mkdir(parents=True, exist_ok=True)
    # Of several processes that need it, such as those of a training, one compiles and the others wait.
    with alone(cache / f"{folder.name}-{name}.lock"):
        return _kept(cache, f"{folder.name}-{name}") or _compiled(compiler, folder, cache, name)


def _kept(cache: Path, name: str) -> Path | None:
    """A compiled library of the cache, if it is whole."""
    # Its name ends in its content's digest: a truncated one would kill the process that loads it.
    for library in cache.glob(f"{name}-*.so"):
        if library.stem.endswith(_digest(library)):
            return library
        library.unlink(missing_ok=True)
    return None


def _compiled(compiler: str, folder: Path, cache: Path, name: str) -> Path:
    print(f"titans: compiling {folder.name} operators, once (about a minute)", file=sys.stderr)
    # Where processes cannot wait for each other, each has a name of its own, and the last one stands.
    handle, temporary = tempfile.mkstemp(dir=cache, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *map(str, sorted(folder.glob("*.cpp"))), "-o", temporary, *flags()]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else done.stderr[-500:])
        library = cache / f"{folder.name}-{name}-{_digest(Path(temporary))}.so"
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]
