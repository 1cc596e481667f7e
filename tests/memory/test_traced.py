"""A scan as one operator of a compiled graph: the same values and gradients, and what operators promise."""

from __future__ import annotations

import pytest
import torch
from torch import library

from titans.memory import BACKENDS
from titans.nn import NeuralMemory

from ..tolerances import FLOAT64
from .problems import assert_same, everything, make_problem

OPTIONS = {
    "an open chunk": dict(position="apart", expansion=2),
    "everything": dict(
        mask="rows", reset="random", initial_momentum=True, base=True, position="same", affine=False,
        normalize_step=True, row_limit=1.5,
    ),
    "no token": dict(time=0, depth=1),
}  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


@every_option
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_the_operator_is_the_scan(backend, options, monkeypatch):
    problem = make_problem(**options)
    found = everything(problem, backend)
    monkeypatch.undo()
    assert_same(found, everything(problem, backend), FLOAT64)


def test_the_operator_takes_an_objectives_numbers_and_a_gate_for_each_row(monkeypatch):
    problem = make_problem(objective="adaptive_huber", by_row=True, rule="memora", time=9, mask="random")
    found = everything(problem, "chunkwise")
    monkeypatch.undo()
    assert_same(found, everything(problem, "chunkwise"), FLOAT64)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at every tensor's
@pytest.mark.parametrize("options", [OPTIONS["everything"], OPTIONS["no token"]])
def test_what_is_promised_of_operators(options, monkeypatch):
    calls, operator = [], torch.ops.titans.scan

    def heard(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.titans, "scan", heard)
    make_problem(**options).require_grad().scan("chunkwise")
    monkeypatch.undo()
    library.opcheck(operator.default, calls[0])


def test_a_layer_that_carries_its_state_is_compiled_twice(monkeypatch):
    """Once for a new memory, whose anchor is its weights, and once for what a graph returns."""
    monkeypatch.undo()
    torch.compiler.reset()
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    layer, x = NeuralMemory(8, 2, 4, depth=2, chunk_size=4), torch.randn(1, 6, 8)
    run, state, expected = torch.compile(layer, fullgraph=True, backend=count), None, None
    with torch.no_grad():
        for _ in range(12):
            y, state = run(x, state)
            answers, expected = layer(x, expected)
            torch.testing.assert_close(y, answers)
    assert len(compiled) == 2
