"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stream_a_book() -> None:
    out = run("stream_a_book.py")
    sizes = re.findall(r"state ([\d,]+) bytes", out)
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    assert "PROSPERO:" in out and "MIRANDA:" in out


def test_train_minimal_learns() -> None:
    out = run("train_minimal.py", "12")
    before, after = map(float, re.findall(r"held out ([\d.]+) bits/byte", out))
    assert after < before - 1
