"""Where documents come from: files, folders, Hugging Face data sets and built-in books."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from titans.data.builtin import BUILTIN_CORPORA
from titans.data.documents import Document
from titans.data.hub import PREFIX, from_hub, from_saved_dataset, is_saved_dataset
from titans.stream.reading.sources import SUFFIXES, files_below, read_text


def list_corpora() -> dict[str, str]:
    """Names of the built-in corpora and one line about each."""
    return {name: corpus.description for name, corpus in BUILTIN_CORPORA.items()}


def is_corpus(source: str) -> bool:
    """Whether `load_corpus` knows where to look: no document is read, and nothing fetched."""
    known = source.partition("/")[0] in BUILTIN_CORPORA or source.startswith(PREFIX)
    return known or Path(source).exists()


def text_files(source: str | Path) -> dict[str, Path]:
    """Documents' names and the files that hold them, in the order of `load_corpus`; none where the corpus is
    no file and no folder of them."""
    path = Path(source)
    if (isinstance(source, str) and source in BUILTIN_CORPORA) or is_saved_dataset(path):
        return {}
    if path.is_file():
        return {path.name: path}
    return {file.relative_to(path).as_posix(): file for file in files_below(path)} if path.is_dir() else {}


def load_corpus(source: str | Path) -> list[Document]:
    """All documents of a corpus, in a fixed order, none of them empty.

    `source` is one of
    - the name of a built-in corpus: see `list_corpora`;
    - such a name and a pattern (`fnmatch`) of its documents' names: `shakespeare/king-lear`, `austen/[!n]*`;
    - `hf:NAME[:config[:split[:column]]]`, a Hugging Face data set, one document per row (unless named, split
      `train` and column `text`, or the only column of strings);
    - a folder written by `datasets.save_to_disk`, likewise;
    - any other folder: every file of text below it, hidden and empty ones left out;
    - a file of any name, which is one document. Compressed files are unpacked, text is taken out of PDF, and
      formats that hold no plain text are refused.

    Raises ValueError when there is no such source or nothing in it, ConnectionError when a download fails.
    """
    name, _, pattern = str(source).partition("/")
    exists = Path(source).exists()
    if isinstance(source, str) and source in BUILTIN_CORPORA and exists:
        raise ValueError(
            f"corpus={source!r} is a built-in name, and there is such a file or folder: write ./{source} for "
            f"it, or {source}/* for the built-in documents"
        )
    if isinstance(source, str) and name in BUILTIN_CORPORA and not exists:
        try:
            return _matching(BUILTIN_CORPORA[name].load(), source, pattern)
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}, or use the corpus 'excerpt' or files of your own, which need none"
            ) from None
    if isinstance(source, str) and source.startswith(PREFIX):
        documents = from_hub(source)
    else:
        path = Path(source)
        if not path.exists():
            raise ValueError(
                f"corpus={str(source)!r} is neither a file nor a folder nor a built-in name "
                f"({', '.join(BUILTIN_CORPORA)}); a Hugging Face data set is written hf:NAME"
            )
        elif is_saved_dataset(path):
            documents = from_saved_dataset(path)
        else:
            documents = [Document(name, read_text(file)) for name, file in text_files(source).items()]
    documents = [document for document in documents if document.data]
    if not documents:
        raise ValueError(
            f"corpus={str(source)!r} holds no text: a file must not be empty, and in a folder only "
            f"{', '.join(SUFFIXES)} files are read"
        )
    return documents


def _matching(documents: list[Document], source: str, pattern: str) -> list[Document]:
    found = [document for document in documents if fnmatchcase(document.name, pattern or "*")]
    if not found:
        known = ", ".join(document.name for document in documents[:20])
        raise ValueError(f"corpus={source!r}: no document has such a name; there are {known}, …")
    return found
