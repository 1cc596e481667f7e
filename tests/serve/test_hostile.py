"""Malformed requests end in 4xx: none in 5xx, none in a hang."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from titans.serve.answer import Answer
from titans.stream.tokenizer import byte_tokenizer

from .servers import engines, running


def benchmark() -> Any:
    """The command that sends ten thousand of them."""
    path = Path(__file__).parents[2] / "benchmarks" / "fuzz_server.py"
    spec = importlib.util.spec_from_file_location("fuzz_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_requests_end_in_4xx(tmp_path: Path) -> None:
    fuzz, models = benchmark(), engines()
    with running(tmp_path / "memories", models, body=100_000, json=50_000, body_seconds=0.3) as server:
        memory = server.call("POST", "/v1/memories")[1]["id"]
        for status, request in (
            *fuzz.one_of_each(server.port, memory),
            *fuzz.attack(server.port, memory, 80, seed=0),
        ):
            assert 400 <= status < 500 or status == 200, (status, request)
        assert server.call("GET", "/health")[0] == 200
        assert server.service._active == 0 and all(not e.waiting + e.generating for e in models.values())
    for engine in models.values():
        engine.close()


@pytest.mark.parametrize(
    ("stops", "shown", "kept"),
    [
        (["lo w"], ["h", "e", "", "l", "", "", ""], "hel"),
        (["xyz"], list("hello worl"), "hello worl"),
        (["ell", "l"], ["h", "", "e"], "he"),
        (["lll", "lo wx"], ["h", "e", "", "", "l", "", "", "lo wo", "r", "l"], "hello worl"),
        (["h"], [""], ""),
    ],
)
def test_no_part_of_a_stop_text_is_shown(stops: list[str], shown: list[str], kept: str) -> None:
    answer = Answer(byte_tokenizer(), (), stops=stops, most=10)
    found = []
    for token in b"hello world":
        found.append(answer.add(token))
        if answer.finish:
            break
    assert "".join(found) == answer.text == kept
    assert found == shown
    ids, rest = answer.kept() if answer.cut else (answer.ids, "")
    assert bytes(ids).decode() + rest == kept
