"""Control characters do not reach a terminal, and letters that its encoding lacks end no command."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from titans.cli import main
from titans.cli.progress import ReadingProgress
from titans.cli.terminal import any_letter_is_shown, printable, report, text_streamer
from titans.data import byte_tokenizer


def test_control_characters_are_written_out() -> None:
    assert printable("a\tb\nc é 中") == "a\tb\nc é 中"
    assert printable("\x1b[2J \x07 \r \x7f \x9b") == "\\x1b[2J \\x07 \\x0d \\x7f \\x9b"
    assert printable("\u202efdp.exe") == "\\u202efdp.exe"


def test_names_of_files_are_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J[bold]b"
    (tmp_path / name).touch()
    for arguments in (["info", name], ["memorize", "M", tmp_path / name, "-o", tmp_path / "memory"]):
        assert main([str(argument) for argument in arguments]) == 1
        found = capsys.readouterr().err
        assert "\x1b" not in found and "x1b[2J[bold]b" in found
    report(name)
    assert capsys.readouterr().err == "a\\x1b[2J[bold]b\n"
    for terminal in (False, True):
        screen = io.StringIO()
        with ReadingProgress(10, Console(file=screen, force_terminal=terminal, width=200)) as progress:
            progress.update(10, 10, name)
        assert "a\\x1b[2J[bold]b" in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_new_text_is_written_out_on_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.StringIO()
    monkeypatch.setattr(output, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stdout", output)
    streamer, tokenizer = text_streamer(byte_tokenizer()), byte_tokenizer()
    for text in ("prompt", "a\x1b[2J", " b"):
        streamer.put(tokenizer(text, return_tensors="pt").input_ids[0])
    streamer.end()
    assert output.getvalue() == ("a\\x1b[2J b\n" if is_terminal else "a\x1b[2J b\n")


def test_an_ascii_stdout_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stdout)
    with any_letter_is_shown():
        print("Müller 中")
    stdout.flush()
    assert raw.getvalue() == b"M\\xfcller \\u4e2d\n" and stdout.errors == "strict"
