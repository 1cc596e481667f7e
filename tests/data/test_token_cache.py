from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from titans.data import encode_document, load_corpus
from titans.data import token_cache as cache
from titans.data.token_cache import TokenisedDocument, tokenised_corpus


class Words:
    """A tokenizer of two lines: ids of words, by length."""

    def __init__(self, size: int = 300) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {"a": self.size}

    def encode(self, text: str, **options: object) -> list[int]:
        self.read += 1
        return [self.size - len(word) for word in text.split()]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name, text in {
        "b.txt": "one three",
        "a.txt": "é to be",
        "deep/c.txt": "x " * 50,
        "empty.txt": "",
    }.items():
        (folder / name).write_text(text)
    return folder


def same(found: list[TokenisedDocument], corpus: Path, tokenizer: Words) -> bool:
    expected = [
        (d.name, len(d.data), encode_document(tokenizer, d.data, d.name).tolist())  # type: ignore[arg-type]
        for d in load_corpus(corpus)
    ]
    return [(d.name, d.num_bytes, d.tokens.tolist()) for d in found] == expected


def test_a_corpus_is_tokenised_once_and_again_when_it_or_the_tokenizer_changes(corpus: Path) -> None:
    words, seen = Words(), []
    read = lambda tokenizer: tokenised_corpus(str(corpus), tokenizer, lambda *done: seen.append(done))  # noqa: E731
    assert same(read(words), corpus, words) and words.read == 6
    assert [done[2] for done in seen] == [3, 5, 55] and seen[-1][0] == seen[-1][1]
    again = read(words)
    assert words.read == 6 and len(seen) == 3 and again[0].tokens.dtype == np.uint16
    more = Words(1 << 17)
    assert read(more)[0].tokens.dtype == np.uint32 and same(read(more), corpus, more)
    (corpus / "b.txt").write_text("one three!")
    assert same(read(words), corpus, words) and len(seen) == 9
    # The stale one was replaced: one file for each tokenizer, and nothing half written.
    assert len(list((corpus.parent / "cache" / "titans" / "tokens").glob("*.tokens"))) == 2
    assert not list((corpus.parent / "cache" / "titans" / "tokens").glob(".*tokens.*"))
    assert same(tokenised_corpus(str(corpus / "b.txt"), words), corpus / "b.txt", words)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [3, 40, -3])
def test_a_damaged_cache_is_named(corpus: Path, place: int) -> None:
    tokenised_corpus(str(corpus), Words())  # type: ignore[arg-type]
    (file,) = (corpus.parent / "cache" / "titans" / "tokens").glob("*.tokens")
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    for bad in (bytes(content), file.read_bytes()[:-1], b""):
        file.write_bytes(bad)
        with pytest.raises(
            ValueError, match=r"token cache .* is damaged \(.*\): delete it, and it is made anew"
        ):
            tokenised_corpus(str(corpus), Words())  # type: ignore[arg-type]


def test_what_cannot_be_made_leaves_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(opened: object, index: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_finish", full)
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\): make room"):
            tokenised_corpus(str(corpus), Words())  # type: ignore[arg-type]
    assert [path.suffix for path in (corpus.parent / "cache" / "titans" / "tokens").iterdir()] == [".lock"]
    (corpus / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt is not valid UTF-8"):
        tokenised_corpus(str(corpus), Words())  # type: ignore[arg-type]
    for path in corpus.rglob("*.txt"):
        path.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        tokenised_corpus(str(corpus), Words())  # type: ignore[arg-type]


def test_two_at_once_make_it_once(corpus: Path) -> None:
    words, found = Words(), []
    threads = [
        threading.Thread(target=lambda: found.append(tokenised_corpus(str(corpus), words))) for _ in "ab"
    ]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and words.read == 3 and os.listdir(corpus)
