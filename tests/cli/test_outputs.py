"""No command replaces what it did not write, and what cannot be written is found before the work."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from titans.cli import main
from titans.cli.errors import UsageError
from titans.cli.outputs import check_page_and_picture, check_picture, check_run_folder


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before a model is loaded."""

    def load(*_: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("titans.cli.models.ModelOptions.open_model", load)
    monkeypatch.setattr("titans.train.recipe.TrainingRun.__init__", load)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same.txt").write_text("A text.")
    (tmp_path / "same.html").write_text("<!doctype html><p>A text.")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of someone")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("A note.")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"mine": 1}')
    (tmp_path / "link").symlink_to("same.txt")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


LONG = "x" * 250


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("memorize M same.txt -o same.txt", "output='same.txt' is read, too, and would be replaced"),
        ("memorize M same.txt -o notes/../same.txt", "is read, too"),
        ("memorize M notes -o notes/a.txt", "output='notes/a.txt' holds something else"),
        ("memorize M same.txt -o other/config.json", "holds something else"),
        ("memorize M same.txt -o link", "output='link' is a link: name the file '"),
        ("memorize M same.txt -o dangling", "is a link"),
        ("memorize M same.txt -o pipe", "is a device or a pipe: give the name of a file"),
        ("memorize M same.txt -o /dev/null", "is a device or a pipe"),
        (f"memorize M same.txt -o {LONG}", r"cannot be written \(File name too long\)"),
        (f"memorize M same.txt -o {LONG * 2}/a", r"cannot be written \(File name too long\)"),
        ("memorize M same.txt -o notes", "is a folder: give the name of a file"),
        ("memorize M same.txt -o nowhere/a", "there is no folder 'nowhere'; create it first"),
        ("generate M --prompt a --save-memory same.txt", "save_memory='same.txt' holds something else"),
        ("inspect M same.txt -o same.txt", "is read, too"),
        ("inspect M same.html -o same.html", "is read, too"),
        (
            "inspect M same.txt -o a.png",
            "is the name of the picture next to the page: give one such as a.html",
        ),
        ("inspect M same.txt -o photo.html", "output='photo.png' holds something else"),
        ("eval needle M --haystack same.txt --plot same.txt", "plot='same.txt' is no picture"),
        ("eval needle M --plot pipe.png", "pipe.png' is a link"),
        ("train --data same.txt --output other", "output='other' holds a config.json of something else"),
        ("train --data same.txt --output same.txt", "output='same.txt' is a file: give a folder"),
        (f"train --data same.txt --output {LONG * 2}", "File name too long"),
    ],
)
def test_it_is_refused_before_the_work(
    arguments: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pipe.png").symlink_to("pipe")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(UsageError, match=r"plot='new.png' cannot be written \(Permission denied\)"):
        check_picture("plot", Path("new.png"))
    with pytest.raises(UsageError, match=r"output='run' cannot be written \(Permission denied\)"):
        check_run_folder("output", Path("run"))


def test_earlier_results_are_replaced_and_nothing_is_left_by_the_check(folder: Path) -> None:
    (folder / "page.html").write_text("\n<!DOCTYPE html>")
    (folder / "page.png").write_bytes(b"\x89PNG")
    (folder / "map.svg").write_text("<?xml version='1.0'?><svg>")
    (folder / "run").mkdir()
    for name in ("config.json", "training.json"):
        (folder / "run" / name).touch()
    before = sorted(folder.rglob("*"))
    check_page_and_picture("output", Path("page.html"), Path("page.png"), [Path("same.txt")])
    check_picture("plot", Path("map.svg"), [Path("bible")])
    check_run_folder("output", Path("run"))
    check_run_folder("output", Path("new/run"))
    assert sorted(folder.rglob("*")) == before
