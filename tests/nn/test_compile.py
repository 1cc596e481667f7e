"""Under torch.compile the memory runs as it does without, by a fast path: traced, it would be the oracle."""

from __future__ import annotations

import pytest
import torch

from titans.memory import dispatch
from titans.memory.dispatch import Backend
from titans.nn import NeuralMemory

from ..tolerances import FLOAT32, assert_close


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at every tensor's
def test_a_compiled_layer_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(problem: object) -> None:
        raise AssertionError("the oracle was taken")

    monkeypatch.setitem(dispatch.BACKENDS, "reference", Backend(traced, lambda problem: None))
    torch.manual_seed(0)
    layer, x = NeuralMemory(16, 1, head_dim=8, chunk_size=4), torch.randn(2, 9, 16)
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        _, state = run(x)
        y, _ = run(x, state)
        found.append((y, *torch.autograd.grad(y.sum(), list(layer.parameters()))))
    for name, a, b in zip(("y", *dict(layer.named_parameters())), *found, strict=True):
        assert_close(b, a, FLOAT32, name)
