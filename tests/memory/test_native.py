"""The compiled backend where it cannot be compiled: a sentence, and the next backend."""

from __future__ import annotations

import pytest
import torch

from titans.memory.native import missing

from .problems import make_problem


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    missing.cache_clear()
    yield tmp_path
    missing.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "sentence"),
    [("no-such-compiler", "there is no no-such-compiler"), ("false", "compiling it with .*false failed")],
)
def test_without_a_compiler_auto_takes_the_next_backend(cache, monkeypatch, compiler, sentence):
    monkeypatch.setenv("CXX", compiler)
    problem = make_problem(time=9)
    with pytest.raises(ValueError, match=f"backend='native' refuses this call: .*{sentence}"):
        problem.scan("native")
    assert not list(cache.rglob("*.so"))
    for found, expected in zip(problem.scan("auto")[::2], problem.scan("chunkwise")[::2], strict=True):
        assert torch.equal(found, expected)
