"""The examples run unchanged."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_example(name: str, *arguments: str) -> str:
        """What an example prints, run as a program in this process."""
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_stream_a_book(run) -> None:
    out = run("stream_a_book.py")
    sizes = re.findall(r"state ([\d,]+) bytes", out)
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    assert "PROSPERO:" in out and "MIRANDA:" in out


def test_train_minimal_learns(run) -> None:
    out = run("train_minimal.py", "12")
    before, after = map(float, re.findall(r"held out ([\d.]+) bits/byte", out))
    assert after < before - 1


def test_memory_step_by_step(run, tmp_path: Path) -> None:
    out = run("memory_step_by_step.py", str(tmp_path / "steps.png"))
    known, unknown = map(
        float, re.search(r"answer .* ([\d.]+) with the memory, ([\d.]+) without", out).groups()
    )
    assert known > 0.9 > 0.3 > unknown
    assert (tmp_path / "steps.png").stat().st_size > 10_000
