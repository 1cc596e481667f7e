"""The demo reads a book with and without the memory, stops in time, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titans
from titans.cli import main
from titans.data import Document, byte_tokenizer
from titans.evaluate import score
from titans.experiments import demo, small_demo
from titans.inspection import GraftInspection, GraftReading
from titans.zoo import checkpoint

from ..models import small_causal_lm

BOOK = b"Howl, howl, howl, howl! O, you are men of stones! " * 30


def pretrained() -> Any:
    return small_causal_lm("llama"), byte_tokenizer()


def test_the_demo_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tokenizer = pretrained()
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: (titans.graft(base), tokenizer))
    monkeypatch.setattr(demo, "load_corpus", lambda name: [Document("king-lear", BOOK)])
    monkeypatch.setattr(demo, "_SECONDS_BETWEEN_LINES", 0.0)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    error = capsys.readouterr().err
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text())
    notes = (" ".join(fact.statement for fact in demo.FACTS) + "\n\n").encode()
    losses = score(titans.graft(pretrained()[0]), np.frombuffer(notes + BOOK, np.uint8))[len(notes) :]
    assert numbers["whole"]["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert numbers["whole"]["loss"] < 0.9 * numbers["whole"]["base"]
    assert [part["begin"] for part in numbers["by_position"]] == [0, 512]
    assert f"{numbers['by_position'][1]['loss']:.3f}" in error and "tokens/s" in error and "s left" in error
    assert len(numbers["answers"]) == 6 and "Of 6 facts stated before the play it recalls 0" in error
    assert "read 1,500 of the 1,500 tokens of King Lear" in error and "lowered the loss by" in error
    # Two layers, two heads of eight keys and values, in four bytes.
    assert numbers["cache_bytes"] == len(BOOK) * 2 * 2 * 2 * 8 * 4
    # It ends with the page, and three lines.
    *_, page, read, gained, recalled = error.rstrip().splitlines()
    assert "report.html" in page and read.startswith("SmolLM2-135M read") and "the loss" in gained
    assert recalled.startswith("Of 6 facts")
    files = {path.name for path in (tmp_path / "demo").iterdir()}
    assert files == {"report.html", "report.png", "demo.json"}
    assert "Howl" in (tmp_path / "demo" / "report.html").read_text()


def test_the_state_has_a_limit_that_is_reached() -> None:
    model = titans.graft(pretrained()[0], window=16)
    reader, held = GraftReading(model), []
    for token in torch.arange(100):
        reader.read(token[None])
        held.append(reader.cache.nbytes())
    limit, per_token = demo.state_sizes(model)
    assert limit - per_token == max(held) == max(held[-8:])


def test_it_stops_in_time() -> None:
    model, tokenizer = titans.graft(pretrained()[0]), byte_tokenizer()
    found = demo.read_book(model, tokenizer, BOOK, seconds=0.0)
    assert len(found.found.ids) == 256 and found.tokens_in_book == len(BOOK)


def test_questions_are_asked_with_and_without_what_was_learned() -> None:
    base, tokenizer = pretrained()
    model = titans.graft(base, window=32)
    reader, text = GraftReading(model), torch.tensor([*BOOK[:200]])
    reader.read(text)
    kept = reader.cache.clone()
    (found,) = demo.ask(model, tokenizer, reader.cache, demo.FACTS[:1])
    assert torch.equal(reader.cache.state.adaptation.weight, kept.state.adaptation.weight)
    for adaptation, answer in ((True, found.with_memory), (False, found.without)):
        session = titans.Session(titans.graft(base, window=32, adaptation=adaptation), tokenizer)
        session.feed(BOOK[:200])
        session.feed(f"\n\n{demo.FACTS[0].question}")
        expected = session.generate(max_new_tokens=12, do_sample=False).strip()
        # The session waits for the rest of a character.
        assert answer and expected.startswith(answer.rstrip("\ufffd"))


def test_the_verdict_says_which_way_it_fell() -> None:
    losses = np.full(600, 3.0, np.float32)
    worse = GraftInspection(np.arange(600), 1.1 * losses, losses)
    assert demo.Answer(demo.FACTS[2], "41722", "4172, he said").recalled == (False, True)
    answers = tuple(demo.Answer(fact, f" {fact.answer.upper()}. And", "no") for fact in demo.FACTS[:3])
    text = demo.verdict(demo.BookDemo(worse, answers, 600, 2.0, 7_000_000, 9_000_000), "Model", 512)
    assert "on tokens 512 to 2,047 raised the loss by 10.0 %" in text and "at most 7.0 MB" in text
    assert "Of 3 facts stated before the play it recalls 3; the model without a memory recalls 0." in text
    assert "300 tokens/s" in text and "would have 9 MB" in text


def test_without_the_package_small_models_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(path: Path) -> Any:
        raise ConnectionError("no\nnetwork")

    shown: list[Any] = []
    monkeypatch.setattr(checkpoint, "load_checkpoint", missing)
    monkeypatch.setattr(small_demo, "show", lambda *given: shown.append(given))
    assert main(["demo", "--output", str(tmp_path), "--steps", "7"]) == 0
    assert main(["demo", "--output", str(tmp_path), "--small"]) == 0
    error = capsys.readouterr().err
    assert shown == [(7, tmp_path), (320, tmp_path)]
    assert error.count("cannot be had (no network): small models in its place") == 1
    (tmp_path / "report.png").write_text("mine")
    for arguments, message in (
        (["--minutes", "0"], "minutes=0"),
        (["--steps", "0"], "steps=0"),
        ([], "holds something else"),
    ):
        assert main(["demo", "--output", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err
