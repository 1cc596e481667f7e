"""Data sets of Hugging Face as documents, one of each row: loaded as a whole, or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from titans.data.documents import Document

PREFIX = "hf:"
"""How the name of such a data set begins."""


class HubStream:
    """A data set that is read while it arrives; nothing is kept.

    Args:
        source: hf:NAME[:config[:split[:column]]], as `titans.data.load_corpus` takes it.

    num_shards: its files, or what else its author has divided it into.

    Raises:
        ValueError: where there is no such data set, split or column.
        ConnectionError: when it cannot be reached.
    """

    def __init__(self, source: str) -> None:
        self.name = source
        repository, config, split, column = _parts(source)
        library = _datasets()
        try:
            table = library.load_dataset(repository, config or None, split=split, streaming=True)
            # Without a description of its columns the first row has to show them.
            shown = {} if table.features else next(iter(table), {})
        except Exception as error:  # the library raises what its own dependencies raise
            _refuse(source, error)
        strings = [name for name, value in shown.items() if isinstance(value, str)]
        self._column = _chosen(_strings(table) if table.features else strings, column, source)
        self._table = table.select_columns([self._column])
        self._label = f"{repository}/{split}"
        self.num_shards = int(table.num_shards)

    def documents(self, shard: int, seed: tuple[int, ...]) -> Iterator[Document]:
        """The rows of a shard in their order, whatever the seed.

        Raises:
            ConnectionError, ValueError: when they cannot be read on.
        """
        try:
            for number, row in enumerate(self._table.shard(num_shards=self.num_shards, index=shard)):
                text = row[self._column]
                yield Document(f"{self._label}/{shard:05d}/{number:08d}", (text or "").encode())
        except Exception as error:  # as above
            _refuse(self.name, error, ": resume from the last checkpoint")


def from_hub(source: str) -> list[Document]:
    """All rows of a data set.

    Raises:
        ValueError: where there is no such data set, split or column.
        ConnectionError: when it cannot be downloaded.
    """
    repository, config, split, column = _parts(source)
    library = _datasets()
    try:
        table = library.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the library raises what its own dependencies raise
        _refuse(source, error)
    return list(_rows(table, column, label=f"{repository}/{split}", source=source))


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def from_saved_dataset(path: Path) -> list[Document]:
    """All rows of a data set that `datasets.save_to_disk` wrote.

    Raises:
        ValueError: where it cannot be read, or has no split named train.
    """
    library = _datasets()
    try:
        table = library.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(
            f"corpus={str(path)!r} is not a data set that can be loaded: {_reason(error)}"
        ) from error
    if isinstance(table, dict):
        if "train" not in table:
            splits = ", ".join(f"{path / split}" for split in table)
            raise ValueError(
                f"corpus={str(path)!r} has no split named train; give one of its folders: {splits}"
            )
        table = table["train"]
    return list(_rows(table, "", label=path.name, source=str(path)))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "reading a Hugging Face data set needs the package datasets: pip install 'titans-ltm[train]'"
        ) from error
    return datasets


def _parts(source: str) -> tuple[str, str, str, str]:
    """(name, config, split, column); config and column are empty where they are not given."""
    parts = source.removeprefix(PREFIX).split(":")
    if not parts[0] or len(parts) > 4:
        raise ValueError(f"corpus={source!r} is not of the form hf:NAME[:config[:split[:column]]]")
    name, config, split, column = (*parts, *[""] * (4 - len(parts)))
    return name, config, split or "train", column


def _refuse(source: str, error: Exception, remedy: str = "") -> NoReturn:
    reason = _reason(error)
    kind = ConnectionError if isinstance(error, ConnectionError) or "reach" in reason else ValueError
    raise kind(f"corpus={source!r} could not be loaded: {reason}{remedy}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _rows(table: Any, column: str, *, label: str, source: str) -> Iterator[Document]:
    for number, text in enumerate(table[_chosen(_strings(table), column, source)]):
        yield Document(f"{label}/{number:08d}", (text or "").encode())


def _strings(table: Any) -> list[str]:
    """Names of the columns that hold strings."""
    kinds = ("string", "large_string")
    return [name for name, kind in table.features.items() if getattr(kind, "dtype", "") in kinds]


def _chosen(strings: list[str], column: str, source: str) -> str:
    """The column to read, of those that hold strings."""
    chosen = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else "")
    if chosen not in strings:
        asked = f"no column of strings named {column!r}" if column else "no column named 'text'"
        raise ValueError(
            f"corpus={source!r} has {asked}; its columns of strings are: {', '.join(strings) or 'none'}; "
            "choose one with hf:NAME:config:split:COLUMN, or rename it to 'text'"
        )
    return chosen
