"""The window's keys and values as a cache of transformers for the base model's forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)


class _Layer(DynamicLayer):
    """Keys and values of one layer. is_sliding: whether the model masks all but the newest keys."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding


class BaseCache(Cache):
    """The cache of a base model for one call; every layer holds positions 0 to length − 1.

    A layer with its own sliding window holds all of them too; the model's mask hides the older ones.

    Args:
        sliding: for each layer whether it has a sliding window.
        keys, values: for each layer (rows, heads, length, head_dim); none for an empty cache.
    """

    layers: list[_Layer]

    def __init__(
        self, sliding: Sequence[bool], keys: Sequence[Tensor] = (), values: Sequence[Tensor] = ()
    ) -> None:
        super().__init__(layers=[_Layer(is_sliding) for is_sliding in sliding])
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
