"""What a fast backend keeps for its backward grows with the square root of the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .problems import make_problem
from .test_conformance import FAST


def most_weights_kept(backend: str, num_chunks: int, **options: object) -> int:
    """The most weight matrices that autograd holds at one time, forward and backward."""
    problem = make_problem(
        batch=1, heads=1, head_dim=5, expansion=3, chunk_size=2, time=2 * num_chunks, **options
    ).require_grad()
    shapes = {(1, *shape) for shape in problem.net.weight_shapes}
    held = {"now": 0, "peak": 0}

    class Handle:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            self.counts = tuple(tensor.shape) in shapes
            held["now"] += self.counts
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.counts

    with torch.autograd.graph.saved_tensors_hooks(Handle, lambda handle: handle.tensor):
        reads, state, _ = problem.scan(backend)
        (reads.sum() + sum(w.sum() for w in state.weights)).backward()
    del reads, state
    return held["peak"]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", [{}, dict(mask="random", reset="random", position="apart")])
def test_weights_kept(backend, options):
    few, many = (most_weights_kept(backend, n, **options) for n in (16, 256))
    assert few > 0
    # Sixteen times the chunks: four times the groups, each four times as long.
    assert many < 6 * few
