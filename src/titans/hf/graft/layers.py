"""The states between a model's layers, taken and changed during its forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class Change(Protocol):
    """Changes states between layers.

    layers: those after which it changes them.
    """

    layers: Sequence[int]

    def __call__(self, layer: int, states: Tensor, rows: Sequence[int] | None) -> Tensor:
        """The states of the next tokens after a layer, (rows, time, hidden_size), changed.

        Args:
            rows: which rows of the whole batch these are; None for all. No token of them is padding.
        """
        ...


def layers_of(decoder: nn.Module, count: int) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        ValueError: for a model that does not keep all `count` of them in one list.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise ValueError(f"it has no list of its {count} layers, whose states a memory reads or changes")
    return layers


@contextmanager
def states_after(
    layers: nn.ModuleList,
    chosen: Sequence[int],
    changes: Sequence[Change] = (),
    rows: Sequence[int] | None = None,
) -> Iterator[list[Tensor]]:
    """A list that holds the states after each chosen layer once the model was called inside the context.

    The states are changed first, which later layers see, too. The model has no hooks before and afterwards.
    Calls of other threads meanwhile are left alone.

    Args:
        changes: made in this order, with `rows`.
    """
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []
    thread = threading.get_ident()

    def of(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    def changed(layer: int, change: Change) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            new = change(layer, of(output), rows)
            return new if isinstance(output, Tensor) else (new, *output[1:])

        return hook

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                found[layer] = of(output)

        return hook

    handles = [
        layers[layer].register_forward_hook(changed(layer, change))
        for change in changes
        for layer in change.layers
    ]
    handles += [layers[layer].register_forward_hook(keep(layer)) for layer in chosen]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
    states += (found[layer] for layer in chosen)
