"""In which precision a command reads with a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import titans
from titans.cli import main
from titans.cli.models import set_precision
from titans.zoo import precision

from ..models import small_causal_lm

Err = pytest.CaptureFixture[str]


def on_a_processor(monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    monkeypatch.setattr(precision, "_LARGE", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("grafted", [True, False])
def test_auto_is_the_precision_that_the_processor_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, capsys: Err, tmp_path: Path, tiles: bool, grafted: bool
) -> None:
    on_a_processor(monkeypatch, tiles)
    slow, fast = (torch.float32, torch.bfloat16) if tiles else (torch.bfloat16, torch.float32)
    small_causal_lm("llama").to(slow).save_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=slow)
    if grafted:
        model = titans.graft(model, window=32)
    set_precision(model, "auto")
    assert model.dtype == fast and str(fast).removeprefix("torch.") in capsys.readouterr().err
    set_precision(model, "auto")
    assert not capsys.readouterr().err, "nothing changed"
    ids = torch.arange(64)[None]
    # Frequencies of the rotary positions stay in float32, as transformers loads them.
    expected: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=fast)
    expected = titans.graft(expected, window=32) if grafted else expected
    # A graft measures its base before the conversion.
    assert torch.allclose(model(ids).logits, expected(ids).logits, atol=0.05 if grafted else 0)


def test_small_models_and_titans_models_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_causal_lm("llama")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    set_precision(model, "auto")
    assert model.dtype == torch.float32
    set_precision(model, "bfloat16")
    assert model.dtype == torch.bfloat16
    on_a_processor(monkeypatch, tiles=True)
    model, _ = titans.load("titans-lmm-tiny")
    set_precision(model, "auto")
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype=bfloat16: a Titans model"):
        set_precision(model, "bfloat16")


def test_load_converts_the_base_of_a_graft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of nothing else, because another model may be trained."""
    on_a_processor(monkeypatch, tiles=True)
    base, grafted = tmp_path / "base", tmp_path / "grafted"
    small_causal_lm("llama").save_pretrained(base)
    titans.graft(titans.load(base)[0], window=32).save_pretrained(grafted)
    assert titans.load(base)[0].dtype == torch.float32
    assert titans.load(base, dtype="auto")[0].dtype == torch.bfloat16
    model = titans.load(grafted)[0]
    assert model.dtype == torch.bfloat16 and model.initial_state(1).adaptation.weight.dtype == torch.float32
    assert titans.load(grafted, dtype="float32")[0].dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='float8': give one of auto, float32, bfloat16"):
        titans.load(base, dtype="float8")


def test_a_command_reads_in_the_precision_asked_for(tmp_path: Path, capsys: Err) -> None:
    small_causal_lm("llama").save_pretrained(tmp_path / "base")
    book = tmp_path / "book.txt"
    book.write_text("To be, or not to be. " * 10)
    memory = tmp_path / "memory"
    arguments = ["memorize", tmp_path / "base", book, "-o", memory, "--graft", "--dtype", "bfloat16"]
    assert main([*map(str, arguments)]) == 0
    from titans.hf.state_file import open_state_file

    with open_state_file(memory) as file:
        assert "torch.bfloat16" in str(file.kinds)
    # A memory continues in another precision.
    assert main(["generate", str(tmp_path / "base"), "--memory", str(memory), "--graft", "--greedy"]) == 0
    assert capsys.readouterr().out
