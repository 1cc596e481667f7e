"""A scan as one operator of a compiled graph: the same values and gradients, and what operators promise."""

from __future__ import annotations

import pytest
import torch
from torch import library

from titans.memory import BACKENDS

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


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at every tensor's
@every_option
def test_what_is_promised_of_operators(options, monkeypatch):
    calls, operator = [], torch.ops.titans.scan

    def heard(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(torch.ops.titans, "scan", heard)
    make_problem(**options).require_grad().scan("chunkwise")
    monkeypatch.undo()
    library.opcheck(operator.default, calls[0])
