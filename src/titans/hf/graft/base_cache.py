"""The window's keys and values as a cache of transformers for the base model's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


@dataclass(frozen=True)
class SideBySide:
    """Whole blocks of each row that one call reads as rows of their own, (rows · count, block).

    What a block sees of the one before it is in the same call, so that all go through a layer together.

    count: blocks of a row. sinks: as of `Window`. moved: keys (…, block, head_dim) of a layer, by its index,
    as the next block sees them.
    """

    count: int
    sinks: int
    moved: Callable[[Tensor, int], Tensor]


class _Layer(DynamicLayer):
    """Keys and values of one layer. is_sliding: whether the model masks all but the newest keys."""

    def __init__(self, is_sliding: bool, index: int, blocks: SideBySide | None) -> None:
        super().__init__()
        self.is_sliding, self.index, self.blocks = is_sliding, index, blocks

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.blocks is None:
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        k, v = (x.unflatten(0, (-1, self.blocks.count)) for x in (key_states, value_states))
        keys = self._seen(self.keys, self.blocks.moved(k[:, :-1], self.index), k)
        values = self._seen(self.values, v[:, :-1], v)
        # What a call with the last block alone would leave.
        self.keys, self.values = keys[:, -1], values[:, -1]
        return keys.flatten(0, 1), values.flatten(0, 1)

    def _seen(self, held: Tensor, before: Tensor, new: Tensor) -> Tensor:
        """What each block sees, (rows, count, heads, slots, head_dim).

        Args:
            held: (rows, heads, sinks + block, head_dim), of before the call.
            before: (rows, count − 1, …), as the block after each sees it. new: (rows, count, …).
        """
        assert self.blocks is not None
        sinks, previous = held[:, None].tensor_split([self.blocks.sinks], 3)
        sinks = sinks.expand(-1, self.blocks.count, -1, -1, -1)
        return torch.cat([sinks, torch.cat([previous, before], 1), new], 3)


class BaseCache(Cache):
    """The cache of a base model for one call; every layer holds positions 0 to length − 1.

    A layer with its own sliding window holds all of them too; the model's mask hides the older ones.

    Args:
        sliding: for each layer whether it has a sliding window.
        keys, values: for each layer (rows, heads, length, head_dim); none for an empty cache.
        blocks: if the call reads whole blocks side by side; these are at the positions that follow.
    """

    layers: list[_Layer]

    def __init__(
        self, sliding: Sequence[bool], keys: Sequence[Tensor] = (), values: Sequence[Tensor] = (),
        blocks: SideBySide | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layers=[_Layer(each, index, blocks) for index, each in enumerate(sliding)])
        for layer, k, v in zip(self.layers, keys, values, strict=False):
            layer.lazy_initialization(k, v)
            layer.keys, layer.values = k, v

    @property
    def contents(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of all layers.

        Raises:
            ValueError: if the model has left a layer empty.
        """
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            if layer.keys is None or layer.values is None:
                raise ValueError(f"layer {index} keeps no keys and values in the cache")
            keys.append(layer.keys)
            values.append(layer.values)
        return tuple(keys), tuple(values)


def call_at(
    decoder: Any, first: Tensor, given: dict[str, Any], cache: BaseCache
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The model's forward, each row's positions counted from `first` (rows,): hidden states, keys, values."""
    x = next(iter(given.values()))
    positions = first[:, None] + torch.arange(x.shape[1], device=x.device)
    output = decoder(**given, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.last_hidden_state, *cache.contents


def sliding_layers(config: PreTrainedConfig) -> list[bool]:
    """For each layer of a model whether it has a sliding window.

    Raises:
        ValueError: for a layer that keeps something other than keys and values of single tokens.
    """
    layers = DynamicCache(config=config).layers
    if not layers:
        raise ValueError("transformers knows no cache of keys and values for it")
    kinds = getattr(config, "layer_types", None) or [type(layer).__name__ for layer in layers]
    for index, layer in enumerate(layers):
        known = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not known or kinds[index] == "chunked_attention":
            raise ValueError(f"layer {index} ({kinds[index]}) keeps more than keys and values of tokens")
    return [isinstance(layer, DynamicSlidingWindowLayer) for layer in layers]
