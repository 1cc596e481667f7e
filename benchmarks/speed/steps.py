"""One pass of a contender over its case, forward or with backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]
Step = Callable[[], object]


def backward_step(run: Callable[[], Tensor], leaves: list[Tensor]) -> Step:
    """Forward and backward of what `run` returns, with gradients for the leaves."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().square().mean().backward()

    return step


def layer_step(layer: torch.nn.Module, case: Case, call: Callable[[Tensor], Tensor]) -> Step:
    """A pass of a layer over the case's tokens, forward or with backward."""
    x = torch.randn(1, case["time"], case["width"])
    if case["backward"]:
        return backward_step(lambda: call(x), list(layer.parameters()))

    def step() -> None:
        with torch.no_grad():
            call(x)

    return step
