"""Reading that is cut off, by a kill, a full disk or Ctrl-C, and goes on; folders and PDF."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from titans.cli import main
from titans.data import byte_tokenizer, load_corpus
from titans.hf import TitansForCausalLM
from titans.hf.state_file import open_state_file
from titans.stream import Session

from ..checkpoints import save_byte_model
from ..pdf import a_pdf
from . import processes

TEXT = b"\n".join(document.data for document in load_corpus("excerpt"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = dict(variant="mag", chunk_size=16, sliding_window=16, initializer_range=0.2)
    return save_byte_model(tmp_path_factory.mktemp("checkpoint"), **sizes)


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with open_state_file(path) as file:
        return file.tensors(), file.about


def assert_same_memory(path: Path, expected: Path) -> None:
    (found, about), (wanted, about_wanted) = content(path), content(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {**about, "checksum": ""} == {**about_wanted, "checksum": ""}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the commands that run in processes of their own: with it sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "first.txt", folder / "second.txt"]
    for path, text in zip(paths, (TEXT[:40_001], TEXT[-50_003:] * 2), strict=True):
        path.write_bytes(text)
    return paths


@pytest.fixture(scope="module")
def uncut(
    model_folder: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The memory of both texts read without a break, and what the command prints about it."""
    path = tmp_path_factory.mktemp("uncut") / "whole.memory"
    with redirect_stdout(io.StringIO()) as out:
        assert main(["memorize", str(model_folder), *map(str, texts), "-o", str(path), "--json"]) == 0
    return path, json.loads(out.getvalue())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_reading_goes_on_to_the_very_same_memory(
    model_folder: Path,
    texts: list[Path],
    uncut: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(code: int, *arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        assert main(["memorize", str(model_folder), *map(str, arguments)]) == code
        return capsys.readouterr()

    cut, (whole, wanted) = tmp_path / "cut.memory", uncut
    process = processes.start("memorize", model_folder, *texts, "-o", cut, "--save-every", 60_000)
    deadline = time.monotonic() + 100
    while not cut.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    assert processes.ended(process) == -signal.SIGKILL, "it had ended before it could be killed"
    model = TitansForCausalLM.from_pretrained(model_folder)
    held = Session.load(cut, model, byte_tokenizer()).num_tokens
    assert 60_000 <= held < 140_000

    assert "holds a reading that was cut off: go on with --resume" in run(2, *texts, "-o", cut)[1]
    assert "give the same files to go on" in run(1, texts[0], "-o", cut, "--resume")[1]
    text = texts[0].read_bytes()
    texts[0].write_bytes(text[::-1])
    assert f"{texts[0]} has changed since" in run(1, *texts, "-o", cut, "--resume")[1]
    texts[0].write_bytes(text)
    found = json.loads(run(0, *texts, "-o", cut, "--resume", "--json")[0])
    assert_same_memory(cut, whole)
    for name in ("tokens", "tokens_in_memory", "bytes", "mean_surprise", "peak", "files"):
        assert found[name] == wanted[name]
    assert "is complete: there is nothing to resume" in run(1, *texts, "-o", cut, "--resume")[1]


def test_an_interrupted_reading_goes_on_within_a_piece(
    model_folder: Path,
    texts: list[Path],
    uncut: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut, (whole, _) = tmp_path / "cut.memory", uncut
    read, calls = Session._read, []

    def interrupted(self: Session, piece: torch.Tensor) -> Any:
        calls.append(len(piece))
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_read", interrupted)
        assert main(["memorize", str(model_folder), *map(str, texts), "-o", str(cut)]) == 130
    assert json.loads(content(cut)[1]["reading"])["place"]["taken"] > 0
    assert main(["memorize", str(model_folder), *map(str, texts), "-o", str(cut), "--resume"]) == 0
    assert_same_memory(cut, whole)


def test_a_full_disk_leaves_the_last_good_memory(
    model_folder: Path, texts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = tmp_path / "book.memory"
    assert main(["memorize", str(model_folder), str(texts[0]), "-o", str(memory)]) == 0
    before = memory.read_bytes()
    capsys.readouterr()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        paths = ["--memory", str(memory), "-o", str(memory)]
        code = main(["memorize", str(model_folder), str(texts[1]), *paths, "--save-every", "40000"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert code == 1 and "Traceback" not in err, err
    assert "could not be written" in err and "make room" in err
    assert memory.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["book.memory"]


def test_a_folder_is_read_file_by_file_and_a_pdf_page_by_page(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "papers"
    (folder / "old").mkdir(parents=True)
    (folder / "b.pdf").write_bytes(a_pdf("We measured it twice.", "It was there."))
    (folder / "old" / "a.md").write_text("# A note\n")
    (folder / "picture.png").write_bytes(b"not read")
    (folder / "empty.txt").touch()
    memory = tmp_path / "memory"
    assert main(["memorize", str(model_folder), str(folder), "-o", str(memory), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary["files"]) == {str(folder / "b.pdf"), str(folder / "old" / "a.md")}
    model = TitansForCausalLM.from_pretrained(model_folder)
    expected = Session(model, byte_tokenizer())
    expected.feed("We measured it twice.\n\nIt was there.\n\n# A note\n")
    options = dict(max_new_tokens=8, do_sample=False)
    assert Session.load(memory, model, byte_tokenizer()).generate(**options) == expected.generate(**options)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.pdf": b"%PDF-1.4 and no more"}, "is a PDF that could not be read"),
        ({"a.pdf": a_pdf("")}, "is a PDF without text"),
        ({"a.png": b"x"}, "has no .txt, .md, .text, .pdf, .txt.gz"),
        ({"a.txt": b"", "b.md": b""}, "holds no text: all its files are empty"),
    ],
)
def test_what_cannot_be_read_is_named(
    files: dict[str, bytes],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "papers").mkdir()
    for name, data in files.items():
        (tmp_path / "papers" / name).write_bytes(data)
    arguments = ["memorize", str(model_folder), str(tmp_path / "papers"), "-o", str(tmp_path / "memory")]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "memory").exists()
