"""The examples run unchanged."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from titans.data import byte_tokenizer
from titans.memory import UPDATE_RULES

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


def test_own_rule(run) -> None:
    with mock.patch.dict(UPDATE_RULES):
        out = run("own_rule.py")
    assert float(re.search(r"oracle by (\S+)", out)[1]) < 1e-10
    zeros = [float(share) for share in re.findall(r"are 0: ([\d.]+)", out)]
    assert zeros == sorted(zeros) and zeros[0] == 0 < zeros[1]


def test_with_and_without(run, tmp_path: Path) -> None:
    """With a small random model in place of SmolLM2."""
    sizes = dict(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    out = run("with_and_without.py", str(tmp_path), "600")
    rows = re.findall(r"^ +[\d,]+–[\d,]+ +([\d.]+) +([\d.]+)", out, re.M)
    assert len(rows) == 3 and all(float(memory) < float(base) for base, memory in rows[1:])
