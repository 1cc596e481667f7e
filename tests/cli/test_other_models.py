"""The commands that read with any causal model of transformers, from a folder alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import titans
from titans.cli import main
from titans.data.needles import TASKS, make_needles
from titans.evaluate import needle
from titans.stream import describe_memory

from ..models import small_causal_lm, tokenizer_with_beginning


@pytest.fixture(scope="module", params=["llama", "mamba2", "qwen3_next"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp(request.param)
    small_causal_lm(request.param).save_pretrained(path)
    return str(path)


def test_perplexity_needles_memory_and_new_text(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (book, memory) = (tmp_path / "book.txt", str(tmp_path / "memory"))
    book.write_text("To be, or not to be, that is the question. " * 8)

    def run(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = run("eval", "perplexity", folder, "--data", str(book))
    assert found["tokens"] == book.stat().st_size - 1 and found["bits_per_byte"] > 4
    assert run("eval", "needle", folder, "--lengths", "300", "--depths", "0.5", "--samples", "2")["cells"]
    read = run("memorize", folder, str(book), "-o", memory)
    assert read["tokens"] == book.stat().st_size and read["mean_surprise"] is None
    options = ["--memory", memory, "--max-new-tokens", "5", "--greedy"]
    first, again = run("generate", folder, *options), run("generate", folder, *options)
    assert first["text"] == again["text"] and first["tokens"] == 5
    assert describe_memory(memory).stats.tokens == book.stat().st_size
    frozen = ["eval", "perplexity", folder, "--data", str(book), "--freeze-memory"]
    for command, code, message in (
        (["info", memory], 0, "memory"),
        (frozen, 2, "it has no memory"),
        (["inspect", folder, str(book)], 1, "without a memory: give a Titans model or a graft"),
        (["bench", "--checkpoint", folder], 1, "this needs a Titans model"),
    ):
        assert main(command) == code and message in capsys.readouterr().err


def test_a_text_is_evaluated_after_what_its_tokenizer_puts_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = small_causal_lm("llama", vocab_size=257), tokenizer_with_beginning()
    (folder, book), text = (str(tmp_path / "model"), tmp_path / "book.txt"), "To be, or not to be. " * 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    book.write_text(text)

    def run(*arguments: str) -> dict:
        assert main(["eval", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def nats(part: str) -> list[float]:
        """Of every token, by transformers alone."""
        ids = tokenizer(part, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist()

    found = run("perplexity", folder, "--data", str(book))
    assert found["tokens"] == found["by_position"][0]["tokens"] == len(text) == len(nats(text))
    assert found["nats_per_token"] == pytest.approx(sum(nats(text)) / len(text), abs=1e-4)
    windows = [text[begin : begin + 25] for begin in range(0, len(text), 25)]
    expected = sum(sum(nats(part)) for part in windows) / len(text)
    found = run("perplexity", folder, "--data", str(book), "--context-length", "25")
    assert found["nats_per_token"] == pytest.approx(expected, abs=1e-4)

    begins, read = [], needle.read

    def reading(reader, ids, *rest):
        begins.append(ids)
        return read(reader, ids, *rest)

    monkeypatch.setattr(needle, "read", reading)
    run("needle", folder, "--lengths", "300", "--depths", "0", "--samples", "2")
    (ids,) = begins
    question = len(make_needles(TASKS["passkey"], np.random.default_rng(0)).questions[0])
    assert ids.shape == (2, 300 - question)
    assert (ids[:, 0] == 256).all() and (ids[:, 1:] < 256).all()


def test_nothing_is_unpickled_downloaded_or_executed(tmp_path: Path) -> None:
    small_causal_lm("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    foreign = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    for changes, message in (
        ({"model_type": "mine", "auto_map": foreign}, "is no causal model that transformers can open"),
        ({"model_type": "t5"}, "is no causal model that transformers can open"),
        ({"hidden_size": 64}, "do not fit its config.json"),
        ({"vocab_size": 300}, "do not fit its config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            titans.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, tokenizer = titans.load(tmp_path)
    assert len(tokenizer) == 256 and torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors.*pickled weights are not opened"):
        titans.load(tmp_path)
