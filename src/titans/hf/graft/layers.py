"""The states between a model's layers, taken during its forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def layers_of(decoder: nn.Module, count: int) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        ValueError: for a model that does not keep all `count` of them in one list.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise ValueError(f"it has no list of its {count} layers, whose states an association reads")
    return layers


@contextmanager
def states_after(layers: nn.ModuleList, chosen: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that holds the states after each chosen layer once the model was called inside the context.

    The model has no hooks before and afterwards. Calls of other threads meanwhile are not looked at.
    """
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []
    thread = threading.get_ident()

    def keep(index: int) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                found[index] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [layers[index].register_forward_hook(keep(index)) for index in chosen]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
    states += (found[index] for index in chosen)
