"""The places a command will write to, checked before its work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from titans.cli.errors import UsageError
from titans.train.settings import SETTINGS_FILE

_RUN_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl")


def is_page(path: Path) -> bool:
    """Whether a file is an HTML page, as `titans inspect` writes."""
    return _beginning(path).lstrip().lower().startswith(b"<!doctype html")


def is_picture(path: Path) -> bool:
    """Whether a file is a picture in a format that plots are drawn in."""
    begin = _beginning(path)
    return begin.startswith((b"\x89PNG", b"%PDF", b"\xff\xd8\xff")) or b"<svg" in begin


def is_memory(path: Path) -> bool:
    """Whether a file is a memory, as `titans memorize` writes."""
    from titans.hf.state_file import open_state_file

    try:
        with open_state_file(path):
            return True
    except (OSError, ValueError):
        return False


def check_output(
    option: str, path: Path | None, is_own: Callable[[Path], bool], inputs: Iterable[Path] = ()
) -> None:
    """Find out before the work whether its result can be written, and what it would replace.

    Args:
        option: the command's option, for errors. path: its value.
        is_own: whether a file of that name that exists is an earlier result, which may be replaced.
        inputs: what the command reads.

    Raises:
        UsageError: for a path that cannot be written, or that would replace an input, a device, a link or
            another kind of file.
    """
    if path is None:
        return
    try:
        _check_place(option, path)
        exists = path.exists()
        # What is written gets a longer name at first.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part"):
            pass
    except OSError as error:
        raise UsageError(
            f"{option}={str(path)!r} cannot be written ({error.strerror}): give another place or name"
        ) from None
    if not exists:
        return
    if any(source.exists() and path.samefile(source) for source in inputs):
        raise UsageError(f"{option}={str(path)!r} is read, too, and would be replaced: give another name")
    if path.stat().st_size and not is_own(path):
        raise UsageError(
            f"{option}={str(path)!r} holds something else, which would be replaced: give another name, or "
            "remove that file first"
        )


def _check_place(option: str, path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{option}={str(path)!r} is a link: name the file {str(path.resolve())!r}")
    if path.is_dir():
        raise UsageError(f"{option}={str(path)!r} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option}={str(path)!r}: there is no folder {str(path.parent)!r}; create it first")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option}={str(path)!r} is a device or a pipe: give the name of a file")


def check_page_and_picture(option: str, page: Path, picture: Path, inputs: Iterable[Path]) -> None:
    """The same for a page and the picture next to it.

    Raises:
        UsageError: where both have one name, too, or the picture would replace one that belongs to no page.
    """
    if page.suffix.lower() == picture.suffix:
        raise UsageError(
            f"{option}={str(page)!r} is the name of the picture next to the page: give one such as "
            f"{page.stem}.html"
        )
    inputs = list(inputs)
    check_output(option, page, is_page, inputs)
    check_output(option, picture, lambda _: page.exists() and is_picture(picture), inputs)


def check_picture(option: str, path: Path | None, inputs: Iterable[Path] = ()) -> None:
    """`check_output` for a picture, whose name decides its format.

    Raises:
        UsageError: for a name that ends in no known format, too.
    """
    known = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
    if path is not None and path.suffix.lower() not in known:
        raise UsageError(f"{option}={str(path)!r} is no picture: give a name that ends in {', '.join(known)}")
    check_output(option, path, is_picture, inputs)


def check_run_folder(option: str, folder: Path, mark: str = SETTINGS_FILE) -> None:
    """Find out whether a training run can be written into a folder without replacing another model's files.

    Args:
        mark: a file that the folder of an earlier run has.

    Raises:
        UsageError: if it cannot be written, or holds a model that such a run did not write.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{option}={str(folder)!r} is a file: give a folder")
        parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{option}={str(folder)!r} cannot be written ({error.strerror}): give another folder"
        ) from None
    foreign = [name for name in _RUN_FILES if (folder / name).exists()]
    if foreign and not (folder / mark).exists():
        raise UsageError(
            f"{option}={str(folder)!r} holds a {foreign[0]} of something else, which would be replaced: give "
            "another folder"
        )


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1000)
