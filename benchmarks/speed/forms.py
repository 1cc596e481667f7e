"""Memories of equal state next to each other: linear, two layers, and linear on sin features.

All have four heads of 4,096 fast weights, and so as many bytes of state. The answers of the last two are half
as wide as the linear memory's, and so are their projections; the scan alone has no projections, and takes
features as given.
"""

from __future__ import annotations

from typing import Any

import torch
from library import run_on
from steps import Case, Step, backward_step, layer_step
from torch import Tensor

HEADS = 4
# Arguments of `NeuralMemory`.
FORMS: dict[str, dict[str, Any]] = {
    "linear": dict(head_dim=64, depth=1),
    "two layers": dict(head_dim=32, depth=2, expansion=2),
    "sin features": dict(head_dim=32, depth=1, features="sin", feature_size=128),
}
BACKENDS = {"native": "native", "torch": "chunkwise"}
NAMES = [f"{form}, {backend}" for backend in BACKENDS for form in FORMS]


def build_form(case: Case, name: str) -> Step:
    """The function that does a case once with a contender in `NAMES`."""
    form, backend = name.rsplit(", ", 1)
    from titans.nn import NeuralMemory

    layer = NeuralMemory(case["width"], HEADS, chunk_size=case["chunk"], **FORMS[form])
    run_on(BACKENDS[backend], layer)
    if case["kind"] == "equal layer":
        return layer_step(layer, case, lambda x: layer(x)[0])
    return _scan(layer, case, BACKENDS[backend])


def _scan(layer: Any, case: Case, backend: str) -> Step:
    """The scan of that layer alone, keys being as its fast weights take them."""
    from titans.memory import memory_scan

    shape, network = (1, case["time"], HEADS), layer.network
    unit = torch.nn.functional.normalize
    queries, keys = (unit(torch.randn(*shape, network.input_dim), dim=-1) for _ in range(2))
    values = torch.randn(*shape, network.head_dim)
    # As the gates of a layer at first: little is forgotten.
    gates = [high * torch.rand(*shape, network.depth) for high in (1e-4, 0.5, layer.max_step_size)]
    base = [w.detach().clone() for w in layer.base]
    leaves = [queries, keys, values, *gates, *base]
    for leaf in leaves:
        leaf.requires_grad_(case["backward"])
    state = layer.inner.initial_state([torch.zeros(1, *w.shape) for w in base])

    def run() -> Tensor:
        return memory_scan(
            layer.inner,
            queries,
            keys,
            values,
            *gates,
            state,
            case["chunk"],
            base=base,
            backend=backend,
        )[0]

    return backward_step(run, leaves) if case["backward"] else run
